"""Checkpoints of several ranks: each writes its part, in the background.

In the place of model.safetensors and optimizer.safetensors (see checkpoint.py) the folder holds

    shards/*.safetensors    of each rank: parameters as "model.<name>", AdamW's state as
                            "optimizer.<name>.<exp_avg, exp_avg_sq or step>"

written by torch.distributed.checkpoint with the place of each piece in the file's header, so that
any number of ranks can read them, and nothing is a pickle.
"""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from attamba.data.files import sync
from attamba.train.distributed import Ranks
from attamba.train.optim import STATE, named_tensors, optimizer_tensors, restore_optimizer
from attamba.train.storage import (
    SHARDS,
    CheckpointError,
    cannot_save,
    entry,
    remedy,
    remove_old,
    seal,
)


class Saver:
    """Writes sharded checkpoints while training goes on. Made by all ranks at once.

    keep: the last so many stay. A checkpoint has its name only when it is whole and sealed. When
    one cannot be written, the next call of save or wait raises CheckpointError on every rank.
    stir: called, where that is waited for, as often as the writing has got on.
    """

    def __init__(self, ranks: Ranks, run_dir: Path, keep: int, stir: Callable[[], None]) -> None:
        self.ranks, self.folder, self.keep = ranks, run_dir / "checkpoints", keep
        self._stir = stir
        self._aside, self._hashed = self.folder, 0
        # Of its own: training's collectives go on at the same time.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self._thread: threading.Thread | None = None
        self._failed: Exception | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        write_rest: Callable[[Path], None],
    ) -> None:
        """Copy the tensors now, write them in the background; an earlier writing is waited for.

        write_rest: puts the small files into the folder that it is given; called on rank 0 alone.
        """
        self.wait()
        name = f"step-{step:08d}"
        aside = self.folder / f".tmp-{name}"
        try:
            self.ranks.on_main(lambda: _begin(aside, self.folder / name, write_rest))
            self.ranks.on_each(lambda: sync(aside / SHARDS))  # each sees the folder
        except OSError as error:
            failed = CheckpointError(cannot_save(self.folder / name, error))
            failed.is_echo = getattr(error, "is_echo", False)  # type: ignore[attr-defined]
            raise failed from error
        writer = HuggingFaceStorageWriter(str(aside / SHARDS), save_distributed=True)
        written = dcp.async_save(
            tensors_of(model, optimizer), storage_writer=writer, process_group=self._group
        )
        self._aside = aside
        self._thread = threading.Thread(target=self._finish, args=(written, aside, step))
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is whole. Raises CheckpointError if it could not be written."""
        if self._thread is not None:
            before = None
            while self._thread.is_alive():
                self._thread.join(0.2)
                if (now := self._come()) != before:
                    before = now
                    self._stir()
            self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _come(self) -> tuple[int, int]:
        """How far the writing has come: bytes that all ranks have written, blocks hashed here."""
        sizes = []
        for path in (self._aside / SHARDS).glob("*"):
            with suppress(FileNotFoundError):  # renamed meanwhile
                sizes.append(path.stat().st_size)
        return sum(sizes), self._hashed

    def _hashed_block(self) -> None:
        self._hashed += 1

    def _finish(self, written: Any, aside: Path, step: int) -> None:
        """In the background: hash, seal and publish what was written."""
        name = aside.name.removeprefix(".tmp-")
        outcome: list[Exception | None] = [None]
        try:
            entries = self._gather(self._written(written, aside))
            if self.ranks.is_main:
                self._publish(aside, name, step, entries)
        except Exception as failed:
            outcome = [failed]
            if self.ranks.is_main:
                shutil.rmtree(aside, ignore_errors=True)
        self._tell(name, outcome)

    def _written(self, written: Any, aside: Path) -> dict[str, Any] | Exception:
        """Manifest entries of this rank's files, or why there are none."""
        try:
            getattr(written, "upload_completion", written).result()
            return self._hash(aside)
        except CheckpointException as failed:
            error = _first_failure(failed)
            return error if isinstance(error, Exception) else RuntimeError(str(error))
        except Exception as error:
            return error

    def _gather(self, mine: dict[str, Any] | Exception) -> dict[str, Any]:
        """The entries of all ranks. Raises the error of the first that has one."""
        everyone: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(everyone, mine, group=self._group)
        entries: dict[str, Any] = {}
        for part in everyone:
            if isinstance(part, Exception):
                raise part
            entries.update(part)
        return entries

    def _tell(self, name: str, outcome: list[Any]) -> None:
        """Rank 0 tells all whether the checkpoint stands."""
        try:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
            is_echo = not self.ranks.is_main
        except RuntimeError as lost:  # a rank is gone, and with it the run
            outcome, is_echo = [lost], False
        if outcome[0] is not None:
            self._failed = CheckpointError(cannot_save(self.folder / name, outcome[0]))
            self._failed.is_echo = is_echo  # type: ignore[attr-defined]

    def _hash(self, aside: Path) -> dict[str, Any]:
        """Manifest entries of this rank's files, which are on the disk then."""
        prefix = f"shard-{self.ranks.rank + 1:05d}-"
        files = [path for path in (aside / SHARDS).iterdir() if path.name.startswith(prefix)]
        for path in files:
            sync(path)
        return {f"{SHARDS}/{path.name}": entry(path, self._hashed_block) for path in files}

    def _publish(self, aside: Path, name: str, step: int, known: dict[str, Any]) -> None:
        seal(aside, known, step=step)
        os.rename(aside, self.folder / name)
        sync(self.folder)
        remove_old(self.folder.parent, self.keep)


