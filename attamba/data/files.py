"""Files that are never half written, and what they hold as a SHA-256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attamba.config import ConfigError


def write_aside(path: Path, content: bytes) -> None:
    """Write a file aside and rename it: at any moment `path` holds the old content or the new.

    A process that is killed may leave the file aside, ".<name>.<process id>"; an error does not.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, tree: Any) -> None:
    """write_aside of a tree as JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, (json.dumps(tree, indent=1) + "\n").encode())


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a later rename cannot outrun it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path, on_block: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file's content, in hex. on_block: called after each mebibyte."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
            on_block()
    return digest.hexdigest()


@contextmanager
def naming(path: Path, whole: str) -> Iterator[None]:
    """Errors of the system name the file that was written, as those of a full disk do not.

    whole: what the same command goes on from when there is room.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            told = f"{error.strerror}; make room, and the same command goes on from {whole}"
            raise OSError(error.errno, told, str(path)) from error
        raise


@contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Hold a lock, the file `path`, for this process; False where another process holds it.

    The system drops the lock when the process ends, however it ends.
    """
    import fcntl

    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def check_new_folder(out: Path) -> None:
    """Raise ConfigError where something is that would be replaced, or mixed with what is new."""
    if out.resolve() == Path.cwd():
        raise ConfigError(f"{out} is the current folder; name one in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; name another folder, or delete it")
