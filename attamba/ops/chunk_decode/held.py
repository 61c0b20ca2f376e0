"""What one layer's attention holds while decoding: a ring, the past, and which is which.

    ring    the last R = L+1 tokens; position t lies at entry t mod R
    past    chunk ends older than the ring, at entries R, R+1, ... of each row and head

The past of a row is empty until its ring is full, so what is held is always a prefix of the
entries: attention needs no mask. Without a window (R none) position t simply lies at entry t.

Shapes: B rows, G key/value heads, D width of a head, R ring entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attamba.ops.chunk_decode.blocks import Blocks


class Held:
    """Entries of B rows and G heads.

    window: R, or None. blocks: the entries. n_past: int64 [B, G]. ring_ends: bool [B, G, R], does
    the token at a ring entry end a chunk? last_end: bool [B], does the row's next token start
    one, because the one before it ended one or because there is none? arrivals: int32 [B, G], zero
    between steps: there the programs of a kernel count themselves.
    """

    ROWS = ("n_past", "ring_ends", "last_end", "arrivals")

    def __init__(
        self,
        batch: int,
        heads: int,
        width: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.window, self.batch, self.heads = window, batch, heads
        self.blocks = Blocks(batch, heads, width, dtype, device)
        with torch.inference_mode(False):
            self.n_past = torch.zeros(batch, heads, dtype=torch.long, device=device)
            self.ring_ends = torch.zeros(batch, heads, window or 0, dtype=torch.bool, device=device)
            self.last_end = torch.ones(batch, dtype=torch.bool, device=device)
            self.arrivals = torch.zeros(batch, heads, dtype=torch.int32, device=device)
        self.known_past: tuple[int, int] | None = (0, 0)
        """Smallest and largest n_past as far as the host knows them; see past_range."""

    def ring_used(self, lengths: Tensor) -> Tensor:
        """Ring entries in use after `lengths` tokens, any shape."""
        return lengths if self.window is None else lengths.clamp(max=self.window)

    def past_range(self) -> tuple[int, int]:
        """Smallest and largest n_past; waits for the device only where it may have changed."""
        if self.known_past is None:
            low, high = torch.stack(self.n_past.aminmax()).tolist()
            self.known_past = low, high
        return self.known_past

    def reserve(self, entries: int) -> None:
        """Make room for `entries`; the whole ring lies in the first block."""
        self.blocks.reserve(max(entries, self.window or 0))

    def tensors(self) -> dict[str, Tensor]:
        """Counts and flags, row by row; keys and values are in `blocks`."""
        return {name: getattr(self, name) for name in self.ROWS}

    def reset(self) -> None:
        """Forget everything and give memory back."""
        self.blocks.clear()
        self.n_past.zero_()
        self.ring_ends.zero_()
        self.last_end.fill_(True)
        self.known_past = (0, 0)

    def select(self, index: Tensor) -> None:
        """Row i becomes a copy of row index[i]."""
        self.blocks.select(index)
        self.batch, self.known_past = index.shape[0], None
        for name in self.ROWS:
            setattr(self, name, getattr(self, name).index_select(0, index))
