"""Which files a path means, and what kind each is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import DataError, require

TEXT_SUFFIXES = (".txt", ".md", ".py")
NAMED_SUFFIXES = (*TEXT_SUFFIXES, ".raw")
"""Of a file that is named itself: WikiText has wiki.test.raw. In a folder .raw may be anything."""
COMPRESSIONS = {".xz": "xz", ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
READABLE = ".txt .md .py .jsonl (each also as .xz .gz .bz2 .zst) and .parquet"

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class File:
    """A file to read: `name` is for people, `path` for the file system `fs`."""

    fs: Any
    path: str
    name: str
    kind: str
    """text, jsonl or parquet."""
    compression: str | None


def as_list(paths: Paths) -> list[str]:
    """The paths as a list of text. Raises DataError for none, and for one that is given twice."""
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not listed or not all(str(path) for path in listed):
        raise DataError("no path given; name at least one text file or folder")
    roots = [str(path) for path in listed]
    seen = set()
    for root in roots:
        if root in seen:
            raise DataError(f"{root} is given twice; name each path once")
        seen.add(root)
    return roots


def is_url(path: str | Path) -> bool:
    """Is it for fsspec, as s3://bucket/folder is?"""
    return "://" in str(path)


def find_files(root: str) -> list[File]:
    """The files to read at `root`: a file, those below a folder, or those that a pattern matches.

    A pattern holds ``*``, ``?``, ``[...]`` or ``**``; a file that has that very name comes first.
    Sorted by path. Raises DataError if there is nothing to read.
    """
    fs, path = _file_system(root)
    if not fs.exists(path):
        if any(sign in root for sign in "*?["):
            return _matches(fs, path, root)
        raise DataError(f"{root} does not exist; check the path")
    if not fs.isdir(path):
        file = _classify(fs, path, root, NAMED_SUFFIXES)
        if file is None:
            raise DataError(f"{root} is not a kind of file that is read; there are: {READABLE}")
        return [file]
    files = _below(fs, path, root)
    if not files:
        raise DataError(f"{root} holds no file of a kind that is read; there are: {READABLE}")
    return files


def open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises DataError where the URL's kind is unknown or needs a package that is not installed.
    """
    core = require("fsspec").core
    try:
        return core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        # fsspec says which package reads URLs of this kind.
        raise DataError(f"{url} cannot be opened: {error}") from error


def _file_system(root: str) -> tuple[Any, str]:
    if is_url(root):
        return open_url(root)
    # Not url_to_fs: to it, "::" and "*" in a file's name mean something.
    fs = require("fsspec.implementations.local").LocalFileSystem()
    return fs, os.path.abspath(os.path.expanduser(root))


def _below(fs: Any, path: str, root: str) -> list[File]:
    """Every readable file below a folder; what is hidden is passed over."""
    found = []
    for entry in sorted(fs.find(path)):
        inner = PurePosixPath(entry).relative_to(PurePosixPath(path))
        if not any(part.startswith(".") for part in inner.parts):
            found.append(_classify(fs, entry, f"{root.rstrip('/')}/{inner}"))
    return [file for file in found if file is not None]


def _matches(fs: Any, pattern: str, root: str) -> list[File]:
    found = []
    for entry in sorted(fs.glob(pattern)):
        name = fs.unstrip_protocol(entry) if is_url(root) else entry
        found.append(None if fs.isdir(entry) else _classify(fs, entry, name))
    files = [file for file in found if file is not None]
    if not files:
        raise DataError(f"{root} matches no file of a kind that is read; there are: {READABLE}")
    return files


def _classify(fs: Any, path: str, name: str, texts: tuple[str, ...] = TEXT_SUFFIXES) -> File | None:
    """What kind of file it is, by its suffixes; None: one that is not read.

    texts: suffixes of plain text.
    """
    stem, suffix = os.path.splitext(path.lower())
    if suffix == ".parquet":
        return File(fs, path, name, "parquet", None)
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    if suffix == ".jsonl":
        return File(fs, path, name, "jsonl", compression)
    if suffix in texts:
        return File(fs, path, name, "text", compression)
    return None
