"""Documents out of files and folders, one at a time.

    .txt .md .py     one document per file, or several where a line matches ``split_on``
    .jsonl           one document per line: a JSON object with ``text_key``
    .parquet         one document per row: the column ``text_key``

and .xz, .gz, .bz2, .zst of all but parquet. Folders are read recursively in sorted order; what is
hidden (a name that begins with a dot) or has another suffix is passed over.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from .errors import DataError, RecordError, require
from .inputs import File, Paths, as_list, find_files

Read = str | RecordError
"""A record's text, or why it is none: the caller raises that or passes the record over."""


@dataclass(frozen=True)
class Document:
    """One document."""

    text: str
    """Not blank, without NUL, and encodable as UTF-8."""
    source: str
    """The file it came from, as the caller's path leads to it."""


class Documents(Iterator[Document]):
    """The iterator that read_documents returns; it holds one document (and one line) at a time."""

    def __init__(self, files: dict[str, list[File]], parse: Callable[[File], Iterator[Read]]):
        self.n_empty = 0
        """Blank files and records passed over so far."""
        self._documents = self._iterate(files, parse)

    def __next__(self) -> Document:
        return next(self._documents)

    def _iterate(
        self, files: dict[str, list[File]], parse: Callable[[File], Iterator[Read]]
    ) -> Iterator[Document]:
        for root, found in files.items():
            n_documents = 0
            for name, text in ((file.name, text) for file in found for text in parse(file)):
                if isinstance(text, RecordError):
                    raise text
                if text.strip():
                    n_documents += 1
                    yield Document(text, name)
                else:
                    self.n_empty += 1
            if not n_documents:
                raise no_text(root)


def no_text(root: str, n_bad: int = 0) -> DataError:
    """The error of a path without any text. n_bad: records of all paths that were passed over."""
    passed = f", or holds only records that are no text ({n_bad} were passed over)" if n_bad else ""
    return DataError(f"{root} is empty or blank{passed}; give a file or folder with text in it")


def read_documents(
    paths: Paths, *, split_on: str | None = None, text_key: str = "text"
) -> Documents:
    """Read documents from files and folders, in the order given.

    paths: local paths or patterns (``texts/*.jsonl``), or URLs that fsspec knows.
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
    pattern = compile_pattern(split_on)
    roots = as_list(paths)
    return Documents(
        {root: find_files(root) for root in roots},
        partial(read_file, pattern=pattern, text_key=text_key),
    )


def compile_pattern(split_on: str | None) -> re.Pattern[str] | None:
    """split_on as read_documents takes it. Raises DataError."""
    if split_on is None:
        return None
    try:
        return re.compile(split_on)
    except re.error as error:
        raise DataError(
            f"split_on={split_on!r} is not a regular expression: {error}; escape special "
            f"characters with a backslash"
        ) from error


def read_file(
    file: File,
    pattern: re.Pattern[str] | None,
    text_key: str,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Read]:
    """The texts of a file, or of the records that begin in its bytes [start, stop).

    start, stop: for parquet (whole row groups) and for .jsonl that is not compressed; default: all.
    Raises DataError for a damaged file.
    """
    if file.kind == "jsonl":
        return _jsonl(file, text_key, start, stop)
    if file.kind == "parquet":
        return _parquet(file, text_key, start, stop)
    return _whole(file) if pattern is None else _split(file, pattern)


@contextmanager
def _open(file: File) -> Iterator[Any]:
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


def _whole(file: File) -> Iterator[Read]:
    with _open(file) as stream:
        data = stream.read()
    try:
        yield _decode(data, 0, file.name)
    except RecordError as error:
        yield error


def _raw_lines(file: File, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end) of lines that begin in [start, stop). Only b"\\n" ends one."""
    with _open(file) as stream:
        offset = start
        if start:
            # A line that began before is the other part's: look for its end, from one byte before.
            stream.seek(start - 1)
            offset += len(stream.readline()) - 1
        for line in stream if stop is None or offset < stop else ():
            yield offset, line
            offset += len(line)
            if stop is not None and offset >= stop:
                return


