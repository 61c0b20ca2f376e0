"""The decode cache under the interface that transformers' generation expects.

It holds a DecodeCache and nothing of its own but a count of columns: those of the attention mask,
padding included, where DecodeCache counts each row's tokens.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from attamba.modules.cache import DecodeCache


class AttambaCache(Cache):
    """What a model has seen of B sequences, updated in place by its forward pass.

    Made by the model, or by the caller and given to it as past_key_values: it is filled at the
    first call. `decode` is the DecodeCache then; decode.nbytes() tells its size.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.decode: DecodeCache | None = None
        self.seen = 0
        self.inference_only = False

    def mode(self) -> AbstractContextManager[object]:
        """Inference mode, in which an operator costs less, where `inference_only` is set.

        generate() sets it for a cache that nobody sees but itself: what inference mode makes can
        neither be written to nor trained through outside of it.
        """
        return torch.inference_mode() if self.inference_only else nullcontext()

    def __repr__(self) -> str:
        held = "empty" if self.decode is None else f"{self.decode.nbytes():,} bytes"
        return f"AttambaCache({self.seen} tokens, {held})"

    def __len__(self) -> int:
        return 0 if self.decode is None else len(self.decode.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included; the same in every layer."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns that a mask of `query_length` new ones covers, and where they begin."""
        return self.seen + query_length, 0

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first call."""
        return -1 if self.decode is None else self.decode.batch_size

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.decode is not None

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        """Forget everything; the next call may have other rows."""
        self.decode, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        if self.decode is not None:
            with self.mode():
                self.decode.reorder(beam_idx.to(self.decode.lengths))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows indices (int64 [B'])."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.reorder_cache(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: what a chunk was compressed from is gone."""
        if tokens_to_remove:
            _cannot("drop tokens that it has seen", "keep a copy.deepcopy from before them")

    def activate_past_recording(self) -> None:
        """Raises ValueError, see crop; assisted decoding asks for it."""
        _cannot("go back to an earlier token", "generate without an assistant")

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: layers of other models cannot write here."""
        _cannot("hold another model's keys and values", "give that model its own cache")


def _cannot(what: str, remedy: str) -> NoReturn:
    raise ValueError(f"an AttambaCache cannot {what}; {remedy}")
