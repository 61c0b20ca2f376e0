"""The files of a prepared folder: on a local disk, or at a URL and kept in a cache.

A file of a URL is read whole when it is first asked for, and its SHA-256 is compared before it is
used; where it cannot be reached, that is tried a few times. The cache is $ATTAMBA_CACHE, else
~/.cache/attamba; what is there is named by its SHA-256, so that folders share it and nothing in it
is ever out of date. It is never tidied: it may be deleted.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from .errors import DataError, UnreachableError
from .files import sha256
from .inputs import is_url, open_url, reaching

logger = logging.getLogger(__name__)

PAUSES = (1, 4, 16)
"""Seconds before another try to fetch a file."""
ANEW = "prepare the data anew (attamba data prepare)"


class Folder(Protocol):
    """Where files are."""

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where it is missing."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where that is unknown. Raises FileNotFoundError."""

    def holds(self, pattern: str) -> bool:
        """Is a file here whose name matches, as tokens-*.bin does?"""

    def is_whole(self, name: str, entry: dict[str, Any]) -> bool:
        """Is the content, read now, what the manifest says? Of a URL's file that is kept in the
        cache also that; one that is not is dropped there, to be read again."""

    def local(self, name: str, entry: dict[str, Any]) -> Path:
        """The file on a local disk. entry: its bytes and SHA-256, by the manifest."""


def open_folder(path: str | Path) -> Folder:
    """The folder at a local path or a URL that fsspec knows."""
    return RemoteFolder(str(path)) if is_url(path) else LocalFolder(Path(path))


class LocalFolder:
    """A folder on a local disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    def size(self, name: str) -> int | None:
        return (self.path / name).stat().st_size

    def holds(self, pattern: str) -> bool:
        return any(self.path.glob(pattern))

    def is_whole(self, name: str, entry: dict[str, Any]) -> bool:
        return sha256(self.path / name) == entry["sha256"]

    def local(self, name: str, entry: dict[str, Any]) -> Path:
        return self.path / name


class RemoteFolder:
    """A folder at a URL. Raises DataError where the URL's kind is unknown, or it may not be read,
    and UnreachableError where it cannot be reached."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, self._path = open_url(self.url)

    def read(self, name: str) -> bytes | None:
        try:
            with reaching(f"{self.url}/{name}"):
                return self._fs.cat_file(f"{self._path}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, name: str) -> int | None:
        size = self._listing.get(name)
        if size is not None:
            return size
        with reaching(f"{self.url}/{name}"):
            return self._fs.info(f"{self._path}/{name}")["size"]

    def holds(self, pattern: str) -> bool:
        return any(fnmatch(name, pattern) for name in self._listing)

    @cached_property
    def _listing(self) -> dict[str, int | None]:
        """Files and their sizes, of one request instead of one for each file.

        Over HTTP sizes are missing, and what a server does not list may be there.
        """
        try:
            with reaching(self.url):
                found = self._fs.find(self._path, detail=True)
        except (DataError, FileNotFoundError):  # it lists nothing; each file is asked for
            return {}
        return {
            path.removeprefix(self._path).lstrip("/"): info["size"] for path, info in found.items()
        }

    def is_whole(self, name: str, entry: dict[str, Any]) -> bool:
        kept = _kept(name, entry)
        if kept.is_file() and sha256(kept) != entry["sha256"]:
            kept.unlink()
        with self._fetched(name, kept) as aside:
            return sha256(aside) == entry["sha256"]

    def local(self, name: str, entry: dict[str, Any]) -> Path:
        kept = _kept(name, entry)
        if kept.is_file() and kept.stat().st_size == entry["bytes"]:
            return kept
        with self._fetched(name, kept) as aside:
            if sha256(aside) != entry["sha256"]:
                raise DataError(
                    f"{self.url}/{name} is not what its manifest says: it was altered or cut off "
                    f"on the way; copy it there again, or {ANEW}"
                )
            os.replace(aside, kept)
        return kept

    @contextmanager
    def _fetched(self, name: str, kept: Path) -> Iterator[Path]:
        """The file, read now and put beside its place in the cache, for as long as entered.

        It is got as a whole: servers that send no part of a file would not let it be read in parts.
        """
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(f".{kept.name}.{os.getpid()}")
        try:
            self._get(name, aside)
            yield aside
        finally:
            aside.unlink(missing_ok=True)

    def _get(self, name: str, to: Path) -> None:
        """Read a file, and again after each of PAUSES where it cannot be reached."""
        url = f"{self.url}/{name}"
        for pause in (*PAUSES, None):
            try:
                with reaching(url):
                    self._fs.get_file(f"{self._path}/{name}", str(to))
                return
            except UnreachableError as error:
                if pause is None:
                    raise
                why = str(error.__cause__) or type(error.__cause__).__name__
                logger.warning("%s cannot be reached (%s); trying again in %d s", url, why, pause)
                time.sleep(pause)


def _kept(name: str, entry: dict[str, Any]) -> Path:
    """Where the cache has a file, if it does."""
    return _cache() / entry["sha256"][:2] / f"{entry['sha256']}{Path(name).suffix}"


def _cache() -> Path:
    given = os.environ.get("ATTAMBA_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "attamba"
