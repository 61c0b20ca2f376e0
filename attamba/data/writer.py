"""One part of the input to shards, and how far it came: what a worker of `prepare` does.

In the folder that is being prepared, part 3 has the shards tokens-00003-000.bin, ... and the file
part-00003.json, which is written anew after each shard. A shard counts once it stands there; what a
worker was writing when it was killed does not, and is written again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from .errors import DataError
from .files import naming, sha256, sync, write_aside
from .parts import Part, Reading, Record
from .pieces import batched, cut
from .shards import DOCUMENT, token_dtype
from .tokenizer import Tokenizer

WHOLE = "whole shards"
"""What a preparation goes on from."""


@dataclass(frozen=True)
class Job:
    """What all parts have in common."""

    folder: Path
    tokenizer: Tokenizer
    shard_tokens: int
    skip_bad: bool
    max_tokens: int | None
    sources: list[str]


class Control(Protocol):
    """The line between a worker and those who wait for it."""

    def add(self, documents: int, tokens: int, n_bytes: int) -> None:
        """So much more is done."""

    def check(self) -> None:
        """Raise Stopped if nobody needs the rest."""


class Stopped(Exception):
    """Another part failed, or there is enough."""


@dataclass
class Place:
    """How far a part was read, and what was found up to there."""

    state: Any = None
    """For Part.open."""
    since: int = 0
    """Records after that."""
    n_empty: int = 0
    n_bad: int = 0
    roots: list[int] = field(default_factory=list)
    """Paths that led to at least one document."""


@dataclass
class Written:
    """A part's whole shards: the content of part-*.json."""

    identity: str
    """SHA-256 of the part's identity."""
    shards: list[dict[str, Any]] = field(default_factory=list)
    """Entries of the manifest, with the sizes and SHA-256 of their files."""
    place: Place = field(default_factory=Place)
    """After the last shard, or after the last record."""
    is_whole: bool = False

    @property
    def n_tokens(self) -> int:
        """Of all shards."""
        return sum(shard["n_tokens"] for shard in self.shards)


def write_part(job: Job, number: int, part: Part, control: Control) -> Written:
    """Write a part's shards, going on after those that are there and whole.

    The bytes do not depend on where it was stopped before. Raises DataError for text that is none
    (unless job.skip_bad) and OSError naming the file where the disk is full.
    """
    written = _read_written(job, number, part)
    if written.is_whole or _is_enough(job, written):
        return written
    shards = _Shards(job, number, written)
    reading = part.open(written.place.state)
    for _ in range(written.place.since):
        next(reading)
    try:
        for batch in _batches(reading):
            if not _write_batch(job, shards, reading, batch, control):
                return written
        shards.finish()
    finally:
        shards.abandon()
    return written


def _batches(reading: Reading) -> Iterator[list[Record]]:
    # The 1 bounds a batch of blank records.
    return batched((len(record.text) + 1, record) for record in reading)


def _write_batch(
    job: Job, shards: _Shards, reading: Reading, batch: list[Record], control: Control
) -> bool:
    """Tokenize and write; False where there is enough."""
    control.check()
    encoded = iter(job.tokenizer.encode_batch([r.text for r in batch if _is_text(r)]))
    done = [0, 0, 0]
    for record in batch:
        if record.error is not None and not job.skip_bad:
            raise DataError(
                f"{record.error}; or pass such records over and count them: "
                f"attamba data prepare --skip-bad"
            ) from record.error
        size = shards.add(record, next(encoded) if _is_text(record) else None)
        if size is not None:
            done = [a + b for a, b in zip(done, size)]
        if _is_enough(job, shards.written):
            break
    control.add(*done)
    state = reading.state()
    if state is not None:
        shards.place.state, shards.place.since = state, 0
    return not _is_enough(job, shards.written)


def _is_text(record: Record) -> bool:
    return record.error is None and bool(record.text.strip())


def _is_enough(job: Job, written: Written) -> bool:
    return job.max_tokens is not None and written.n_tokens >= job.max_tokens


