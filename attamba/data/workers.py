"""Parts of the input through threads or processes, in order, until one fails or there is enough."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

from .errors import DataError
from .parts import Part
from .writer import Job, Stopped, Written, write_part

Progress = Callable[[int, int, int], None]

SECONDS = 0.2
"""Between looks at how far the workers are."""
THREADS = 8
"""Workers that are threads of this process, at most: a fourteenth of their work is not the
tokenizer's, and of that only one can be done at a time."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_parts(
    job: Job, parts: Sequence[Part], workers: int, progress: Progress | None
) -> list[Written]:
    """Write the parts: all of them, or so many from the first on as hold job.max_tokens.

    workers: 1: this process, a part at a time, in which the tokenizer uses all cores if it can. Up
        to THREADS, where the tokenizer lets other threads run: threads, which share what it reads
        and its own threads. Else processes; with fewer parts than workers, the tokenizers of the
        processes share the rest.
    progress: told the documents, tokens and bytes of text done since the call.
    """
    if workers == 1:
        return _here(job, parts, progress)
    return _Pool(job, parts, workers, progress).run()


def _enough(job: Job, tokens: int) -> bool:
    return job.max_tokens is not None and tokens >= job.max_tokens


class _Here:
    """Control of a worker that is this process."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._done = (0, 0, 0)

    def add(self, documents: int, tokens: int, n_bytes: int) -> None:
        d, t, b = self._done
        self._done = (d + documents, t + tokens, b + n_bytes)
        if self._progress:
            self._progress(*self._done)

    def check(self) -> None:
        """Nothing stops this process but an exception."""


def _here(job: Job, parts: Sequence[Part], progress: Progress | None) -> list[Written]:
    control = _Here(progress)
    done: list[Written] = []
    for number, part in enumerate(parts):
        if _enough(job, sum(written.n_tokens for written in done)):
            break
        done.append(write_part(job, number, part, control))
    return done


class _Pool:
    """Threads or processes that write parts."""

    def __init__(
        self, job: Job, parts: Sequence[Part], workers: int, progress: Progress | None
    ) -> None:
        self.job, self.parts, self.progress = job, parts, progress
        n = max(1, min(workers, len(parts)))
        self.counts: Any
        self.stop: Any
        self.work: Callable[[int, Part], Written]
        self.pool: Executor
        if job.tokenizer.frees_threads and workers <= THREADS:
            self.counts, self.stop = _Counts(), threading.Event()
            self.work = partial(write_part, job, control=_Worker(self.counts, self.stop))
            self.pool = ThreadPoolExecutor(n)
        else:
            # Not fork: threads of this process (torch's, a tokenizer's) would not come along.
            context = multiprocessing.get_context("spawn")
            self.counts, self.stop = context.Array("q", 3), context.Event()
            self.work = _work
            self.pool = ProcessPoolExecutor(
                n,
                mp_context=context,
                initializer=_begin,
                initargs=(self.counts, self.stop, workers // n, pickle.dumps(job)),
            )

    def run(self) -> list[Written]:
        try:
            futures = [
                self.pool.submit(self.work, number, part) for number, part in enumerate(self.parts)
            ]
            return self._collect(futures)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker ended without a word: it was killed, perhaps for want of memory; the "
                "same command goes on from whole shards (fewer workers need less memory)"
            ) from error
        finally:
            self.stop.set()
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _collect(self, futures: list[Future[Written]]) -> list[Written]:
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()  # raises what went wrong there
            if self.progress:
                self.progress(*self.counts[:])
            first = list(_prefix(self.job, futures))
            if _enough(self.job, sum(written.n_tokens for written in first)):
                return first
        return [future.result() for future in futures]


def _prefix(job: Job, futures: list[Future[Written]]) -> Iterator[Written]:
    """Parts from the first on that are done, as many as there must be."""
    limit = math.inf if job.max_tokens is None else job.max_tokens
    tokens = 0
    for future in futures:
        if tokens >= limit or not future.done():
            return
        yield future.result()
        tokens += future.result().n_tokens


class _Counts(list[int]):
    """To threads what multiprocessing's array is to processes: three numbers and a lock."""

    def __init__(self) -> None:
        super().__init__([0, 0, 0])
        self._lock = threading.Lock()

    def get_lock(self) -> threading.Lock:
        return self._lock


class _Worker:
    """Control of a worker that is a thread or another process."""

    def __init__(self, counts: Any, stop: Any) -> None:
        self._counts, self._stop = counts, stop

    def add(self, documents: int, tokens: int, n_bytes: int) -> None:
        with self._counts.get_lock():
            for i, more in enumerate((documents, tokens, n_bytes)):
                self._counts[i] += more

    def check(self) -> None:
        if self._stop.is_set():
            raise Stopped


# In a worker that is a process

_control: Any = None
_job: Any = None


def _begin(counts: Any, stop: Any, threads: int, job: bytes) -> None:
    global _control, _job
    # Ctrl-C goes to the whole group; the process that waits for this one tells it to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Read by the tokenizers' library when it is first used, that is below.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    _control, _job = _Worker(counts, stop), pickle.loads(job)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(number: int, part: Part) -> Written:
    return write_part(_job, number, part, _control)
