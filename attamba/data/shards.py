"""Tokenized text on disk: memory-mapped shards with the boundaries of documents.

A prepared folder holds

    tokens-00000.bin       token ids, little-endian uint16 (uint32 where V > 65536); each document
                           is the separator eos and then its tokens, and lies in one shard
    documents-00000.npy    one DOCUMENT record per document of that shard
    tokenizer/             the tokenizer that made them
    manifest.json          counts, sources, and size and SHA-256 of every other file

It is written aside and renamed when it is whole, so a folder with a manifest is a whole one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import DataError
from .files import sha256, sync
from .pieces import batched, cut
from .reader import Document, Paths, read_documents
from .tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
FORMAT = "attamba-tokens"
VERSION = 1

DOCUMENT = np.dtype(
    [
        ("start", "<i8"),  # offset of the document's eos in its shard, in tokens
        ("n_tokens", "<i8"),  # without the eos
        ("n_bytes", "<i8"),  # of the text as UTF-8
        ("n_words", "<i8"),  # len(text.split())
        ("source", "<u4"),  # index into the manifest's sources
    ]
)

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class TokenizedDocument:
    """One document of a prepared folder."""

    tokens: np.ndarray
    """int64 [n_tokens], without the leading eos."""
    n_bytes: int
    """Bytes of the text as UTF-8."""
    n_words: int
    """Words of the text: len(text.split())."""
    source: str
    """The file it was read from."""


def prepare(
    paths: Paths,
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    split_on: str | None = None,
    text_key: str = "text",
    shard_tokens: int = 100_000_000,
    progress: Progress | None = None,
) -> TokenDataset:
    """Tokenize files and folders into the folder `out`.

    paths, split_on, text_key: as read_documents takes them.
    out: a new or empty folder, or a prepared one, which is replaced once the new one is whole.
    shard_tokens: a shard is closed when it holds at least this many tokens.
    progress: called now and then with (documents, tokens, bytes of text) done so far.

    Raises DataError for what read_documents refuses, and if `out` holds anything else.
    """
    if shard_tokens < 1:
        raise DataError(f"shard_tokens={shard_tokens} must be at least 1")
    out = Path(out)
    _check_target(out)
    documents = read_documents(paths, split_on=split_on, text_key=text_key)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with _Writer(aside, tokenizer, shard_tokens) as writer:
            for batch in batched((len(d.text), d) for d in documents):
                writer.write(batch)
                if progress:
                    progress(writer.n_documents, writer.n_tokens, writer.n_bytes)
            writer.finish(n_empty=documents.n_empty)
        _replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return TokenDataset.open(out)


def is_prepared(path: str | Path) -> bool:
    """Is it a folder that prepare wrote?"""
    try:
        manifest = json.loads((Path(path) / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


class TokenDataset:
    """A prepared folder, read. Tokens stay on disk until they are asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.n_tokens: int = manifest["n_tokens"]
        """Tokens, one eos per document included."""
        self.n_documents: int = manifest["n_documents"]
        self.n_bytes: int = manifest["n_bytes"]
        """Bytes of all texts as UTF-8."""
        self.n_words: int = manifest["n_words"]
        self.vocab_size: int = manifest["vocab_size"]
        self.fingerprint: str = manifest["tokenizer"]["fingerprint"]
        """The tokenizer's."""
        shards = manifest["shards"]
        self._shards = [
            np.memmap(folder / s["tokens"], dtype=np.dtype(manifest["dtype"]), mode="r")
            for s in shards
        ]
        self._ends = np.cumsum([s["n_tokens"] for s in shards])

    @classmethod
    def open(cls, folder: str | Path) -> TokenDataset:
        """Open a prepared folder. Raises DataError if it is not one, or a file is missing or cut.

        Sizes are checked, contents are not: see verify.
        """
        folder = Path(folder)
        manifest = _manifest(folder)
        try:
            for name, entry in manifest["files"].items():
                path = folder / name
                size = path.stat().st_size if path.is_file() else None
                if size != entry["bytes"]:
                    state = "is missing" if size is None else f"has {size} bytes"
                    raise DataError(
                        f"{path} {state}, {MANIFEST} says {entry['bytes']} bytes; {_ANEW}"
                    )
            return cls(folder, manifest)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / MANIFEST} is damaged ({error!r}); {_ANEW}") from error

    def verify(self) -> None:
        """Read every file and compare its SHA-256. Raises DataError for one that was altered."""
        for name, entry in self.manifest["files"].items():
            if sha256(self.folder / name) != entry["sha256"]:
                raise DataError(f"{self.folder / name} was altered after it was written; {_ANEW}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        tokenizer = load_tokenizer(self.folder / "tokenizer")
        if tokenizer.fingerprint != self.fingerprint:
            raise DataError(f"{self.folder / 'tokenizer'} did not make these tokens; {_ANEW}")
        return tokenizer

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document's eos stands in the stream of all tokens, int64 [n_documents]."""
        return np.concatenate(
            [
                self._documents(i)["start"] + (end - len(shard))
                for i, (shard, end) in enumerate(zip(self._shards, self._ends))
            ]
        )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream of all shards, int64 [stop - start].

        Raises DataError for an id that the vocabulary lacks.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.n_tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        at = start
        while at < stop:
            i = int(np.searchsorted(self._ends, at, side="right"))
            shard, end = self._shards[i], int(self._ends[i])
            until = min(stop, end)
            base = end - len(shard)
            out[at - start : until - start] = shard[at - base : until - base]
            at = until
        return self._checked(out)

    def doc_ids(self, start: int, stop: int) -> np.ndarray:
        """The document, counted from 0, of tokens [start, stop); int64 [stop - start].

        A document's eos belongs to it.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.n_tokens}")
        first, last = np.searchsorted(self.starts, [start, stop - 1], side="right") - 1
        steps = np.zeros(stop - start, dtype=np.int64)
        steps[self.starts[first + 1 : last + 1] - start] = 1
        return first + np.cumsum(steps)

    def documents(self) -> Iterator[TokenizedDocument]:
        """Every document, in order."""
        sources = self.manifest["sources"]
        for i, shard in enumerate(self._shards):
            for document in self._documents(i):
                start = int(document["start"]) + 1
                stop = start + int(document["n_tokens"])
                yield TokenizedDocument(
                    tokens=self._checked(shard[start:stop].astype(np.int64)),
                    n_bytes=int(document["n_bytes"]),
                    n_words=int(document["n_words"]),
                    source=sources[document["source"]],
                )

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens. Raises DataError for an id that the vocabulary lacks."""
        if tokens.size and tokens.max() >= self.vocab_size:
            raise DataError(
                f"{self.folder} holds the token id {tokens.max()}, but its vocabulary has "
                f"{self.vocab_size}; it is damaged: {_ANEW}"
            )
        return tokens

    def _documents(self, shard: int) -> np.ndarray:
        return np.load(self.folder / self.manifest["shards"][shard]["documents"])


_ANEW = "prepare the data anew (attamba data prepare)"


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder} is no prepared folder (it has no {MANIFEST}); make one with "
            f"attamba data prepare"
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); {_ANEW}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a prepared folder; {_ANEW}")
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{path} has version {manifest.get('version')}, this program reads version {VERSION}; "
            f"{_ANEW}"
        )
    return manifest


