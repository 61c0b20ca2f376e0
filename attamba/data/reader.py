"""Documents out of files and folders, one at a time.

    .txt .md .py     one document per file, or several where a line matches ``split_on``
    .jsonl           one document per line: a JSON object with ``text_key``
    .parquet         one document per row: the column ``text_key``

and .xz, .gz, .bz2, .zst of all but parquet. Folders are read recursively in sorted order; what is
hidden (a name that begins with a dot) or has another suffix is passed over.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import DataError, require

TEXT_SUFFIXES = (".txt", ".md", ".py")
COMPRESSIONS = {".xz": "xz", ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
READABLE = ".txt .md .py .jsonl (each also as .xz .gz .bz2 .zst) and .parquet"

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Document:
    """One document."""

    text: str
    """Not blank, without NUL, and encodable as UTF-8."""
    source: str
    """The file it came from, as the caller's path leads to it."""


@dataclass(frozen=True)
class _File:
    """A file to read: `name` is for people, `path` for the file system `fs`."""

    fs: Any
    path: str
    name: str
    kind: str
    compression: str | None


class Documents(Iterator[Document]):
    """The iterator that read_documents returns; it holds one document (and one line) at a time."""

    def __init__(self, files: dict[str, list[_File]], parse: Callable[[_File], Iterator[Document]]):
        self.n_empty = 0
        """Blank files and records passed over so far."""
        self._documents = self._iterate(files, parse)

    def __next__(self) -> Document:
        return next(self._documents)

    def _iterate(
        self, files: dict[str, list[_File]], parse: Callable[[_File], Iterator[Document]]
    ) -> Iterator[Document]:
        for root, found in files.items():
            n_documents = 0
            for document in itertools.chain.from_iterable(map(parse, found)):
                if document.text.strip():
                    n_documents += 1
                    yield document
                else:
                    self.n_empty += 1
            if not n_documents:
                raise DataError(f"{root} is empty or blank; give a file or folder with text in it")


def read_documents(
    paths: Paths, *, split_on: str | None = None, text_key: str = "text"
) -> Documents:
    """Read documents from files and folders, in the order given.

    paths: local paths, or URLs that fsspec knows.
    split_on: regular expression; a text file (.txt .md .py) is cut before each line in which it is
        found (``^`` and ``$`` are the line's ends). Text before the first such line is a document
        of its own unless it is blank, when it stays with the first. Default: no cuts.
    text_key: the field of a JSON line, or the column of a parquet file, that holds the text.

    Blank files inside a folder and blank records are passed over and counted in ``n_empty``.

    Raises DataError, naming file and remedy, for: a path that does not exist or is given twice, a
    file of another kind, a path without any text, text that is not UTF-8 or holds NUL, a broken
    JSON line, a missing text_key, a cut-off or damaged file. Paths and split_on are checked at
    once, contents when they are reached.
    """
    pattern = _compile(split_on)
    roots = _as_list(paths)
    return Documents(
        {root: _find(root) for root in roots},
        partial(_read, pattern=pattern, text_key=text_key),
    )


def _as_list(paths: Paths) -> list[str]:
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not listed or not all(str(path) for path in listed):
        raise DataError("no path given; name at least one text file or folder")
    roots = [str(path) for path in listed]
    for root in roots:
        if roots.count(root) > 1:
            raise DataError(f"{root} is given twice; name each path once")
    return roots


def _compile(split_on: str | None) -> re.Pattern[str] | None:
    if split_on is None:
        return None
    try:
        return re.compile(split_on)
    except re.error as error:
        raise DataError(
            f"split_on={split_on!r} is not a regular expression: {error}; escape special "
            f"characters with a backslash"
        ) from error


def _find(root: str) -> list[_File]:
    """The files to read under `root`, sorted by path."""
    if "://" in root:
        fs, path = require("fsspec").core.url_to_fs(root)
    else:
        # Not url_to_fs: to it, "::" and "*" in a file's name mean something.
        fs = require("fsspec.implementations.local").LocalFileSystem()
        path = os.path.abspath(os.path.expanduser(root))
    if not fs.exists(path):
        raise DataError(f"{root} does not exist; check the path")
    if not fs.isdir(path):
        file = _classify(fs, path, root)
        if file is None:
            raise DataError(f"{root} is not a kind of file that is read; there are: {READABLE}")
        return [file]
    found = []
    for entry in sorted(fs.find(path)):
        inner = PurePosixPath(entry).relative_to(PurePosixPath(path))
        if not any(part.startswith(".") for part in inner.parts):
            found.append(_classify(fs, entry, f"{root.rstrip('/')}/{inner}"))
    files = [file for file in found if file is not None]
    if not files:
        raise DataError(f"{root} holds no file of a kind that is read; there are: {READABLE}")
    return files


