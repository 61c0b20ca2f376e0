"""Errors of the data package, and the import of packages that only it needs."""

from __future__ import annotations

import importlib
from typing import Any


class DataError(ValueError):
    """Text, a tokenizer or prepared data that cannot be used; says which file and what to do."""


class RecordError(DataError):
    """One record that is no text, among others that may be."""


class UnreachableError(OSError):
    """Storage that does not answer, or a connection that broke; says which URL and why."""

    may_pass = True
    """No mistake in a command: another try of it may go on."""


class MissingPackageError(ImportError):
    """An optional package is not installed; says how to install it."""


def require(module: str, extra: str = "train") -> Any:
    """Import an optional module. Raises MissingPackageError naming the extra that holds it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise  # the package is there and broken: its own message is the useful one
        raise MissingPackageError(
            f"{package} is not installed; it comes with: pip install 'attamba[{extra}]'"
        ) from error
