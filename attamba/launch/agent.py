"""torchrun that lets training leave in its own time, and hands its exit status on.

    python -m attamba.launch.agent ARGUMENTS OF TORCHRUN

differs from `torchrun` in two things. SIGTERM and SIGUSR1 go on to the ranks, and torchrun waits
for them to save, where it would kill them after 30 seconds (SIGTERM) or die itself (SIGUSR1). And
where ranks leave with the status that asks for a requeue, or are ended by such a signal before they
heed it, it leaves with that status, where it would leave with 1 and a traceback. It does so too
where all were told to stop and the machine that hosts their meeting was faster.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from attamba.exit_status import FAILED, INTERRUPTED, MISTAKE, REQUEUE

CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")
"""Processes that the main thread started, on Linux."""
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
_passed: set[int] = set()
"""Signals that went on to the ranks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun; returns its exit status."""
    if CHILDREN.exists():
        for number in PASSED_ON:
            signal.signal(number, _pass_on)
        # torchrun's own handlers, which replace those that are there, for what is left
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        status = _status({failure.exitcode for failure in error.failures.values()})
        if status not in (REQUEUE, INTERRUPTED, MISTAKE):  # in which ranks have said enough
            print(error, file=sys.stderr)
        return status
    except (RendezvousError, DistError) as error:
        if _passed:
            return REQUEUE
        cause = error.__cause__ or error
        why = f"({type(cause).__name__}) {cause}".splitlines()[0]  # and a stack of C++ below
        print(f"machines of this job did not meet, or lost each other {why}", file=sys.stderr)
        return FAILED
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _status(of_ranks: set[int]) -> int:
    """What to leave with. Those of ranks that a signal ended, which torchrun may have sent after
    the first had left, are below zero."""
    told = {-number for number in _passed}
    if told and of_ranks <= {*told, REQUEUE}:  # some had not come to heed it yet
        return REQUEUE
    left = {status for status in of_ranks if status > 0}
    return left.pop() if len(left) == 1 else FAILED


def _pass_on(number: int, frame: object) -> None:
    _passed.add(number)
    ranks = CHILDREN.read_text().split()
    if not ranks:  # not started yet
        raise SystemExit(REQUEUE)
    for rank in ranks:
        os.kill(int(rank), number)


if __name__ == "__main__":
    sys.exit(main())
