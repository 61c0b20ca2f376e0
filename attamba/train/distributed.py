"""The ranks of a run: who they are, what they agree on. A run without torchrun has one.

The environment is torchrun's: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. A process
group that exists already is used as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from attamba.config import ConfigError, ParallelConfig, RunConfig
from attamba.models.parts import check_parts
from attamba.train.run_folder import lock
from attamba.train.runtime import resolve_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

DIMENSIONS = ("replicate", "shard", "context", "tensor")
"""Of the mesh. Neighbours in the last ones talk most, and are on one machine."""

GRACE = 120.0
"""Seconds by which a collective may outlast hang_timeout: the watchdog comes first, and names."""


class RankLost(RuntimeError):
    """Another rank has ended in the middle of what this one does with it."""


def is_lost(error: RuntimeError) -> bool:
    """Does an error of a collective say that another rank is gone?"""
    return isinstance(error, dist.DistError) or "by peer" in str(error)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. The default is a process alone."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """Dimensions "replicate", "shard", "context" and "tensor"; None for a process alone."""

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): this rank's are the i-th of n equal parts of a batch's rows.

        Ranks along "context" and "tensor" work on the same rows.
        """
        if self.mesh is None:
            return 0, 1
        together = self.mesh["context"].size() * self.mesh["tensor"].size()
        return self.rank // together, self.size // together

    @property
    def is_main(self) -> bool:
        """Does this rank speak and write for all?"""
        return self.rank == 0

    @cached_property
    def control(self) -> Any:
        """Group for objects and flags, on the CPU. Made by all ranks at once.

        It waits long, for rank 0 may have texts to prepare; in the loop the watchdog looks out.
        """
        return dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; so too the error that it raises."""
        if self.alone:
            return work()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = work()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.control)
        if box[1] is not None:
            raise self._from(0, box[1])
        return box[0]

    def on_each(self, work: Callable[[], T]) -> T:
        """`work` on every rank. If it fails on any, all raise that error (the first rank's)."""
        if self.alone:
            return work()
        result: Any = None
        failed: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failed = error
        errors: list[Exception | None] = [None] * self.size
        dist.all_gather_object(errors, failed, group=self.control)
        for rank, found in enumerate(errors):
            if found is not None:
                raise failed if rank == self.rank and failed else self._from(rank, found)
        return result

    def _from(self, rank: int, error: Exception) -> Exception:
        """Another rank's error, marked so that it is told once, by that rank."""
        error.is_echo = rank != self.rank  # type: ignore[attr-defined]
        return error

    def main_first(self, work: Callable[[], T]) -> T:
        """`work` on rank 0 and, when that is done, on the others, which find what it made."""
        kept: list[T] = []
        self.on_main(lambda: kept.append(work()))
        return self.on_each(lambda: kept[0] if kept else work())

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on its device; `value` itself is changed."""
        if not self.alone:
            dist.all_reduce(value)
        return value

    def most(self, value: Tensor) -> Tensor:
        """The largest of a tensor over all ranks, on its device; `value` itself is changed."""
        if not self.alone:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def count(self, value: int) -> int:
        """The sum of a number over all ranks."""
        if self.alone:
            return value
        total = torch.tensor(value)
        dist.all_reduce(total, group=self.control)
        return int(total)

    def largest(self, value: int) -> int:
        """The largest of a number over all ranks."""
        if self.alone:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return int(found)


def world_size() -> int:
    """How many ranks were started."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def open_ranks(config: RunConfig) -> Iterator[Ranks]:
    """The ranks that were started, with the mesh that config.parallel asks for.

    Raises ConfigError where the mesh does not fit their number, the batch does not divide, or
    there is no such device.
    """
    size = world_size()
    sizes = check_ranks(config, size)
    if size == 1:
        yield Ranks(resolve_device(config.train.device, "train.device"))
        return
    from torch.distributed.device_mesh import init_device_mesh

    device = device_of_rank(config.train.device)
    with ExitStack() as opened:
        if not dist.is_initialized():
            _open_group(device, timedelta(seconds=config.parallel.hang_timeout + GRACE))
            opened.callback(dist.destroy_process_group)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=DIMENSIONS)
        ranks = Ranks(device, dist.get_rank(), size, mesh)
        assert ranks.control is not None  # made here, where all ranks pass at once
        yield ranks


def _open_group(device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        dist.init_process_group(backend, timeout=timeout)
        return
    # The store of torchrun outlives its restarts, and init_process_group alone may read from it
    # where the ranks of before were listening (torch 2.13).
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, size, is_master=False, timeout=timeout)
    attempt = f"attamba-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(attempt, store),
        rank=rank,
        world_size=size,
        timeout=timeout,
    )


def check_ranks(config: RunConfig, size: int) -> tuple[int, int, int, int]:
    """Sizes of the mesh for `size` ranks. Raises ConfigError where they cannot share the run."""
    replicate, shard, context, tensor = sizes = mesh_sizes(config.parallel, size)
    _check_batch(config, replicate * shard)
    check_parts(config.model, config.data.seq_len, context=context, tensor=tensor)
    return sizes


def mesh_sizes(config: ParallelConfig, size: int) -> tuple[int, int, int, int]:
    """Of DIMENSIONS, for `size` ranks. Raises ConfigError where they do not fit."""
    others = config.replicate * config.context * config.tensor
    shard = config.shard
    if shard == -1:
        shard = max(1, size // others)
    asked = others * shard
    if asked != size:
        start = f"torchrun --nproc-per-node {asked} --no-python attamba train ..."
        named = [name for name in DIMENSIONS[2:] if getattr(config, name) > 1]
        keys = ["replicate", "shard", *named]
        told = ", ".join(f"parallel.{name}={getattr(config, name)}" for name in keys)
        divisor = f"a product of {' and '.join(['parallel.replicate', *named])}"
        raise ConfigError(
            f"{told} ask for {asked} "
            f"ranks, and there {'is 1' if size == 1 else f'are {size}'}; start it with `{start}`, "
            f"or set parallel.shard=-1 and {divisor if named else 'a parallel.replicate'} "
            f"that divides their number"
        )
    return config.replicate, shard, config.context, config.tensor


def _check_batch(config: RunConfig, shares: int) -> None:
    parts = shares * config.train.accumulate
    if config.data.batch_size % parts:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} cannot be divided among {shares} ranks in "
            f"train.accumulate={config.train.accumulate} parts each; make it a multiple of {parts}"
        )


def device_of_rank(name: str) -> torch.device:
    """auto and cuda: the GPU of this rank's number on its machine, or the one that it is shown."""
    device = resolve_device(name, "train.device")
    if device.type != "cuda":
        return device
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0))
    seen = torch.cuda.device_count()
    if seen == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return torch.device("cuda", 0)  # launchers may show each rank a GPU of its own
    if local >= seen:
        raise ConfigError(
            f"LOCAL_RANK={local}: torch sees {seen} CUDA devices here; start at most one rank for "
            f"each, or set train.device=cpu"
        )
    return torch.device("cuda", local)


@contextmanager
def lock_for_all(ranks: Ranks, run_dir: Path) -> Iterator[None]:
    """Rank 0 holds the run's folder for all; every rank raises what run_folder.lock raises."""
    with ExitStack() as held:
        ranks.on_main(lambda: held.enter_context(lock(run_dir)))
        ranks.on_each(lambda: _check_shared(run_dir))
        yield


def _check_shared(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise ConfigError(
            f"out={run_dir} is not there on every machine; set out to a folder that all share"
        )
