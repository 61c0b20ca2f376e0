"""Choosing tokens, and turning them into text that never shows half a character or a stop string.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from attamba.data.tokenizer import StreamDecoder, Tokenizer


class Sampler:
    """Logits [B, V] -> token ids [B]."""

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
        rows: int,
        device: torch.device,
    ) -> None:
        self.temperature, self.top_k, self.top_p, self.device = temperature, top_k, top_p, device
        # On the CPU whatever the model's device, so that a seed means the same everywhere.
        self.generators = [torch.Generator() for _ in range(rows)]
        entropy = int(torch.randint(2**62, ())) if seed is None else seed
        for row, generator in enumerate(self.generators):
            (state,) = np.random.SeedSequence((entropy, row)).generate_state(1, np.uint64)
            generator.manual_seed(int(state >> np.uint64(1)))

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # float64, and the maximum taken off first: no temperature overflows, and a cumulative
        # sum over a large vocabulary keeps its small probabilities.
        logits = logits.double()
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            probs[:, self.top_k :] = 0
            probs /= probs.sum(dim=-1, keepdim=True)
        if self.top_p is not None:
            before = probs.cumsum(dim=-1) - probs
            probs = probs.masked_fill(before >= self.top_p, 0)
        uniform = torch.stack(
            [torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators]
        )
        cdf = probs.cumsum(dim=-1)
        index = torch.searchsorted(cdf, uniform.to(self.device) * cdf[:, -1:], right=True)
        # uniform < 1, but its product with the total may round up to the total.
        index = index.minimum((probs > 0).sum(dim=-1, keepdim=True) - 1)
        return order.gather(1, index)[:, 0]


class StopMatcher:
    """Passes text on, holding back what may be the beginning of a stop string.

    stops: strings, none of them empty; without any, text passes at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that can be shown, was a stop string found); the text ends before the string."""
        held = self.held + text
        hits = [at for at in (held.find(s) for s in self.stops) if at >= 0]
        if hits:
            self.held = ""
            return held[: min(hits)], True
        keep = max((_overlap(held, s) for s in self.stops), default=0)
        self.held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, where no more text comes."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class RowText:
    """The new text of one row, from its tokens."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], prompt: list[int]) -> None:
        self.decoder = _primed_decoder(tokenizer, prompt)
        self.matcher = StopMatcher(stops)

    def push(self, token: int) -> tuple[str, bool]:
        return self.matcher.push(self.decoder.push(token))

    def flush(self) -> tuple[str, bool]:
        text, stopped = self.matcher.push(self.decoder.flush())
        return (text, True) if stopped else (text + self.matcher.flush(), False)


def _primed_decoder(tokenizer: Tokenizer, prompt: list[int]) -> StreamDecoder:
    """A decoder that knows the prompt's end: a leading space, or a character begun there, counts.

    A few tokens are enough for either; the text they give is the prompt's and is dropped.
    """
    from attamba.data.tokenizer import StreamDecoder

    decoder = StreamDecoder(tokenizer)
    for token in prompt[-8:]:
        decoder.push(token)
    return decoder
