"""What a run trains and validates on, from a RunConfig."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from attamba.config import ConfigError, DataConfig, RunConfig
from attamba.data import (
    Batch,
    Batches,
    DataError,
    TokenDataset,
    Tokenizer,
    is_prepared,
    load_tokenizer,
    prepare,
)
from attamba.data.generated import GeneratedRows, make_task

Say = Callable[[str], None]


class Rows(Protocol):
    """Rows of tokens in an order that is a pure function of (seed, step)."""

    @property
    def n_windows(self) -> int:
        """Rows that rows() can give."""

    def batch(self, step: int) -> Batch:
        """The rows of a training step."""

    def rows(self, windows: Sequence[int]) -> Batch:
        """The given rows."""


@dataclass(frozen=True)
class RankRows:
    """What one of n ranks trains on: of each step's B rows, B / n from the (rank * B / n)-th on.

    rows: of batches of B / n rows, whose order therefore does not depend on n.
    """

    all: Rows
    rank: int
    n: int

    @property
    def n_windows(self) -> int:
        """Rows that rows() can give."""
        return self.all.n_windows

    def batch(self, step: int) -> Batch:
        """This rank's rows of a training step."""
        return self.all.batch(step * self.n + self.rank)

    def rows(self, windows: Sequence[int]) -> Batch:
        """The given rows."""
        return self.all.rows(windows)


@dataclass(frozen=True)
class Sources:
    """Rows of a run."""

    train: Rows
    valid: Rows | None
    """None where nothing is held out."""
    tokenizer: Tokenizer
    fingerprints: dict[str, str | None]
    """Of the tokenizer and of the tokens of train and valid; equal for equal data."""

    def valid_windows(self, rows: int) -> list[int]:
        """Up to `rows` windows, spread evenly over the validation text: always the same."""
        if self.valid is None:
            return []
        n = self.valid.n_windows
        rows = min(rows, n)
        return [i * n // rows for i in range(rows)]

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """By the mean bytes per token of the validation data; None for rows that are no text."""
        if not isinstance(self.valid, Batches):
            return None
        dataset = self.valid.dataset
        return nats_per_token / math.log(2) * dataset.n_tokens / dataset.n_bytes


def open_sources(
    config: RunConfig, run_dir: Path, *, fresh: bool, say: Say, share: tuple[int, int] = (0, 1)
) -> Sources:
    """Open prepared folders; prepare text into <run_dir>/data first.

    fresh: prepare text even if that was done before. A resumed run (false) goes on with the tokens
        that it began with, whatever became of the text.
    say: told what is being prepared.
    share: (rank, n) gives the rank's rows alone of each training step.

    Raises ConfigError for data.train unset, a vocabulary larger than the model's, validation data
    of another tokenizer; DataError for data that cannot be read or is too short for seq_len.
    """
    data = config.data
    if data.generate is not None:
        return _generated(config, share)
    if not data.train:
        raise ConfigError(
            "data.train is not set; give text files or folders, or a folder made by "
            "`attamba data prepare`"
        )
    train = _open(
        data.train,
        "data.train",
        run_dir / "data" / "train",
        lambda: load_tokenizer(data.tokenizer),
        fresh=fresh,
        say=say,
    )
    if train.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary of "
            f"{train.folder}, {train.vocab_size}; set model.vocab_size={train.vocab_size} or more"
        )
    valid = None
    if data.valid:
        valid = _open(
            data.valid,
            "data.valid",
            run_dir / "data" / "valid",
            lambda: train.tokenizer,
            fresh=fresh,
            say=say,
        )
        if valid.fingerprint != train.fingerprint:
            raise ConfigError(
                f"data.valid: {valid.folder} was made with another tokenizer than {train.folder}; "
                f"prepare both with one"
            )
    return Sources(
        train=_training_rows(config, train, 1.0 if valid else 1.0 - data.valid_fraction, share),
        valid=_validation_rows(data, train, valid),
        tokenizer=train.tokenizer,
        fingerprints={
            "tokenizer": train.fingerprint,
            "train": _fingerprint(train),
            "valid": _fingerprint(valid) if valid else None,
        },
    )


def _generated(config: RunConfig, share: tuple[int, int]) -> Sources:
    """Rows of a task that makes its own."""
    data = config.data
    assert data.generate is not None
    task = make_task(data.generate)
    if task.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than what data.generate needs; "
            f"set model.vocab_size={task.vocab_size} or more"
        )
    tokenizer = load_tokenizer("bytes")
    made = json.dumps([data.generate, data.seq_len], sort_keys=True).encode()
    digest = hashlib.sha256(made).hexdigest()
    return Sources(
        train=_shared(
            GeneratedRows(task, data.seq_len, data.batch_size // share[1], config.train.seed), share
        ),
        valid=GeneratedRows(task, data.seq_len, 1, config.train.seed, held_out=True),
        tokenizer=tokenizer,
        fingerprints={"tokenizer": tokenizer.fingerprint, "train": digest, "valid": digest},
    )


def _open(
    given: str | list[str],
    key: str,
    prepared: Path,
    tokenizer: Callable[[], Tokenizer],
    *,
    fresh: bool,
    say: Say,
) -> TokenDataset:
    paths = [given] if isinstance(given, str) else given
    ready = [path for path in paths if is_prepared(path)]
    if ready and len(paths) > 1:
        raise ConfigError(
            f"{key}: {ready[0]} is a prepared folder, which must be given alone; prepare all texts "
            f"into one folder"
        )
    if ready:
        return TokenDataset.open(ready[0])
    if not fresh and is_prepared(prepared):
        return TokenDataset.open(prepared)
    say(f"Preparing {', '.join(paths)} ...")
    made_with = tokenizer()
    try:
        dataset = prepare(paths, prepared, made_with)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    say(f"{dataset.n_documents:,} documents, {dataset.n_tokens:,} tokens in {prepared}")
    return dataset


def _training_rows(
    config: RunConfig, dataset: TokenDataset, stop: float, share: tuple[int, int]
) -> Rows:
    rows = Batches(
        dataset,
        seq_len=config.data.seq_len,
        batch_size=config.data.batch_size // share[1],
        seed=config.train.seed,
        stop=stop,
    )
    return _shared(rows, share)


def _shared(rows: Rows, share: tuple[int, int]) -> Rows:
    return rows if share[1] == 1 else RankRows(rows, *share)


def _validation_rows(
    data: DataConfig, train: TokenDataset, valid: TokenDataset | None
) -> Batches | None:
    if valid is not None:
        return Batches(valid, seq_len=data.seq_len, batch_size=1, seed=0)
    if data.valid_fraction == 0:
        return None
    try:
        return Batches(
            train, seq_len=data.seq_len, batch_size=1, seed=0, start=1.0 - data.valid_fraction
        )
    except DataError as error:
        raise ConfigError(
            f"data.valid_fraction={data.valid_fraction} holds out too little for one row: {error}; "
            f"or set data.valid_fraction=0 for no validation"
        ) from error


def _fingerprint(dataset: TokenDataset) -> str:
    """SHA-256 over the names and contents of the files with tokens and document boundaries."""
    files = {
        name: dataset.manifest["files"][name]["sha256"]
        for shard in dataset.manifest["shards"]
        for name in (shard["tokens"], shard["documents"])
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