def _classify(fs: Any, path: str, name: str) -> _File | None:
    """What kind of file it is, by its suffixes; None: one that is not read."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix == ".parquet":
        return _File(fs, path, name, "parquet", None)
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    if suffix == ".jsonl":
        return _File(fs, path, name, "jsonl", compression)
    if suffix in TEXT_SUFFIXES:
        return _File(fs, path, name, "text", compression)
    return None


@contextmanager
def _open(file: _File) -> Iterator[Any]:
    """The file's bytes, decompressed; damage that shows while reading is a DataError."""
    damage: list[type[Exception]] = [EOFError]
    if file.compression == "xz":
        import lzma

        damage.append(lzma.LZMAError)
    elif file.compression == "zstd":
        damage.append(require("zstandard").ZstdError)
    elif file.compression:
        import zlib

        damage += [zlib.error, OSError]  # OSError: gzip and bz2 raise it for a wrong header
    codec = None if file.compression == "zstd" else file.compression
    with file.fs.open(file.path, "rb", compression=codec) as raw:
        try:
            yield io.BufferedReader(_ZstdReader(raw)) if file.compression == "zstd" else raw
        except tuple(damage) as error:
            raise DataError(
                f"{file.name} is cut off or damaged ({error}); copy or compress it again"
            ) from error


class _ZstdReader(io.RawIOBase):
    """Decompress every frame of a zstd file.

    The package's own reader stops after the first frame by default and takes a cut-off file for a
    whole one; this one raises EOFError.
    """

    def __init__(self, raw: Any) -> None:
        # 2 GiB: what `zstd --long=31` may ask for. Memory is taken only as a file needs it.
        self._decompressor = require("zstandard").ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._raw, self._input, self._output = raw, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last zstd frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._output))
        buffer[:n], self._output = self._output[:n], self._output[n:]
        return n


def _read(file: _File, pattern: re.Pattern[str] | None, text_key: str) -> Iterator[Document]:
    readers: dict[str, Callable[[_File], Iterator[str]]] = {
        "text": _whole if pattern is None else partial(_split, pattern=pattern),
        "jsonl": partial(_jsonl, text_key=text_key),
        "parquet": partial(_parquet, text_key=text_key),
    }
    for text in readers[file.kind](file):
        yield Document(text, file.name)


def _whole(file: _File) -> Iterator[str]:
    with _open(file) as stream:
        data = stream.read()
    yield _decode(data, 0, file.name)


def _lines(file: _File) -> Iterator[str]:
    """Lines with their ends. Only b"\\n" ends one, so that no byte of the text is changed."""
    offset = 0
    with _open(file) as stream:
        for line in stream:
            yield _decode(line, offset, file.name)
            offset += len(line)


def _split(file: _File, pattern: re.Pattern[str]) -> Iterator[str]:
    """Documents whose concatenation is the file."""
    held: list[str] = []
    blank = True
    for line in _lines(file):
        if not blank and pattern.search(line.rstrip("\r\n")):
            yield "".join(held)
            held, blank = [], True
        held.append(line)
        blank = blank and not line.strip()
    yield "".join(held)


def _jsonl(file: _File, text_key: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        try:
            record = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            reason = str(error).replace("line 1 column", "column")
            raise DataError(
                f"{where}: broken JSON ({reason}); each line must be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: not a JSON object; each line must be one")
        if text_key not in record:
            keys = ", ".join(map(repr, record)) or "none"
            raise DataError(f"{where}: no key {text_key!r} (keys: {keys}); set text_key")
        yield _checked(record[text_key], f"{where}: {text_key!r}")


def _parquet(file: _File, text_key: str) -> Iterator[str]:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    with file.fs.open(file.path, "rb") as stream:
        try:
            table = parquet.ParquetFile(stream)
            if text_key not in table.schema_arrow.names:
                names = ", ".join(map(repr, table.schema_arrow.names)) or "none"
                raise DataError(
                    f"{file.name}: no column {text_key!r} (columns: {names}); set text_key"
                )
            row = 0
            for batch in table.iter_batches(batch_size=64, columns=[text_key]):
                for value in batch.column(0):
                    where = f"{file.name}: row {row}: {text_key!r}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise DataError(f"{where}: not UTF-8; convert it to UTF-8") from error
                    yield _checked(text, where)
                    row += 1
        except (arrow.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{file.name} is cut off or no parquet file ({error}); write it again"
            ) from error


def _decode(data: bytes, offset: int, name: str) -> str:
    """Decode bytes that begin at byte `offset` of a file."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise DataError(
            f"{name}: byte {offset + nul} is NUL, so this is a binary file or UTF-16; give text, "
            f"converted to UTF-8"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); "
            f"convert it to UTF-8, e.g. iconv -f LATIN1 -t UTF-8"
        ) from error


def _checked(text: Any, where: str) -> str:
    """A record's text, which JSON and parquet may hold in forms that no text file can."""
    if not isinstance(text, str):
        raise DataError(f"{where} is {type(text).__name__}, not text; drop or mend the record")
    if "\0" in text:
        raise DataError(f"{where} holds NUL, which no text does; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair at character {error.start}, which UTF-8 cannot "
            f"express; remove it"
        ) from error
    return text