def _begin(aside: Path, final: Path, write_rest: Callable[[Path], None]) -> None:
    if final.exists():
        raise CheckpointError(f"{final} exists already; delete it or save into another folder")
    if aside.exists():  # of a saving that failed
        shutil.rmtree(aside)
    (aside / SHARDS).mkdir(parents=True)
    write_rest(aside)


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What is saved, by name in the files: the tensors themselves."""
    state = {f"optimizer.{k}": v for k, v in optimizer_tensors(optimizer, model).items()}
    return {f"model.{k}": v.detach() for k, v in named_tensors(model).items()} | state


def restore_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a sharded checkpoint into a sharded model and its fresh optimizer, on all ranks at once.

    Each rank reads the pieces that it needs, whatever mesh wrote them. Raises CheckpointError for
    tensors that are missing or do not fit.
    """
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    with _told(folder):
        saved = {name: found.size for name, found in _metadata(reader).items()}
    tensors = tensors_of(model, optimizer)
    for name, parameter in model.named_parameters():
        if f"optimizer.{name}.{STATE[0]}" in saved:
            for key in STATE[1:]:
                tensors[f"optimizer.{name}.{key}"] = torch.zeros_like(parameter.detach())
            tensors[f"optimizer.{name}.{STATE[0]}"] = torch.zeros(())
    for name in [*tensors, *(name for name in saved if name not in tensors)]:
        if name not in saved or name not in tensors or saved[name] != tensors[name].shape:
            raise CheckpointError(
                f"tensor {name} of {folder / SHARDS} does not fit the model; {remedy(folder)}"
            )
    with _told(folder):
        dcp.load(tensors, storage_reader=reader)
    state = {
        name.removeprefix("optimizer."): tensor
        for name, tensor in tensors.items()
        if name.startswith("optimizer.")
    }
    restore_optimizer(optimizer, model, state)


def read_shards(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Whole tensors of a sharded checkpoint whose names begin so, on the CPU, without the prefix.

    prefix: "model." or "optimizer.". Needs no ranks.
    """
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    tensors = {
        name: torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in _metadata(reader).items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings(), _told(folder):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What keeps shards from being read becomes a CheckpointError; Ctrl-C and signals stay."""
    try:
        yield
    except (CheckpointException, OSError) as failed:
        error: BaseException = failed
        if isinstance(failed, CheckpointException):
            error = _first_failure(failed)
        if isinstance(error, KeyboardInterrupt):
            raise error from None
        told = CheckpointError(
            f"cannot read {folder / SHARDS}: {error}. If that may pass, the same command goes on; "
            f"if not, {remedy(folder)}"
        )
        told.may_pass = True  # type: ignore[attr-defined]
        raise told from failed


def _first_failure(failed: CheckpointException) -> BaseException:
    """Of the ranks that failed, the first one's error; one that was told to leave comes before.

    torch.distributed.checkpoint raises them together, as a BaseException that is no Exception.
    """
    errors = [failed.failures[rank][0] for rank in sorted(failed.failures)]
    return next((e for e in errors if isinstance(e, KeyboardInterrupt)), errors[0])


def _metadata(reader: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    found = reader.read_metadata().state_dict_metadata
    return {
        name: saved for name, saved in found.items() if isinstance(saved, TensorStorageMetadata)
    }
