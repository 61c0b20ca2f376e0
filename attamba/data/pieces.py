"""Cutting long texts and grouping short ones, so that memory stays bounded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

PIECE = 1 << 16
"""Characters after which a long text is cut."""
BATCH = 1 << 22
"""Characters that are tokenized together: enough for every core, little enough for memory."""

_PLACE = re.compile(r"(?<=\S)\n(?=\S)")


def cut(text: str) -> Iterator[str]:
    """Pieces of about PIECE characters, cut after single newlines between lines of text.

    No word crosses such a place, nor do the byte-level pre-tokenizers in use join what stands on
    either side of it, so that the pieces' tokens are the text's. Without one the text stays whole.
    """
    start = 0
    while len(text) - start > PIECE:
        match = _PLACE.search(text, start + PIECE)
        if not match:
            break
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def batched(sized: Iterable[tuple[int, T]]) -> Iterator[list[T]]:
    """Lists of items whose sizes sum to at least BATCH, from (size, item); the last may be less."""
    batch: list[T] = []
    total = 0
    for size, item in sized:
        batch.append(item)
        total += size
        if total >= BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