class _Shards:
    """Writes the shards of a part."""

    def __init__(self, job: Job, number: int, written: Written) -> None:
        self.job, self.number, self.written = job, number, written
        self.place = dataclasses.replace(written.place, roots=list(written.place.roots))
        self._dtype = token_dtype(job.tokenizer.vocab_size)
        self._aside = job.folder / f".tokens-{number:05d}.{os.getpid()}"
        self._file: BinaryIO | None = None
        self._begin()

    def _begin(self) -> None:
        self._records: list[tuple[int, ...]] = []
        self._filled = 0  # tokens in the open shard
        self._digest = hashlib.sha256()

    def add(self, record: Record, ids: np.ndarray | None) -> tuple[int, int, int] | None:
        """Append a document; count a record that is none. Documents, tokens and bytes written."""
        self.place.since += 1
        if ids is None:
            if record.error is None:
                self.place.n_empty += 1
            else:
                self.place.n_bad += 1
            return None
        if record.root not in self.place.roots:
            self.place.roots.append(record.root)
        self._check(record, ids)
        n_bytes = len(record.text.encode())
        n_words = sum(len(piece.split()) for piece in cut(record.text))
        self._records.append((self._filled, len(ids), n_bytes, n_words, record.source))
        stored = np.empty(len(ids) + 1, dtype=self._dtype)
        stored[0] = self.job.tokenizer.eos_id
        stored[1:] = ids
        self._write(stored.tobytes())
        self._filled += len(stored)
        if self._filled >= self.job.shard_tokens:
            self._close()
        return 1, len(stored), n_bytes

    def _check(self, record: Record, ids: np.ndarray) -> None:
        size = self.job.tokenizer.vocab_size
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            raise DataError(
                f"{self.job.sources[record.source]}: the tokenizer made ids up to {ids.max()} for "
                f"a vocabulary of {size}; mend the tokenizer"
            )

    def _write(self, data: bytes) -> None:
        with naming(self._aside, WHOLE):
            if self._file is None:
                self._file = open(self._aside, "wb")  # noqa: SIM115
            self._file.write(data)
        self._digest.update(data)

    def _close(self) -> None:
        """Make the open shard a whole one: its files on the disk, then its entry."""
        assert self._file is not None
        stem = f"{self.number:05d}-{len(self.written.shards):03d}"
        tokens, documents = f"tokens-{stem}.bin", f"documents-{stem}.npy"
        records = np.array(self._records, dtype=DOCUMENT)
        buffer = io.BytesIO()
        np.save(buffer, records)
        with naming(self.job.folder / tokens, WHOLE):
            self._file.close()
            sync(self._aside)
            os.replace(self._aside, self.job.folder / tokens)
        self._file = None
        with naming(self.job.folder / documents, WHOLE):
            write_aside(self.job.folder / documents, buffer.getvalue())
            sync(self.job.folder / documents)
        n_tokens = self._filled * self._dtype.itemsize
        self.written.shards.append(
            {
                "tokens": tokens,
                "documents": documents,
                "n_tokens": self._filled,
                "n_documents": len(records),
                "n_bytes": int(records["n_bytes"].sum()),
                "n_words": int(records["n_words"].sum()),
                "files": {
                    documents: file_entry(buffer.getvalue()),
                    tokens: {"bytes": n_tokens, "sha256": self._digest.hexdigest()},
                },
                "place": dataclasses.asdict(self.place),
            }
        )
        self.written.place = dataclasses.replace(self.place, roots=list(self.place.roots))
        self._begin()
        self._save()

    def _save(self) -> None:
        path = part_file(self.job.folder, self.number)
        with naming(path, WHOLE):
            write_aside(path, (json.dumps(dataclasses.asdict(self.written)) + "\n").encode())

    def finish(self) -> None:
        """There is no more: close the last shard, and say that the part is whole."""
        if self._records:
            self._close()
        self.written.place = self.place
        self.written.is_whole = True
        self._save()

    def abandon(self) -> None:
        """Drop the shard that is open."""
        if self._file is not None:
            with suppress(OSError):  # what could not be written cannot be flushed either
                self._file.close()
            self._aside.unlink(missing_ok=True)


def part_file(folder: Path, number: int) -> Path:
    """Where it stands how far a part is."""
    return folder / f"part-{number:05d}.json"


def file_entry(content: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read_written(job: Job, number: int, part: Part) -> Written:
    """The part's shards that are there, whole and of this input."""
    identity = hashlib.sha256(json.dumps(part.identity).encode()).hexdigest()
    try:
        tree = json.loads(part_file(job.folder, number).read_bytes())
        written = Written(**{**tree, "place": Place(**tree["place"])})
    except (OSError, ValueError, KeyError, TypeError):
        return Written(identity)
    if written.identity != identity or (written.place.n_bad and not job.skip_bad):
        return Written(identity)  # of other input, or it passed over what is now to be told
    for i, shard in enumerate(written.shards):
        if not all(_is_whole(job.folder / name, f) for name, f in shard["files"].items()):
            place = Place(**written.shards[i - 1]["place"]) if i else Place()
            return Written(identity, written.shards[:i], place)
    return written


def _is_whole(path: Path, entry: dict[str, Any]) -> bool:
    return (
        path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]
    )