def _check_target(out: Path) -> None:
    """Refuse to write where something else is."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder to write into")
    if out.is_dir() and any(out.iterdir()) and not is_prepared(out):
        raise DataError(
            f"{out} is not empty and holds no prepared data, so it is not overwritten; name a new "
            f"folder"
        )


def _replace(new: Path, out: Path) -> None:
    """Put folder `new` in the place of `out`, and remove what was there."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


class _Writer:
    """Writes shards and their manifest into a folder."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.n_documents = self.n_tokens = self.n_bytes = self.n_words = 0
        self._folder, self._tokenizer, self._shard_tokens = folder, tokenizer, shard_tokens
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._sources: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._files: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        self._records: list[tuple[int, ...]] = []
        self._filled = 0  # tokens in the open shard

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()

    def write(self, documents: list[Document]) -> None:
        encoded = self._tokenizer.encode_batch([document.text for document in documents])
        for document, ids in zip(documents, encoded):
            if len(ids) and not 0 <= ids.min() <= ids.max() < self._tokenizer.vocab_size:
                raise DataError(
                    f"{document.source}: the tokenizer made ids up to {ids.max()} for a vocabulary "
                    f"of {self._tokenizer.vocab_size}; mend the tokenizer"
                )
            self._append(document, ids)
            if self._filled >= self._shard_tokens:
                self._close_shard()

    def _append(self, document: Document, ids: np.ndarray) -> None:
        if self._file is None:
            self._file = open(self._folder / self._name("tokens", "bin"), "wb")  # noqa: SIM115
        stored = np.empty(len(ids) + 1, dtype=self._dtype)
        stored[0] = self._tokenizer.eos_id
        stored[1:] = ids
        self._file.write(stored.tobytes())
        n_bytes = len(document.text.encode())
        n_words = sum(len(piece.split()) for piece in cut(document.text))
        source = self._sources.setdefault(document.source, len(self._sources))
        self._records.append((self._filled, len(ids), n_bytes, n_words, source))
        self._filled += len(stored)
        self.n_documents += 1
        self.n_tokens += len(stored)
        self.n_bytes += n_bytes
        self.n_words += n_words

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        tokens, documents = self._name("tokens", "bin"), self._name("documents", "npy")
        np.save(self._folder / documents, np.array(self._records, dtype=DOCUMENT))
        for name in (tokens, documents):
            sync(self._folder / name)
        self._shards.append(
            {
                "tokens": tokens,
                "documents": documents,
                "n_tokens": self._filled,
                "n_documents": len(self._records),
            }
        )
        self._records, self._filled = [], 0

    def _name(self, what: str, suffix: str) -> str:
        return f"{what}-{len(self._shards):05d}.{suffix}"

    def finish(self, n_empty: int) -> None:
        """Close the last shard; add the tokenizer and, last of all, the manifest."""
        if self._records:
            self._close_shard()
        self._tokenizer.save(self._folder / "tokenizer")
        files = sorted(path for path in self._folder.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "vocab_size": self._tokenizer.vocab_size,
            "dtype": self._dtype.str,
            "tokenizer": self._tokenizer.meta(),
            "n_tokens": self.n_tokens,
            "n_documents": self.n_documents,
            "n_bytes": self.n_bytes,
            "n_words": self.n_words,
            "n_empty": n_empty,
            "shards": self._shards,
            "sources": list(self._sources),
            "files": {
                path.relative_to(self._folder).as_posix(): {
                    "bytes": path.stat().st_size,
                    "sha256": sha256(path),
                }
                for path in files
            },
        }
        path = self._folder / MANIFEST
        path.write_bytes((json.dumps(manifest, indent=1) + "\n").encode())
        sync(path)
