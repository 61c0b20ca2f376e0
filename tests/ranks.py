"""Work on several ranks, in processes of their own, as torchrun would start them."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from queue import Empty
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    # torch._dynamo is what AdamW's first step would import, in each process anew; pytest is what
    # the module would import that has the work.
    ["attamba.train", "attamba.train.sharded", "torch.distributed.fsdp", "torch._dynamo", "pytest"]
)
OF_GPUS = multiprocessing.get_context("spawn")
"""A fork of a process that has looked for CUDA devices cannot use them."""
NCCL = "cpu:gloo,cuda:nccl"
"""The backend of ranks that have a GPU each."""


_STARTS = itertools.count()


class Failed(Exception):
    """A rank raised; the text begins with the error's class and message."""


def on_ranks(
    n: int, work: Callable[..., Any], *args: Any, timeout: float = 60, backend: str = "gloo"
) -> list[Any]:
    """What `work(*args)` returns on each of n ranks. Raises Failed for the first that raised, or
    that ended without a word, and queue.Empty where `timeout` seconds do not suffice.

    work: a function of a module, which the processes import.
    backend: of the process group: gloo or NCCL.
    """
    processes, queue = start_ranks(n, work, *args, backend=backend)
    try:
        outcomes = _outcomes(processes, queue, time.monotonic() + timeout)
        for process in processes:
            process.join(5)
    finally:
        for process in processes:
            process.kill()
    _raise_first(outcomes)
    return [pickle.loads(outcomes[rank]) for rank in range(n)]


def _outcomes(processes: list[Any], queue: Any, deadline: float) -> dict[int, Any]:
    """What every rank put into the queue."""
    outcomes: dict[int, Any] = {}
    while len(outcomes) < len(processes):
        ended = [rank for rank, process in enumerate(processes) if process.exitcode is not None]
        try:
            rank, outcome = queue.get(timeout=1)
            outcomes[rank] = outcome
        except Empty:
            # Those that had ended before this wait put nothing into the queue.
            silent = [rank for rank in ended if rank not in outcomes]
            late = time.monotonic() > deadline
            if silent or late:
                _raise_first(outcomes)  # which may be why the others are silent
            if silent:
                code = processes[silent[0]].exitcode
                raise Failed(f"rank {silent[0]} ended, exit code {code}") from None
            if late:
                raise
    return outcomes


def _raise_first(outcomes: dict[int, Any]) -> None:
    """Raise Failed for the first rank that raised, if one did: the others fail because of it."""
    for outcome in outcomes.values():  # as they came
        if isinstance(outcome, str):
            raise Failed(outcome)


def start_ranks(
    n: int, work: Callable[..., Any], *args: Any, backend: str = "gloo"
) -> tuple[list[Any], Any]:
    """The processes of n ranks, begun, and the queue of their outcomes."""
    context: Any = CONTEXT if backend == "gloo" else OF_GPUS
    queue = context.Queue()
    meeting = (_store().port, f"start {next(_STARTS)}")
    processes = [
        context.Process(
            target=_be_rank, args=(rank, n, meeting, backend, queue, work, args), daemon=True
        )
        for rank in range(n)
    ]
    for process in processes:
        process.start()
    return processes, queue


@functools.cache
def _store() -> Any:
    """Where ranks find one another: in this process, as torchrun's agent has it. Were it in rank 0,
    the others could not finish meeting once rank 0 has ended."""
    from torch.distributed import TCPStore

    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def in_meshes(configs: list[Any], work: Callable[[Any, Any], Any]) -> list[Any]:
    """`work(config, ranks)` for each configuration, by the ranks of its own mesh."""
    from attamba.train.distributed import open_ranks

    found = []
    for config in configs:
        with open_ranks(config) as ranks:
            found.append(work(config, ranks))
    return found


def train_until(
    config: Any, step: int | None = None, at_step: Callable[[], Any] = lambda: None
) -> list[dict[str, Any]]:
    """Train by `step` steps, or to the end; the metrics without times, on rank 0, if it came there.

    Runs on one rank, or on all those that there are. at_step: called after each step.
    """
    from attamba.train import TrainingInterrupted, train

    asked: list[int] = []

    def should_stop() -> bool:
        at_step()
        asked.append(1)
        return len(asked) == step

    try:
        metrics = train(config, should_stop=should_stop).metrics
    except TrainingInterrupted:
        return []
    keep = ("kind", "step", "tokens", "loss", "grad_norm", "lr", "valid_loss")
    return [{key: record[key] for key in keep if key in record} for record in metrics]


def _be_rank(
    rank: int,
    n: int,
    meeting: tuple[int, str],
    backend: str,
    queue: Any,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    port, start = meeting
    try:
        # NCCL ends a process that has waited so long, be it for a rank that compiles.
        limit = timedelta(seconds=60 if backend == "gloo" else 240)
        store = dist.PrefixStore(start, dist.TCPStore("localhost", port, timeout=limit))
        dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=limit)
        # One that ended at once would break the meeting of those that are still connecting.
        store.set(f"met {rank}", "")
        store.wait([f"met {other}" for other in range(n)], limit)
        queue.put((rank, pickle.dumps(work(*args))))  # a queue would share a tensor's memory
    except BaseException as error:
        queue.put((rank, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        queue.close()
        queue.join_thread()
        os._exit(1)  # as the command does: threads may wait for other ranks
    if backend == NCCL:
        dist.destroy_process_group()  # or it would be missed, and wait, where the process ends
