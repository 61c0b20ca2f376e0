"""Rows to train and validate on. Their order is a pure function of (seed, step)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import DataError
from .shards import TokenDataset

UNSCORED = -100
"""A target that does not count; torch's cross_entropy passes it over by default, too."""


@dataclass(frozen=True)
class Batch:
    """Rows of T tokens; all arrays are int64 [B, T]."""

    inputs: np.ndarray
    targets: np.ndarray
    """The token after each input, or UNSCORED."""
    doc_ids: np.ndarray
    """The document of each input: 0 at the row's first token, one more at each eos after it."""

    @property
    def n_scored(self) -> int:
        """Targets that count."""
        return int((self.targets != UNSCORED).sum())


class OrderedRows(ABC):
    """Rows of one data set, in an order that is drawn anew for each epoch.

    dataset: where the rows are from. seq_len: T, tokens per row. batch_size: B, rows per batch.
    seed: of the order; at least 0. start, stop: the fraction [start, stop) of the data set's tokens
    that is used; 0 <= start < stop <= 1.

    Raises DataError if an argument is out of range.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise DataError(f"{name}={value} must be at least {least}")
        if not 0 <= start < stop <= 1:
            raise DataError(f"start={start}, stop={stop} must be fractions, 0 <= start < stop <= 1")
        self.dataset, self.seq_len, self.batch_size, self.seed = dataset, seq_len, batch_size, seed
        self._first, self._last = int(start * dataset.n_tokens), int(stop * dataset.n_tokens)
        self._fraction = f"the fraction [{start:g}, {stop:g})"
        self._orders: dict[int, np.ndarray] = {}
        self.n_windows = self._count()
        """Rows, that is steps * batch_size per epoch."""

    @abstractmethod
    def _count(self) -> int:
        """How many rows the tokens [_first, _last) give. Raises DataError if they give none."""

    @cached_property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per token of [start, stop)."""
        n_bytes = self.dataset.n_bytes_of(self._first, self._last)
        return n_bytes / (self._last - self._first)

    def batch(self, step: int) -> Batch:
        """Rows step * B to (step + 1) * B of the endless row of epochs."""
        if step < 0:
            raise DataError(f"step={step} must be at least 0")
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        return self.rows([self.window(row) for row in rows])

    def row(self, i: int) -> Batch:
        """Row i, in the order of the text; a batch of one row."""
        return self.rows([i])

    @abstractmethod
    def rows(self, windows: Sequence[int]) -> Batch:
        """The given rows, counted in the order of the text; a batch of len(windows) rows."""

    def window(self, row: int) -> int:
        """The row, counted in the order of the text, that has this place among all epochs."""
        epoch, place = divmod(row, self.n_windows)
        if epoch not in self._orders:
            # A batch may begin in one epoch and end in the next: keep two.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = draw_order(self.n_windows, self.seed, epoch)
        return int(self._orders[epoch][place])


class Batches(OrderedRows):
    """Windows of a dataset: all documents one after the other, cut every T tokens.

    dataset: tokens [floor(start * n), floor(stop * n)) of it are used, n being all its tokens; two
        Batches that meet in one fraction share no token.
    seq_len: T, tokens per row. Window w covers T + 1 tokens from the (w * T)-th on: as inputs,
        windows do not overlap. A rest that is too short for a window is left out.
    batch_size: B, rows per batch.
    seed: of the order; at least 0.
    start, stop: 0 <= start < stop <= 1.

    Raises DataError if an argument is out of range or there are too few tokens for one window.
    """

    def _count(self) -> int:
        n_tokens = self._last - self._first
        n_windows = max(0, (n_tokens - 1) // self.seq_len)
        if not n_windows:
            raise DataError(
                f"{self.dataset.folder}: {self._fraction} of its {self.dataset.n_tokens} "
                f"tokens is {n_tokens} tokens, and one window of seq_len={self.seq_len} needs "
                f"{self.seq_len + 1}; give more text, a shorter seq_len or a larger fraction"
            )
        return n_windows

    def rows(self, windows: Sequence[int]) -> Batch:
        """The given windows, in the order of the text; a batch of len(windows) rows."""
        for w in windows:
            if not 0 <= w < self.n_windows:
                raise IndexError(f"window {w} of {self.n_windows}")
        T = self.seq_len
        begins = [self._first + w * T for w in windows]
        tokens = np.stack([self.dataset.tokens(b, b + T + 1) for b in begins])
        documents = np.stack([self.dataset.doc_ids(b, b + T) for b in begins])
        return Batch(
            inputs=np.ascontiguousarray(tokens[:, :-1]),
            targets=np.ascontiguousarray(tokens[:, 1:]),
            doc_ids=documents - documents[:, :1],
        )


def draw_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(n), the same for ever.

    Philox's raw numbers are sorted, because numpy promises that those never change, which it does
    not promise of Generator.permutation.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
