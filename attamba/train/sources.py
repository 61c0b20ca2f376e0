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
    MixedBatches,
    MixedHeldOut,
    OrderedRows,
    PackedBatches,
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
        if not isinstance(self.valid, (OrderedRows, MixedHeldOut)):
            return None
        return nats_per_token / math.log(2) / self.valid.bytes_per_token


def open_sources(
    config: RunConfig, run_dir: Path, *, fresh: bool, say: Say, share: tuple[int, int] = (0, 1)
) -> Sources:
    """Open prepared folders; prepare text into <run_dir>/data first.

    config: one that checks.check_run found nothing wrong with.
    fresh: prepare text even if that was done before. A resumed run (false) goes on with the tokens
        that it began with, whatever became of the text.
    say: told what is being prepared.
    share: (rank, n) gives the rank's rows alone of each training step.

    Raises ConfigError for a vocabulary larger than the model's and data of several tokenizers;
    DataError for data that cannot be read or is too short for seq_len.
    """
    data = config.data
    if data.generate is not None:
        return _generated(config, share)
    texts = _Texts(config, run_dir, fresh=fresh, say=say, is_first=share[0] == 0)
    trained = texts.open_all()
    tokenizer = trained[0].tokenizer
    valid = texts.open_valid(trained[0]) if data.valid else None
    return Sources(
        train=_shared(_training_rows(config, trained, valid is None, share[1]), share),
        valid=_validation_rows(data, trained, valid),
        tokenizer=tokenizer,
        fingerprints={
            "tokenizer": trained[0].fingerprint,
            "train": _fingerprint_of_all(trained, [source.weight for source in data.sources]),
            "valid": fingerprint(valid) if valid else None,
        },
    )


def _generated(config: RunConfig, share: tuple[int, int]) -> Sources:
    """Rows of a task that makes its own."""
    data = config.data
    assert data.generate is not None
    task = make_task(data.generate)
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


@dataclass(frozen=True)
class _Texts:
    """Opens what the configuration names, preparing it where it is text."""

    config: RunConfig
    run_dir: Path
    fresh: bool
    say: Say
    is_first: bool
    """Of the ranks: the one that reads files to compare their checksums."""

    def open_all(self) -> list[TokenDataset]:
        """What is trained on: one data set, or that of each source."""
        data = self.config.data
        trained: list[TokenDataset] = []
        for i, path in enumerate(data.training_paths()):
            key = f"data.sources.{i}.path" if data.sources else "data.train"
            name = f"source-{i}" if data.sources else "train"
            dataset = self._open(path, key, name, trained[0] if trained else None)
            size = self.config.model.vocab_size
            if dataset.vocab_size > size:
                raise ConfigError(
                    f"model.vocab_size={size} is smaller than the vocabulary of {dataset.folder}, "
                    f"{dataset.vocab_size}; set model.vocab_size={dataset.vocab_size} or more"
                )
            trained.append(dataset)
        return trained

    def open_valid(self, train: TokenDataset) -> TokenDataset:
        assert self.config.data.valid
        return self._open(self.config.data.valid, "data.valid", "valid", train)

    def _open(
        self, given: str | list[str], key: str, name: str, like: TokenDataset | None
    ) -> TokenDataset:
        """like: what must have been made with the same tokenizer."""
        dataset = self._find(given, key, self.run_dir / "data" / name, like)
        if like is not None and dataset.fingerprint != like.fingerprint:
            raise ConfigError(
                f"{key}: {dataset.folder} was made with another tokenizer than {like.folder}; "
                f"prepare both with one"
            )
        if self.config.data.verify and self.is_first:
            self.say(f"Comparing the checksums of {dataset.folder} ...")
            dataset.verify()
        return dataset

    def _find(
        self, given: str | list[str], key: str, prepared: Path, like: TokenDataset | None
    ) -> TokenDataset:
        paths = [given] if isinstance(given, str) else given
        try:
            ready = [path for path in paths if is_prepared(path)]
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
        if ready and len(paths) > 1:
            raise ConfigError(
                f"{key}: {ready[0]} is a prepared folder, which must be given alone; prepare all "
                f"texts into one folder, or name each in data.sources"
            )
        if ready:
            return TokenDataset.open(ready[0])
        if not self.fresh and is_prepared(prepared):
            return TokenDataset.open(prepared)
        self.say(f"Preparing {', '.join(paths)} ...")
        tokenizer = like.tokenizer if like else load_tokenizer(self.config.data.tokenizer)
        try:
            dataset = prepare(paths, prepared, tokenizer)
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
        self.say(f"{dataset.n_documents:,} documents, {dataset.n_tokens:,} tokens in {prepared}")
        return dataset


def _training_rows(config: RunConfig, trained: list[TokenDataset], holds_out: bool, n: int) -> Rows:
    """Rows of 1/n of a step."""
    data, seed = config.data, config.train.seed
    stop = 1.0 - data.valid_fraction if holds_out else 1.0
    size = data.batch_size // n
    rows = [_rows(data, dataset, batch_size=size, seed=seed, stop=stop) for dataset in trained]
    if not data.sources:
        return rows[0]
    weights = [source.weight for source in data.sources]
    return MixedBatches(rows, weights, batch_size=size, seed=seed)


def _rows(
    data: DataConfig,
    dataset: TokenDataset,
    *,
    batch_size: int = 1,
    seed: int = 0,
    start: float = 0.0,
    stop: float = 1.0,
) -> OrderedRows:
    kinds: dict[str, type[OrderedRows]] = {"stream": Batches, "best_fit": PackedBatches}
    return kinds[data.packing](
        dataset, seq_len=data.seq_len, batch_size=batch_size, seed=seed, start=start, stop=stop
    )


def _shared(rows: Rows, share: tuple[int, int]) -> Rows:
    return rows if share[1] == 1 else RankRows(rows, *share)


def _validation_rows(
    data: DataConfig, trained: list[TokenDataset], valid: TokenDataset | None
) -> OrderedRows | MixedHeldOut | None:
    if valid is not None:
        return _rows(data, valid)
    if data.valid_fraction == 0:
        return None
    try:
        rows = [_rows(data, dataset, start=1.0 - data.valid_fraction) for dataset in trained]
    except DataError as error:
        raise ConfigError(
            f"data.valid_fraction={data.valid_fraction} holds out too little for one row: {error}; "
            f"or set data.valid_fraction=0 for no validation"
        ) from error
    if not data.sources:
        return rows[0]
    return MixedHeldOut(rows, [source.weight for source in data.sources])


def _fingerprint_of_all(trained: list[TokenDataset], weights: list[float]) -> str:
    """weights: of the sources, whose order and share count; none for data.train."""
    if not weights:
        return fingerprint(trained[0])
    parts = [[fingerprint(dataset), weight] for dataset, weight in zip(trained, weights)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fingerprint(dataset: TokenDataset) -> str:
    """SHA-256 over the names and contents of the files with tokens and document boundaries."""
    files = {
        name: dataset.manifest["files"][name]["sha256"]
        for shard in dataset.manifest["shards"]
        for name in (shard["tokens"], shard["documents"])
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
