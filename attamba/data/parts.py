"""What there is to prepare, divided into parts that are read apart from each other.

How an input is divided depends on the input alone. A part is some files of some MB together, a
range of bytes of a large one, or some files of a data set on the hub.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Protocol

from .errors import RecordError
from .inputs import File, Paths, as_list, find_files, is_url
from .reader import compile_pattern, read_file

LEAST, LARGEST = 2 << 20, 256 << 20
"""Bytes of a part: a 256th of the files, but within these bounds."""


class Record(NamedTuple):
    """A record that was read."""

    text: str
    """Blank where there is an error."""
    source: int
    """Index into Inputs.sources: the file or data set it came from."""
    root: int
    """Index into Inputs.roots: the path that led there."""
    error: RecordError | None = None
    """Why it is no text."""


class Part(Protocol):
    """Records that one worker reads; sent to it by pickle."""

    @property
    def identity(self) -> Any:
        """Plain values that differ where the input does."""

    def open(self, state: Any) -> Reading:
        """Begin to read: at the first record, or after the one that Reading.state told of."""


class Reading(Iterator[Record], Protocol):
    """Records, one after the other."""

    def state(self) -> Any:
        """For Part.open, plain values; None where reading begins at the first record again."""


@dataclass
class Inputs:
    """All parts, in order."""

    roots: list[str]
    """The paths as they were given."""
    sources: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    about: list[dict[str, Any]] = field(default_factory=list)
    """What is known of data sets on the hub: name, revision of the files, licence."""


@dataclass(frozen=True)
class Span:
    """A file, or the records of it that begin in bytes [start, stop)."""

    file: File
    source: int
    root: int
    size: int
    changed: str
    """Tells one state of the file from another."""
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class FilePart:
    """Spans of files."""

    spans: tuple[Span, ...]
    split_on: str | None
    text_key: str

    @property
    def identity(self) -> Any:
        """Names, sizes, times and ranges, and the numbers that records carry."""
        return [
            [s.file.name, s.size, s.changed, s.start, s.stop, s.source, s.root] for s in self.spans
        ]

    def open(self, state: None) -> FileReading:
        """Begin to read."""
        return FileReading(chain.from_iterable(map(self._read, self.spans)))

    def _read(self, span: Span) -> Iterator[Record]:
        pattern = compile_pattern(self.split_on)
        for text in read_file(span.file, pattern, self.text_key, span.start, span.stop):
            if isinstance(text, RecordError):
                yield Record("", span.source, span.root, text)
            else:
                yield Record(text, span.source, span.root)


class FileReading(Iterator[Record]):
    """Records of files, which are quick to read: a part that goes on begins at its first record."""

    def __init__(self, records: Iterator[Record]) -> None:
        self._records = records

    def __next__(self) -> Record:
        return next(self._records)

    def state(self) -> None:
        """None: files are read from the begin."""
        return


def find_inputs(paths: Paths, *, split_on: str | None, text_key: str) -> Inputs:
    """Divide what `paths` name into parts.

    paths: as read_documents takes them, ``hf:NAME`` or a recipe among them (see attamba.data.hub).

    Raises DataError, as read_documents does and for a data set that cannot be reached.
    """
    from . import hub

    compile_pattern(split_on)
    inputs = Inputs(as_list(paths))
    spans: list[Span] = []
    for root, name in enumerate(inputs.roots):
        found = hub.parse(name, text_key)
        if found is None:
            for file in find_files(name):
                spans.append(_span(file, len(inputs.sources), root))
                inputs.sources.append(file.name)
            continue
        # Parts keep the order of the paths.
        inputs.parts += _divide(spans, split_on, text_key)
        spans = []
        inputs.parts += hub.divide(found, source_index=len(inputs.sources), root=root)
        inputs.sources.append(found.name)
        inputs.about.append(hub.about(found))
    inputs.parts += _divide(spans, split_on, text_key)
    return inputs


def _span(file: File, source: int, root: int) -> Span:
    if is_url(file.name):
        return Span(file, source, root, file.fs.size(file.path) or 0, file.fs.ukey(file.path))
    status = os.stat(file.path)
    return Span(file, source, root, status.st_size, str(status.st_mtime_ns))


def _divide(spans: Sequence[Span], split_on: str | None, text_key: str) -> Iterator[FilePart]:
    """Parts of about one size."""
    room = min(max(sum(span.size for span in spans) // 256, LEAST), LARGEST)
    held: list[Span] = []
    size = 0
    for span in chain.from_iterable(_ranges(span, room) for span in spans):
        held.append(span)
        size += (span.size if span.stop is None else span.stop) - span.start
        if size >= room:
            yield FilePart(tuple(held), split_on, text_key)
            held, size = [], 0
    if held:
        yield FilePart(tuple(held), split_on, text_key)


def _ranges(span: Span, room: int) -> Iterator[Span]:
    """Ranges of a file that can be read from the middle on; other files whole."""
    divisible = span.file.kind == "parquet" or (
        span.file.kind == "jsonl" and span.file.compression is None
    )
    n = -(-span.size // room) if divisible else 1
    if n <= 1:
        yield span
        return
    places = [i * span.size // n for i in range(n)]
    for start, stop in zip(places, [*places[1:], None]):
        yield dataclasses.replace(span, start=start, stop=stop)
