"""Runs a decoder over prompts, then over one more token per row at a time.

Shapes: B rows, T prompt tokens (padded on the left to the longest), V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attamba.models.decoder import Decoder
from attamba.models.graph import CapturedStep, can_capture
from attamba.models.registry import future_policy
from attamba.ops.chunking import cannot_decode


class Runner:
    """Runs the model over the prompt, then over one more token per row at a time."""

    def __init__(
        self,
        model: Decoder,
        rows: Tensor,
        mask: Tensor | None,
        ends: Tensor | None,
        use_cache: bool,
        prefill_chunk: int | None,
    ) -> None:
        policy = future_policy(model.config)
        if policy is not None:  # without a cache too: each token would move the chunks before it
            raise ValueError(cannot_decode(policy))
        self.model, self.ids, self.mask = model, rows, mask
        self.ends = None if ends is None else ends.to(rows.device)
        self.rows = rows.shape[0]
        self.prompt_tokens = rows.numel() if mask is None else int(mask.sum())
        self.seen = 0  # columns of ids and ends that the cache holds
        self.prefill_chunk = prefill_chunk
        self.going_on: Tensor | None = None  # bool [B], rows that append_unread has not frozen
        with torch.inference_mode():
            self.cache = model.new_cache(batch_size=self.rows) if use_cache else None
        self.captured = self.cache is not None and can_capture(self.cache)
        self.step = CapturedStep(model, self.cache) if self.captured and self.cache else None

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Logits [B, V] after the tokens so far."""
        if self.cache is None:
            return self._forward(slice(0, self.ids.shape[1]))
        width = self.ids.shape[1]
        if self.step is not None and width == 1 and self.seen:
            self.seen += 1
            return self.step(self.ids, self.mask)
        piece = self.prefill_chunk or width
        for start in range(0, width, piece):
            stop = min(start + piece, width)
            logits = self._forward(slice(self.seen + start, self.seen + stop), slice(start, stop))
        self.seen += width
        return logits

    @torch.inference_mode()
    def append_unread(self, drawn: Tensor, eos_id: int | None) -> None:
        """As append, for tokens that the host has not seen: the device freezes ended rows."""
        self.ids, self.mask = drawn[:, None], None
        if eos_id is not None:
            going_on = drawn != eos_id
            self.going_on = going_on if self.going_on is None else self.going_on & going_on
            self.mask = self.going_on[:, None]

    def append(self, drawn: list[int], active: list[bool]) -> None:
        """Take the drawn tokens [B] as the next input; rows that ended are frozen in the cache."""
        column = torch.tensor(drawn, device=self.ids.device)[:, None]
        if self.cache is None:
            # A row that ended goes on unheard: no other row sees it.
            self.ids = torch.cat([self.ids, column], dim=1)
            if self.mask is not None:
                self.mask = torch.cat([self.mask, torch.ones_like(column, dtype=torch.bool)], dim=1)
        else:
            self.ids = column
            self.mask = None if all(active) else torch.tensor(active, device=column.device)[:, None]

    def _forward(self, columns: slice, local: slice = slice(None)) -> Tensor:
        """Last logits of `local` columns of ids, which are `columns` of the whole sequence."""
        hidden = self.model(
            self.ids[:, local],
            attention_mask=None if self.mask is None else self.mask[:, local],
            ends=None if self.ends is None else self.ends[..., columns],
            cache=self.cache,
            return_hidden=True,
        )
        return self.model.head(hidden[:, -1])


class Drawn:
    """Tokens on their way to the host."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.copy = ids, ids
        self.arrived: torch.cuda.Event | None = None
        if ids.is_cuda:
            self.copy = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
            self.copy.copy_(ids, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def tokens(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copy.tolist()