def _split(file: File, pattern: re.Pattern[str]) -> Iterator[Read]:
    """Documents whose concatenation is the file; one with a line that is no text is an error."""
    held: list[str] = []
    blank, error = True, None
    for offset, raw in _raw_lines(file):
        try:
            line = _decode(raw, offset, file.name)
        except RecordError as found:
            blank, error = False, error or found
            continue
        if not blank and pattern.search(line.rstrip("\r\n")):
            yield error or "".join(held)
            held, blank, error = [], True, None
        held.append(line)
        blank = blank and not line.strip()
    yield error or "".join(held)


def _jsonl(file: File, text_key: str, start: int, stop: int | None) -> Iterator[Read]:
    for number, (offset, line) in enumerate(_raw_lines(file, start, stop), start=1):
        if not offset:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line or line.isspace():
            continue
        # Lines are counted from the file's first; where reading began later, bytes tell the place.
        where = f"{file.name}:{number}" if not start else f"{file.name}: line at byte {offset}"
        try:
            yield _json_text(_decode(line, offset, file.name), text_key, where)
        except RecordError as error:
            yield error


def _json_text(line: str, text_key: str, where: str) -> str:
    try:
        record = json.loads(line.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 column", "column")
        raise RecordError(
            f"{where}: broken JSON ({reason}); each line must be one JSON object"
        ) from error
    if not isinstance(record, dict):
        raise RecordError(f"{where}: not a JSON object; each line must be one")
    if text_key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise RecordError(
            f"{where}: no key {text_key!r} (keys: {keys}); set text_key: "
            f"attamba data prepare --text-key KEY"
        )
    return checked(record[text_key], f"{where}: {text_key!r}")


def _parquet(file: File, text_key: str, start: int, stop: int | None) -> Iterator[Read]:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    with file.fs.open(file.path, "rb") as stream:
        try:
            table = parquet.ParquetFile(stream)
            if text_key not in table.schema_arrow.names:
                names = ", ".join(map(repr, table.schema_arrow.names)) or "none"
                raise DataError(
                    f"{file.name}: no column {text_key!r} (columns: {names}); set text_key: "
                    f"attamba data prepare --text-key NAME"
                )
            row, groups = _row_groups(table.metadata, start, stop)
            for batch in table.iter_batches(batch_size=64, row_groups=groups, columns=[text_key]):
                for value in batch.column(0):
                    yield _parquet_text(value, f"{file.name}: row {row}: {text_key!r}")
                    row += 1
        except (arrow.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{file.name} is cut off or no parquet file ({error}); write it again"
            ) from error


def _row_groups(metadata: Any, start: int, stop: int | None) -> tuple[int, list[int]]:
    """Rows before the row groups that begin in bytes [start, stop) of a file, and those groups."""
    first_row, groups = 0, []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        column = group.column(0)
        offset = column.data_page_offset
        if column.dictionary_page_offset is not None:
            offset = min(offset, column.dictionary_page_offset)
        if offset < start:
            first_row += group.num_rows
        elif stop is None or offset < stop:
            groups.append(number)
    return first_row, groups


def _parquet_text(value: Any, where: str) -> Read:
    try:
        return checked(value.as_py(), where)
    except UnicodeDecodeError:
        return RecordError(f"{where}: not UTF-8; convert it to UTF-8")
    except RecordError as error:
        return error


def _decode(data: bytes, offset: int, name: str) -> str:
    """Decode bytes that begin at byte `offset` of a file."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise RecordError(
            f"{name}: byte {offset + nul} is NUL, so this is a binary file or UTF-16; give text, "
            f"converted to UTF-8"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{name}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); "
            f"convert it to UTF-8, e.g. iconv -f LATIN1 -t UTF-8"
        ) from error


def checked(text: Any, where: str) -> str:
    """A record's text, which JSON and parquet may hold in forms that no text file can.

    Raises RecordError, which names `where`.
    """
    if not isinstance(text, str):
        raise RecordError(f"{where} is {type(text).__name__}, not text; drop or mend the record")
    if "\0" in text:
        raise RecordError(f"{where} holds NUL, which no text does; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where} holds half a surrogate pair at character {error.start}, which UTF-8 cannot "
            f"express; remove it"
        ) from error
    return text
