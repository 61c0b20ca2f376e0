"""Finds the rank that hangs.

Ranks wait for each other in every step, so one that stops stops all, and the others cannot tell
which it was from where they stand. Each rank therefore publishes how far it has come, from a thread
of its own. When nothing has moved for long enough, the rank that is silent or furthest behind is
named on standard error and the process ends, for torchrun to start all ranks anew.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist
from torch import nn

from attamba.exit_status import HANG
from attamba.train.distributed import Ranks

_VERDICT = "verdict"


class Watchdog:
    """While entered, watches that every rank is there; within in_loop, that it gets on as well.

    Before the loop ranks may take their time, for one of them prepares texts and the others wait.
    In it one of them at least has to call `beat` or `stir` every `timeout` seconds: they wait for
    each other, so that where one stops all do. With the loop the watch ends. On a process alone it
    does nothing. Made by all ranks at once.
    """

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        self.ranks, self.timeout = ranks, timeout
        self._beats, self._stirs, self._at = 0, 0, "start"
        self._moved = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if not ranks.alone:
            self._store = _own_store(ranks, timeout)
            self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self, at: str) -> None:
        """This rank has come to `at`, a few words for the message."""
        self._at = at
        self._beats += 1

    def stir(self) -> None:
        """What this rank waits for gets on; it has come no further than those that wait longer."""
        self._stirs += 1

    def follow(self, model: nn.Module) -> None:
        """Count each layer's forward pass as a beat: a rank that hangs in one is behind."""
        if self._thread is not None:
            for layer in model.get_submodule("layers").children():
                layer.register_forward_hook(self._passed)

    def _passed(self, module: nn.Module, inputs: object, output: object) -> None:
        self._beats += 1

    def __enter__(self) -> Watchdog:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @contextmanager
    def in_loop(self) -> Iterator[None]:
        """See Watchdog."""
        self.beat("the first step")
        try:
            yield
        finally:
            self._end()

    def _end(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        """Publish; rank 0 looks at all and, if nothing moves, says why for all to leave."""
        ticks = 0
        heard: dict[int, tuple[str, float]] = {}
        while not self._over.wait(self.timeout / 8):
            ticks, now, beats = ticks + 1, time.monotonic(), self._beats
            try:
                said = f"{ticks} {beats} {self._stirs} {self._at}"
                self._store.set(str(self.ranks.rank), said)
                if self.ranks.is_main:
                    self._listen(heard, now)
                    quiet = [now - when for _, when in heard.values()]
                    if (now - self._moved if beats else max(quiet)) > self.timeout:
                        self._store.set(_VERDICT, suspects(heard, now, self.timeout / 2))
                if self._store.check([_VERDICT]):
                    self._leave(self._store.get(_VERDICT).decode())
            except RuntimeError:  # the store is rank 0's: it hangs, or the run is at its end
                if not self._over.wait(self.timeout) and self._beats == beats:
                    self._leave("rank 0 does not answer")
                return

    def _listen(self, heard: dict[int, tuple[str, float]], now: float) -> None:
        """Note what each rank said last, when it was new, and when one last moved."""
        for rank in range(self.ranks.size):
            said = self._store.get(str(rank)).decode() if self._store.check([str(rank)]) else ""
            before, _ = heard.get(rank, ("", now))
            if said.split(" ")[1:] != before.split(" ")[1:]:
                self._moved = now
            if rank not in heard or before != said:
                heard[rank] = (said, now)

    def _leave(self, why: str) -> NoReturn:
        if self.ranks.is_main or why.startswith("rank 0 "):
            print(
                f"attamba: error: nothing has moved for {self.timeout:g} seconds "
                f"(parallel.hang_timeout): {why}. The same command goes on from the last "
                f"checkpoint",
                file=sys.stderr,
                flush=True,
            )
        if self.ranks.is_main:
            time.sleep(self.timeout / 4)  # the others read the verdict here
        # The main thread is stuck in a collective that nothing can wake.
        os._exit(HANG)


def suspects(heard: dict[int, tuple[str, float]], now: float, silence: float) -> str:
    """Who hangs, in words: ranks that said nothing new for `silence` seconds, or else those behind.

    heard: of each rank "<ticks> <beats> <stirs> <place>" and when that was new.
    """
    silent = [rank for rank, (_, when) in sorted(heard.items()) if now - when > silence]
    if silent:
        return f"{_ranks(silent)} {_does(silent)} not answer (stopped, killed or cut off)"
    said = {rank: text.split(" ", 3) for rank, (text, _) in heard.items() if text}
    absent = sorted(set(heard) - set(said))
    if absent:
        return f"{_ranks(absent)} never began"
    least = min(int(beats) for _, beats, _, _ in said.values())
    behind = [rank for rank, (_, beats, _, _) in sorted(said.items()) if int(beats) == least]
    if len(behind) == len(said):
        return f"all ranks wait at {said[behind[0]][3]}"
    return f"{_ranks(behind)} {_does(behind)} not go on, at {said[behind[0]][3]}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _does(ranks: list[int]) -> str:
    return "do" if len(ranks) > 1 else "does"


def _own_store(ranks: Ranks, timeout: float) -> dist.Store:
    """A store of our own at rank 0: torch's may be held by a collective that waits."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    limit = timedelta(seconds=max(timeout / 2, 1.0))
    kept: list[dist.TCPStore] = []

    def serve() -> int:
        kept.append(dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit))
        return kept[0].port

    port = ranks.on_main(serve)
    return kept[0] if kept else dist.TCPStore(host, port, is_master=False, timeout=limit)
