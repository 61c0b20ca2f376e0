"""eval.mode=process: a process that scores the checkpoints of this run while it trains.

It is `attamba follow`, told by its standard input how long to stay: when that is closed, as it is
when training ends or is killed, it scores what there is and leaves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from attamba.config import RunConfig
from attamba.train.follow import RESULTS
from attamba.train.metrics import read_metrics
from attamba.train.observers import Observer
from attamba.train.sinks import Record

if TYPE_CHECKING:
    from attamba.train.run import Run

LOG = "eval.log"
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets, which would make the process one of its ranks."""


class Beside(Observer):
    """While entered, the process runs; on leaving, its last results are waited for.

    A run that ends by an error or is interrupted does not wait: `attamba follow`, or the same
    command where it goes on, scores what is left.

    show: given each result, once. say: told if the process ends early.
    """

    def __init__(
        self, config: RunConfig, show: Callable[[Record], None], say: Callable[[str], None]
    ) -> None:
        self._folder, self._device = Path(config.out), config.eval.device
        self._show, self._say = show, say
        self._seen = len(self._results())
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Beside:
        command = [sys.executable, "-m", "attamba", "follow", str(self._folder), "--until-eof"]
        with open(self._folder / LOG, "ab") as log:
            self._process = subprocess.Popen(
                [*command, "--device", self._device],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={name: v for name, v in os.environ.items() if name not in OF_RANKS},
                start_new_session=True,  # Ctrl-C is for training, which stops it if need be
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            if error is not None:
                process.terminate()
            elif process.poll() is None:
                self._say("Waiting for the last evaluations ...")
            process.wait()
        except BaseException:
            process.kill()
            raise
        self._look(ending=error is not None)

    def figures(self, run: Run) -> Record:
        self._look()
        return {}

    def _look(self, *, ending: bool = False) -> None:
        """Show what is new, and say if the process has failed, unless it was ended."""
        results = self._results()
        for record in results[self._seen :]:
            self._show(record)
        self._seen = len(results)
        status = None if self._process is None else self._process.poll()
        if status and not ending:
            self._process = None
            told = (self._folder / LOG).read_text(errors="replace").strip().splitlines()
            self._say(
                f"Evaluation beside training has ended with status {status}, and training goes on "
                f"without it: {told[-1] if told else ''} (see {self._folder / LOG}); score the "
                f"checkpoints with: attamba follow {self._folder}"
            )

    def _results(self) -> list[Record]:
        path = self._folder / RESULTS
        return read_metrics(path) if path.exists() else []
