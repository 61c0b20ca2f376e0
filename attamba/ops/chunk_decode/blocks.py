"""Storage of a decode cache: keys and values in blocks that are added and never moved.

Shapes: B rows, G key/value heads, D width of a head. An entry is one key and one value of each
row and head; entries are numbered through all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PAGE = 256
"""Entries by which storage grows; a block holds a whole number of pages."""


class Blocks:
    """Keys and values [B, G, n_i, D] of blocks i, and for kernels a table of their addresses.

    table: int64 [at least the number of pages, 3] on the device, or None where no kernel runs:
        address of the page's keys, of its values (row 0, head 0), and elements between heads.
        It keeps its place in memory until there are more pages than it has rows.
    """

    def __init__(
        self, batch: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape, self.dtype, self.device = (batch, heads, width), dtype, device
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.table: Tensor | None = None

    @property
    def capacity(self) -> int:
        return sum(block.shape[2] for block in self.k)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.k
        yield from self.v
        if self.table is not None:
            yield self.table

    def reserve(self, entries: int) -> None:
        """Make room for `entries` in all, by one block more if need be."""
        held = self.capacity
        if entries <= held:
            return
        pages = -(-(entries - held) // PAGE)
        if self.device.type == "cpu":
            # There each block costs operations of its own at every step: few, and larger ones.
            pages = max(pages, held // (8 * PAGE))
        batch, heads, width = self.shape
        with torch.inference_mode(False):
            for blocks in (self.k, self.v):
                # Zeros, not whatever was there: a masked score times NaN would be NaN.
                shape = (batch, heads, pages * PAGE, width)
                blocks.append(torch.zeros(shape, dtype=self.dtype, device=self.device))
        if self.table is not None:
            self._list(len(self.k) - 1, held // PAGE)

    def page_table(self) -> Tensor:
        """The table, made at the first call and kept up to date from then on."""
        if self.table is None:
            self._list(0, 0)
        assert self.table is not None
        return self.table

    def _list(self, first_block: int, first_page: int) -> None:
        """Write the pages of blocks from `first_block` on into the table."""
        pages = self.capacity // PAGE
        if self.table is None or pages > self.table.shape[0]:
            rows = 1 << max(10, pages.bit_length())
            with torch.inference_mode(False):
                table = torch.zeros(rows, 3, dtype=torch.long, device=self.device)
            if self.table is not None:
                table[:first_page] = self.table[:first_page]
            self.table = table
        lines = []
        for k, v in zip(self.k[first_block:], self.v[first_block:]):
            step = PAGE * k.stride(2) * k.element_size()
            for page in range(k.shape[2] // PAGE):
                lines.append([k.data_ptr() + page * step, v.data_ptr() + page * step, k.stride(1)])
        self.table[first_page:pages] = torch.tensor(lines, dtype=torch.long).view(-1, 3)

    def locate(self, entry: int) -> tuple[int, int]:
        """Block of an entry and its place in it."""
        for i, block in enumerate(self.k):
            if entry < block.shape[2]:
                return i, entry
            entry -= block.shape[2]
        raise IndexError(f"entry {entry} beyond the capacity")

    def put(
        self, rows: Tensor, heads: Tensor | slice, entries: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Write at (rows[i], heads or heads[i], entries[i]). k, v: [n, G, D], or [n, D]."""
        begin = 0
        for block_k, block_v in zip(self.k, self.v):
            end = begin + block_k.shape[2]
            here: Tensor | slice = slice(None)
            at = entries
            if len(self.k) > 1:
                here = ((entries >= begin) & (entries < end)).nonzero().flatten()
                at = entries[here] - begin
            index = (rows[here], heads if isinstance(heads, slice) else heads[here], at)
            block_k[index] = k[here].to(self.dtype)
            block_v[index] = v[here].to(self.dtype)
            begin = end

    def joined(self, entries: int) -> tuple[Tensor, Tensor]:
        """The first `entries` keys and values, [B, G, entries, D]; copied if in several blocks."""
        batch, heads, width = self.shape
        if not self.k:
            empty = torch.empty(batch, heads, 0, width, dtype=self.dtype, device=self.device)
            return empty, empty
        k, v = (b[0] if len(b) == 1 else torch.cat(b, 2) for b in (self.k, self.v))
        return k[:, :, :entries], v[:, :, :entries]

    def select(self, index: Tensor) -> None:
        """Row i becomes a copy of row index[i], block after block."""
        for blocks in (self.k, self.v):
            for i, block in enumerate(blocks):
                blocks[i] = block.index_select(0, index)
        self.shape = (index.shape[0], *self.shape[1:])
        if self.table is not None:
            self._list(0, 0)

    def clear(self) -> None:
        """Give the memory back."""
        self.k, self.v, self.table = [], [], None
