"""Keeps what a script runs and what it says as a page of documentation; for end_to_end.py."""

from __future__ import annotations

import inspect
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

# The commands of this Python's own environment are found first.
ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
    "TQDM_DISABLE": "1",
}
PACKAGES = ("attamba", "torch", "transformers", "lm_eval", "openai")


class Page:
    """What was run and what it said, on the screen and as Markdown."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def heading(self, text: str) -> None:
        print(f"\n== {text}", flush=True)
        self.parts.append(f"## {text}")

    def command(self, line: str) -> str:
        """Run a command; show its standard output and return it. Exits where it fails."""
        print(f"$ {line}", flush=True)
        done = subprocess.run(shlex.split(line), env=ENVIRONMENT, text=True, capture_output=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            sys.exit(f"{done.stderr}\n`{line}` failed with status {done.returncode}")
        self._block("console", f"$ {line}\n{done.stdout}")
        return done.stdout

    def python(self, function: Callable[..., str], *arguments: str) -> str:
        """Call a function that returns text; show its source and the text, and return that."""
        said = function(*arguments)
        call = f"print({function.__name__}({', '.join(map(_literal, arguments))}))"
        print(f">>> {call}\n{said}", flush=True)
        self._block("python", f"{inspect.getsource(function)}\n\n{call}")
        self._block("text", said)
        return said

    @contextmanager
    def server(self, line: str, log: Path) -> Iterator[str]:
        """Run `line --port PORT` meanwhile, and give its address; it is stopped at the end."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        line = f"{line} --port {port}"
        print(f"$ {line} &", flush=True)
        self._block("console", f"$ {line} &")
        with open(log, "w", encoding="utf-8") as output:
            server = subprocess.Popen(
                shlex.split(line), env=ENVIRONMENT, stdout=output, stderr=output
            )
        try:
            _wait(server, f"http://localhost:{port}", log)
            yield f"http://localhost:{port}"
        finally:
            _stop(server)

    def write(self, path: Path, command: str) -> None:
        """The page so far; `command` is what it was made with."""
        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        head = (
            f"# End to end\n\nWritten by `{command}`, with Python {platform.python_version()}, "
            f"{versions}, on a CPU.\nThe model is small and was trained for minutes: its text and "
            f"its scores show that the parts fit together, not what such models can do."
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join([head, *self.parts]) + "\n", encoding="utf-8")

    def _block(self, kind: str, text: str) -> None:
        lines = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        self.parts.append(f"```{kind}\n{lines}\n```")


def _literal(text: str) -> str:
    """A string as the project's formatter writes it."""
    return repr(text) if '"' in text else f'"{text}"'


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server answers; exits with its log where it does not."""
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.3)
    sys.exit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGINT)
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
