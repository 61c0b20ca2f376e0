"""What the command leaves with, besides 0. Known without torch."""

FAILED = 1
"""What went well until then, and may the next time: a full disk, a machine that is gone, a URL that
cannot be reached."""
MISTAKE = 2
"""A mistake in the command, which would be made again."""
REQUEUE = 75
"""After SIGTERM or SIGUSR1, EX_TEMPFAIL of sysexits.h: start the same command again."""
HANG = 76
"""Ranks that leave because one hangs, EX_PROTOCOL of sysexits.h."""
INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as shells count."""
BROKEN_PIPE = 141
"""Nobody reads standard output any more: 128 + SIGPIPE."""
