"""Tokenized text on disk: memory-mapped shards with the boundaries of documents.

A prepared folder holds

    tokens-00000-000.bin   token ids, little-endian uint16 (uint32 where V > 65536); each document
                           is the separator eos and then its tokens, and lies in one shard
    documents-00000-000.npy  one DOCUMENT record per document of that shard
    tokenizer/             the tokenizer that made them
    manifest.json          counts, sources, and size and SHA-256 of every other file

It is written aside and renamed when it is whole, so a folder with a manifest is a whole one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .folders import ANEW, Folder, open_folder
from .inputs import is_url
from .tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
SHARDS = "tokens-*.bin"
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


def token_dtype(vocab_size: int) -> np.dtype:
    """Of the stored ids: uint16, or uint32 where the vocabulary needs it; little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


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


def is_prepared(path: str | Path) -> bool:
    """Is it a folder, or the URL of one, that prepare wrote? Also if its manifest is damaged now.

    Raises OSError where that cannot be told: UnreachableError, for one, and DataError for a URL
    that is refused.
    """
    files = open_folder(path)
    content = files.read(MANIFEST)
    if content is None:
        return False
    try:
        manifest = json.loads(content)
    except ValueError:
        manifest = None
    return _is_ours(manifest) or files.holds(SHARDS)


class TokenDataset:
    """A prepared folder, read. Tokens stay on disk until they are asked for."""

    def __init__(self, name: str | Path, files: Folder, manifest: dict[str, Any]) -> None:
        self.folder = name
        """Its path or URL."""
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
        self._files = files
        self._dtype = np.dtype(manifest["dtype"])
        self._lengths = [shard["n_tokens"] for shard in manifest["shards"]]
        self._ends = np.cumsum(self._lengths)
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> TokenDataset:
        """Open a prepared folder. Raises DataError if it is not one, or a file is missing or cut.

        folder: a local path, or a URL that fsspec knows (s3://..., gs://... where their packages
            are installed), whose files are kept in a local cache as they are read.

        Raises UnreachableError if the URL cannot be reached. Sizes are checked. Contents are
        checked as they come from a URL; on a local disk they are not: see verify.
        """
        files = open_folder(folder)
        manifest = _manifest(folder, files)
        try:
            for name, entry in manifest["files"].items():
                state = _wrong_size(files, name, entry["bytes"])
                if state:
                    raise DataError(
                        f"{folder}/{name} {state}, {MANIFEST} says {entry['bytes']} bytes; {ANEW}"
                    )
            return cls(Path(folder) if not is_url(folder) else str(folder), files, manifest)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder}/{MANIFEST} is damaged ({error!r}); restore it or {ANEW}"
            ) from error

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read every file and compare its SHA-256. Raises DataError naming those that differ.

        progress: called after each file with the bytes read so far.
        """
        altered, done = [], 0
        for name, entry in self.manifest["files"].items():
            if not self._files.is_whole(name, entry):
                altered.append(f"{self.folder}/{name}")
            done += entry["bytes"]
            if progress:
                progress(done)
        if altered:
            were = "was" if len(altered) == 1 else "were"
            raise DataError(f"{', '.join(altered)} {were} altered after it was written; {ANEW}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        tokenizer = self._load_tokenizer()
        if tokenizer.fingerprint != self.fingerprint:
            raise DataError(f"{self.folder}/tokenizer did not make these tokens; {ANEW}")
        return tokenizer

    def _load_tokenizer(self) -> Tokenizer:
        if not is_url(self.folder):
            return load_tokenizer(Path(self.folder) / "tokenizer")
        with tempfile.TemporaryDirectory() as folder:
            for name in self.manifest["files"]:
                if name.startswith("tokenizer/"):
                    shutil.copy(self._local(name), Path(folder) / name.removeprefix("tokenizer/"))
            return load_tokenizer(folder)

    def _local(self, name: str) -> Path:
        return self._files.local(name, self.manifest["files"][name])

    def _shard(self, number: int) -> np.ndarray:
        """The tokens of a shard, mapped when they are first asked for.

        Raises DataError where there are not as many as the manifest says, as in a file that was cut
        after it was opened.
        """
        if number not in self._maps:
            name, length = self.manifest["shards"][number]["tokens"], self._lengths[number]
            path, width = self._local(name), self._dtype.itemsize
            try:
                shard = np.memmap(path, dtype=self._dtype, mode="r", shape=(length,))
            except ValueError:  # it is shorter
                shard = None
            size = path.stat().st_size
            if shard is None or size != length * width:
                raise DataError(
                    f"{self.folder}/{name} has {size} bytes, {MANIFEST} says {length * width} "
                    f"bytes ({length} tokens of {width}); restore it or {ANEW}"
                )
            self._maps[number] = shard
        return self._maps[number]

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document's eos stands in the stream of all tokens, int64 [n_documents]."""
        return np.concatenate(
            [
                self._documents(i)["start"] + (end - length)
                for i, (length, end) in enumerate(zip(self._lengths, self._ends))
            ]
        )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream of all shards, int64 [stop - start].

        Raises DataError for an id that the vocabulary lacks, and for a shard of another length than
        the manifest says.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.n_tokens}")
        out = np.empty(stop - start, dtype=np.int64)
        at = start
        while at < stop:
            i = int(np.searchsorted(self._ends, at, side="right"))
            shard, end = self._shard(i), int(self._ends[i])
            until = min(stop, end)
            base = end - self._lengths[i]
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

    def n_bytes_of(self, start: int, stop: int) -> float:
        """Bytes of text behind tokens [start, stop); of a document that is cut, its mean share."""
        bounds = np.append(self.starts, self.n_tokens)
        kept = np.diff(bounds.clip(start, stop)) / np.diff(bounds)
        sizes = [self._documents(i)["n_bytes"] for i in range(len(self._lengths))]
        return float(kept @ np.concatenate(sizes))

    def documents(self) -> Iterator[TokenizedDocument]:
        """Every document, in order."""
        sources = self.manifest["sources"]
        for i in range(len(self._lengths)):
            shard = self._shard(i)
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
                f"{self.vocab_size}; it is damaged: {ANEW}"
            )
        return tokens

    def _documents(self, shard: int) -> np.ndarray:
        """The DOCUMENT records of a shard. Raises DataError where they cannot be read."""
        name = self.manifest["shards"][shard]["documents"]
        path = self._local(name)
        try:
            return np.load(path)
        except (ValueError, EOFError) as error:
            raise DataError(
                f"{self.folder}/{name} cannot be read ({error}): it has {path.stat().st_size} "
                f"bytes, {MANIFEST} says {self.manifest['files'][name]['bytes']} bytes; restore it "
                f"or {ANEW}"
            ) from error


def _wrong_size(files: Folder, name: str, n_bytes: int) -> str | None:
    """What is wrong with a file, by its size; None: nothing, or its checksum will tell."""
    try:
        size = files.size(name)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    return None if size in (None, n_bytes) else f"has {size} bytes"


def _is_ours(manifest: Any) -> bool:
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _manifest(folder: str | Path, files: Folder) -> dict[str, Any]:
    path = f"{folder}/{MANIFEST}"
    content = files.read(MANIFEST)
    if content is None:
        raise DataError(
            f"{folder} is no prepared folder (it has no {MANIFEST}); make one with "
            f"attamba data prepare"
        )
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); restore it or {ANEW}") from error
    if not _is_ours(manifest):
        raise DataError(f"{path} is not the manifest of a prepared folder; restore it or {ANEW}")
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{path} has version {manifest.get('version')}, this program reads version {VERSION}; "
            f"{ANEW}"
        )
    return manifest
