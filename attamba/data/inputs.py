"""Which files a path means, and what kind each is."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import DataError, UnreachableError, require

TEXT_SUFFIXES = (".txt", ".md", ".py")
NAMED_SUFFIXES = (*TEXT_SUFFIXES, ".raw")
"""Of a file that is named itself: WikiText has wiki.test.raw. In a folder .raw may be anything."""
COMPRESSIONS = {".xz": "xz", ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
READABLE = ".txt .md .py .jsonl (each also as .xz .gz .bz2 .zst) and .parquet"

BROKEN = (
    *(errno.EIO, errno.EBUSY, errno.ETIMEDOUT),  # s3fs: what the server could not do just then
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
"""Errors of the system that a network passes on."""
NETWORK_ERRORS = (
    ("aiohttp", "ClientError"),
    ("asyncio", "TimeoutError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("httpx", "TransportError"),
)
"""Of the packages behind fsspec, which have no common class."""
MISSING = (404, 410)
BUSY = (408, 429)
"""Statuses of HTTP; so are those from 500."""

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
    if not _exists(fs, path, root):
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


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """What keeps a URL from being read names it; FileNotFoundError stays where a file is missing.

    Raises UnreachableError for what may pass, DataError where the server refuses.
    """
    try:
        yield
    except Exception as error:
        # Over HTTP fsspec says of whatever fails that the file is missing; the cause knows better.
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
        status = _http_status(cause)
        if status in MISSING or cause is None:
            raise
        told = str(cause) or type(cause).__name__
        if _is_broken(cause, status):
            raise UnreachableError(
                f"{url} cannot be reached ({told}); try again when the network and the server work"
            ) from cause
        if status or (isinstance(cause, PermissionError) and cause.filename is None):
            raise DataError(
                f"{url} is refused ({told}); check the address, and the right to read it"
            ) from cause
        raise


def _is_broken(error: BaseException, status: int) -> bool:
    """Has a connection, a server or the time run out, rather than the answer been no?"""
    if status:
        return status >= 500 or status in BUSY
    if isinstance(error, (ConnectionError, TimeoutError)) or getattr(error, "errno", 0) in BROKEN:
        return True
    known = [getattr(sys.modules.get(module), name, None) for module, name in NETWORK_ERRORS]
    of_network = isinstance(error, tuple(kind for kind in known if kind is not None))
    return of_network and not isinstance(error, ValueError)  # a URL that cannot be one


def _http_status(error: Any) -> int:
    """What a server answered, as aiohttp, gcsfs and requests keep it; 0: nothing."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    status = status or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else 0


def _exists(fs: Any, path: str, root: str) -> bool:
    if fs.exists(path):
        return True
    if not is_url(root):
        return False
    try:
        with reaching(root):
            fs.info(path)  # over HTTP, exists says no of a server that is down
    except FileNotFoundError:
        return False
    return True


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
