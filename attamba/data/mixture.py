"""Rows of several weighted sources, in an order that is a pure function of (seed, step).

Rows come in blocks of BLOCK. In each block every source has its share of rows, and their order is
drawn from (seed, block). So what a step is made of follows from its number alone: it does not
depend on ranks or workers, and resume is one integer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import DataError
from .loader import Batch, OrderedRows, draw_order

BLOCK = 1 << 14
"""Rows of a block, of which the least share is one."""
APART = 1 << 63
"""Keeps the draws of blocks apart from those of a source's epochs."""


class MixedBatches:
    """Rows of sources by weight, without end: each source begins anew when it is used up.

    sources: rows of the same T. weights: of each source, above 0; its share of the rows, and so of
        the tokens, is its weight over the sum of all.
    batch_size: B, rows per batch. seed: of the order; at least 0.

    Raises DataError for weights that are out of range, or too small for one row in a block.
    """

    def __init__(
        self,
        sources: Sequence[OrderedRows],
        weights: Sequence[float],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.sources, self.batch_size, self.seed = list(sources), batch_size, seed
        self.shares = _shares(weights)
        self.n_windows = sum(source.n_windows for source in sources)
        """Rows of all sources."""
        self._quotas = quotas(self.shares, BLOCK)
        for share, quota in zip(self.shares, self._quotas):
            if not quota:
                raise DataError(
                    f"weights={list(weights)}: a share of {share:.2g} is less than one row in "
                    f"{BLOCK}; leave that source out or raise its weight"
                )
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def batch(self, step: int) -> Batch:
        """Rows step * B to (step + 1) * B of the endless mixture."""
        if step < 0:
            raise DataError(f"step={step} must be at least 0")
        places = [
            self.place(row) for row in range(step * self.batch_size, (step + 1) * self.batch_size)
        ]
        return _gather(self.sources, [(s, self.sources[s].window(row)) for s, row in places])

    def rows(self, windows: Sequence[int]) -> Batch:
        """The given rows, the sources one after the other, each in the order of its text."""
        return _gather(self.sources, [self._find(window) for window in windows])

    def _find(self, window: int) -> tuple[int, int]:
        for number, source in enumerate(self.sources):
            if 0 <= window < source.n_windows:
                return number, window
            window -= source.n_windows
        raise IndexError(f"a window beyond the {self.n_windows} of all sources")

    def place(self, row: int) -> tuple[int, int]:
        """The source of a row of the mixture, and which of that source's rows it is."""
        block, at = divmod(row, BLOCK)
        if block not in self._blocks:
            # A batch may begin in one block and end in the next: keep two.
            self._blocks = {b: v for b, v in self._blocks.items() if b == block - 1}
            self._blocks[block] = self._draw(block)
        source, number = (int(values[at]) for values in self._blocks[block])
        return source, block * self._quotas[source] + number

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of a block: its source, and its number among that source's in the block."""
        names = np.repeat(np.arange(len(self._quotas)), self._quotas)
        numbers = np.concatenate([np.arange(quota) for quota in self._quotas])
        order = draw_order(BLOCK, self.seed, APART + block)
        source = names[order]
        # Each source's rows in their own order, at the places that were drawn for it.
        number = np.empty(BLOCK, dtype=np.int64)
        number[np.argsort(source, kind="stable")] = numbers
        return source, number


class MixedHeldOut:
    """The rows of held-out sources, in number by weight: as many as can be without any twice.

    sources, weights: as for MixedBatches.
    """

    def __init__(self, sources: Sequence[OrderedRows], weights: Sequence[float]) -> None:
        self.sources, self.shares = list(sources), _shares(weights)
        n = min(source.n_windows / share for source, share in zip(self.sources, self.shares))
        self._quotas = [
            min(max(1, int(n * share + 1e-9)), source.n_windows)
            for source, share in zip(self.sources, self.shares)
        ]
        self.n_windows = sum(self._quotas)
        """Rows that rows() can give."""

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per token of the mixture."""
        return sum(s.bytes_per_token * share for s, share in zip(self.sources, self.shares))

    def batch(self, step: int) -> Batch:
        """Row `step`, in the order of rows()."""
        return self.rows([step % self.n_windows])

    def rows(self, windows: Sequence[int]) -> Batch:
        """The given rows, the sources one after the other; each source's spread over its text."""
        return _gather(self.sources, [self._find(window) for window in windows])

    def _find(self, window: int) -> tuple[int, int]:
        for number, (source, quota) in enumerate(zip(self.sources, self._quotas)):
            if 0 <= window < quota:
                return number, window * source.n_windows // quota
            window -= quota
        raise IndexError(f"a window beyond the {self.n_windows} of all sources")


def quotas(shares: Sequence[float], n: int) -> list[int]:
    """n rows divided by shares that sum to 1, to the largest remainders."""
    exact = np.asarray(shares) * n
    whole = np.floor(exact).astype(np.int64)
    missing = n - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:missing]] += 1
    return whole.tolist()


def _shares(weights: Sequence[float]) -> list[float]:
    if not weights or not all(weight > 0 for weight in weights):
        raise DataError(f"weights={list(weights)} must be above 0, one for each source")
    return [weight / sum(weights) for weight in weights]


def _gather(sources: Sequence[OrderedRows], places: Sequence[tuple[int, int]]) -> Batch:
    rows = [sources[source].row(window) for source, window in places]
    return Batch(
        *(
            np.concatenate([getattr(row, name) for row in rows])
            for name in ("inputs", "targets", "doc_ids")
        )
    )
