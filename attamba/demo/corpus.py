"""The demo's text: the source of Python's own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

SKIPPED = {"__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data"}
SKIPPED |= {"site-packages", "test", "tests", "turtledemo"}
"""Folders that are tests, other people's packages, or text that is no program."""
HELD_OUT = 32
"""One file in so many is held out."""


def stdlib_files(root: Path | None = None) -> tuple[list[Path], list[Path]]:
    """Python files to train on, and to evaluate on, of the running interpreter's library.

    A file's share is decided by a hash of its path below `root`, so that it is the same on every
    machine with the same Python. Both lists are in the order of the hash, which mixes packages.
    root: another folder of .py files. Raises FileNotFoundError where there are none.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    hashed = {
        hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest(): path
        for path in root.rglob("*.py")
        if not SKIPPED & set(path.relative_to(root).parts) and _is_text(path)
    }
    files = [hashed[digest] for digest in sorted(hashed)]
    if len(files) < 2:
        raise FileNotFoundError(
            f"{root} holds {len(files)} usable .py files, but the demo needs two at least; run it "
            f"with a Python whose standard library is installed as source"
        )
    return split(files)


def split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files but the first one in HELD_OUT, and those."""
    n_held_out = max(1, len(files) // HELD_OUT)
    return files[n_held_out:], files[:n_held_out]


def _is_text(path: Path) -> bool:
    """Is there UTF-8 text in it? A few files of the library are in other encodings, or empty."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return bool(text.strip()) and "\0" not in text
