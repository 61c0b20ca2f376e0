"""The test-time dial: trained weights at another chunk size, window or boundary policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attamba.config import override_model
from attamba.evaluate import Text, evaluate, finite, take, with_separator
from attamba.models import Decoder, build_model

if TYPE_CHECKING:
    from attamba.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class SweepRow:
    """One setting of the dial."""

    value: Any
    nats_per_token: float
    perplexity: float
    """Per token."""
    bits_per_byte: float
    cache_bytes: int
    """Held by a real cache, for one sequence of cache_tokens tokens."""
    cache_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; what is not finite becomes None."""
        return finite(dataclasses.asdict(self))


def redial(model: Decoder, overrides: dict[str, Any]) -> Decoder:
    """A copy of the model in eval mode, with the same weights and other config fields.

    overrides: as for attamba.config.override_model: {"mixer.chunk_size": 4}.

    Raises ValueError for fields that change the weights' shapes, ConfigError for unknown ones.
    """
    weight = model.embed.weight
    with torch.random.fork_rng(devices=[]):  # these initial values are overwritten at once
        copy = build_model(override_model(model.config, overrides))
    if copy.config.tie_embeddings != model.config.tie_embeddings:
        raise ValueError(
            f"{overrides} cannot be set on trained weights: one tensor would have to be two, or "
            f"two one; train a model with it instead"
        )
    ours, theirs = copy.state_dict(), model.state_dict()
    for name in sorted(ours.keys() | theirs.keys()):
        old, new = (list(s[name].shape) if name in s else "nothing" for s in (theirs, ours))
        if old != new:
            raise ValueError(
                f"{overrides} cannot be set on trained weights: {name} would go from {old} to "
                f"{new}; train a model with it instead"
            )
    copy.load_state_dict(theirs)
    return copy.to(weight.device, weight.dtype).eval()


@torch.inference_mode()
def measure_cache(model: Decoder, tokens: np.ndarray, *, piece: int = 1024) -> int:
    """Bytes that a decode cache holds after `tokens` (int [T]): nbytes(used=True).

    piece: tokens per forward pass. The model is used in the mode that it is in.
    """
    cache = model.new_cache(batch_size=1)
    ids = torch.as_tensor(tokens, dtype=torch.int64, device=model.embed.weight.device)[None]
    for part in ids.split(piece, dim=1):
        model(part, cache=cache, return_hidden=True)
    return cache.nbytes(used=True)


def sweep(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Iterable[Text],
    field: str,
    values: Sequence[Any],
    *,
    context: int | None = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
    on_row: Callable[[SweepRow], None] | None = None,
) -> list[SweepRow]:
    """Score one model's weights at several values of one config field.

    Args:
        model: gives the weights; it is not changed.
        documents, stride, batch_size, max_documents, max_tokens: as for evaluate; the documents
            are tokenized once and kept.
        field: "mixer.chunk_size", "mixer.leading_tokens", "mixer.boundary", ...
        values: of the field.
        context: as for evaluate; also the length at which a cache is filled with the documents'
            tokens (over again if they are too few) and measured. None: the longest document's.
        progress: as for evaluate, with the number of tokens scored so far over all values.
        on_row: called with each row when it is there.

    Raises:
        ValueError: as evaluate and redial do.
    """
    chosen = list(take(documents, tokenizer, max_documents, max_tokens))
    if not chosen:
        raise ValueError("documents hold no text: there is nothing to score")
    arrays = [with_separator(document, tokenizer.eos_id) for document in chosen]
    tokens = max(arrays, key=len) if context is None else np.resize(np.concatenate(arrays), context)
    rows: list[SweepRow] = []
    before = 0

    def tell(n_tokens: int) -> None:
        if progress is not None:
            progress(before + n_tokens)

    for value in values:
        dialled = redial(model, {field: value})
        result = evaluate(
            dialled,
            tokenizer,
            chosen,
            context=context,
            stride=stride,
            batch_size=batch_size,
            progress=tell,
        )
        before += result.n_tokens
        row = SweepRow(
            value=value,
            nats_per_token=result.nats_per_token,
            perplexity=result.perplexity,
            bits_per_byte=result.bits_per_byte,
            cache_bytes=measure_cache(dialled, tokens),
            cache_tokens=len(tokens),
        )
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows
