"""Rows of whole documents: best-fit packing (Ding et al. 2024, arXiv 2404.10830).

A row of the stream begins and ends wherever T tokens are over, so that most of its documents are
torn. Here a document is cut only where it is longer than a row, and what is left of it shares a row
with others, chosen by length so that little room stays empty.

Shapes: B rows, T tokens; pieces are documents, or parts of T tokens of longer ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import DataError
from .loader import UNSCORED, Batch, OrderedRows


class PackedBatches(OrderedRows):
    """Rows of whole documents, filled up with the separator at the right.

    A document longer than T tokens (its separator is one of them) is cut into rows of T and a rest.
    Every token is an input once; its target is the token after it, that after a document's last
    token being the next separator. Targets of the filling are UNSCORED. In doc_ids each piece is a
    document, and so is the filling.

    dataset, seq_len, batch_size, seed, start, stop: as for Batches. A document that the fraction
        cuts gives the part that lies in it, and no token after the fraction is a target.

    Raises DataError if an argument is out of range or there is no token.
    """

    filling: float
    """Share of the rows that is empty."""

    def _count(self) -> int:
        n_tokens = max(0, self._last - self._first - 1)
        if not n_tokens:
            raise DataError(
                f"{self.dataset.folder}: {self._fraction} of its {self.dataset.n_tokens} tokens "
                f"holds no two tokens; give more text or a larger fraction"
            )
        starts = self.dataset.starts
        starts = starts[slice(*np.searchsorted(starts, [self._first + 1, self._last - 1]))]
        begins = np.concatenate([[self._first], starts])
        lengths = np.diff(np.append(begins, self._last - 1))
        self._begins, self._lengths, self._rows = _pack(begins, lengths, self.seq_len)
        n_rows = len(self._rows) - 1
        self.filling = 1 - n_tokens / (n_rows * self.seq_len)
        self._eos_id = int(self.dataset.manifest["tokenizer"]["eos_id"])
        return n_rows

    def rows(self, windows: Sequence[int]) -> Batch:
        """The given rows; those of documents that were cut come first. int64 [len(windows), T]."""
        shape = (len(windows), self.seq_len)
        inputs = np.full(shape, self._eos_id, dtype=np.int64)
        targets = np.full(shape, UNSCORED, dtype=np.int64)
        doc_ids = np.zeros(shape, dtype=np.int64)
        for row, window in enumerate(windows):
            if not 0 <= window < self.n_windows:
                raise IndexError(f"window {window} of {self.n_windows}")
            at = 0
            first, last = self._rows[window], self._rows[window + 1]
            for number, piece in enumerate(range(first, last)):
                begin, length = int(self._begins[piece]), int(self._lengths[piece])
                tokens = self.dataset.tokens(begin, begin + length + 1)
                here = slice(at, at + length)
                inputs[row, here], targets[row, here] = tokens[:-1], tokens[1:]
                doc_ids[row, here] = number
                at += length
            doc_ids[row, at:] = last - first
        return Batch(inputs, targets, doc_ids)


def _pack(
    begins: np.ndarray, lengths: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Begins and lengths of pieces, row by row, and the first piece of each row (and an end)."""
    n_full = lengths // seq_len
    document = np.repeat(np.arange(len(lengths)), n_full)
    number = np.arange(len(document)) - np.repeat(np.cumsum(n_full) - n_full, n_full)
    full = begins[document] + number * seq_len
    rest = lengths % seq_len
    has_rest = rest > 0
    rest_begins, rest = (begins + n_full * seq_len)[has_rest], rest[has_rest]
    bins = best_fit(rest, seq_len)
    # Within a row, pieces keep the order of the text.
    order = np.argsort(bins, kind="stable")
    sizes = np.bincount(bins) if len(bins) else np.empty(0, dtype=np.int64)
    return (
        np.concatenate([full, rest_begins[order]]),
        np.concatenate([np.full(len(full), seq_len), rest[order]]),
        np.concatenate([np.arange(len(full) + 1), len(full) + np.cumsum(sizes)]),
    )


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item by best-fit decreasing: the fullest bin that it fits into.

    Items of one length and bins of one room are dealt with together, so that the work grows with
    the number of different lengths, not with that of items.

    lengths: int [n], each 1 to capacity. Returns int64 [n]; bins are counted from 0.
    """
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    bins = np.empty(len(lengths), dtype=np.int64)
    rooms = _Rooms(capacity)
    at = 0
    for length in range(capacity, 0, -1):
        left = int(counts[length])
        while left:
            room, there = rooms.smallest(length, left)
            # One after the other: a bin that took an item is fuller, and so the next one's, too.
            each = room // length
            taken = min(left, len(there) * each)
            n_full, more = divmod(taken, each)
            bins[order[at : at + taken]] = np.repeat(there, each)[:taken]
            rooms.put(room - each * length, there[:n_full])
            rooms.put(room - more * length, there[n_full : n_full + 1])
            rooms.put(room, there[n_full + 1 :])
            at, left = at + taken, left - taken
    return bins


class _Rooms:
    """Bins by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._n = capacity, 0
        self._bins: dict[int, list[np.ndarray]] = {}
        self._is_there = np.zeros(capacity + 1, dtype=bool)

    def smallest(self, length: int, items: int) -> tuple[int, np.ndarray]:
        """Take out all bins of the least room for `length`; or new ones, enough for the items."""
        room = length + int(np.argmax(self._is_there[length:]))
        if self._is_there[room]:
            self._is_there[room] = False
            return room, np.concatenate(self._bins.pop(room))
        n_new = -(-items // (self._capacity // length))
        self._n += n_new
        return self._capacity, np.arange(self._n - n_new, self._n)

    def put(self, room: int, bins: np.ndarray) -> None:
        """Put bins back."""
        if room and len(bins):
            self._bins.setdefault(room, []).append(bins)
            self._is_there[room] = True
