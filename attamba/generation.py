"""Text from a decoder: greedy, sampled, streamed, over ragged batches and a compressed cache.

`stream` is the loop; `generate` collects what it yields. Shapes: B rows, T prompt tokens (padded
on the left to the longest), V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from attamba.config import AttambaMixer
from attamba.models import Decoder
from attamba.models.runner import Drawn, Runner
from attamba.sampling import RowText, Sampler

if TYPE_CHECKING:
    from attamba.data.tokenizer import Tokenizer

Prompts = Tensor | Sequence[Sequence[int] | Tensor | np.ndarray]
Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Step:
    """What one step added to each of B rows."""

    tokens: list[int | None]
    """The new token of each row; None for a row that had ended before."""
    text: list[str]
    """Text that became certain: whole characters, never a part of a stop string, and nothing of
    the end-of-document token. Empty strings without a tokenizer."""
    finish: list[Finish | None]
    """Why the row ended, at the step where it did."""


@dataclass
class GenerationStats:
    """What a generation cost. Seconds are the model's and the sampler's, not the consumer's."""

    prompt_tokens: int = 0
    """Tokens of all prompts, padding not counted."""
    new_tokens: int = 0
    """Tokens added to all rows, the fill of ended rows not counted."""
    prefill_seconds: float = 0.0
    """Until the first new token of each row."""
    decode_seconds: float = 0.0
    """All later steps."""
    decode_tokens: int = 0
    """Tokens that those later steps added."""
    cache_bytes_used: int = 0
    """At the end; 0 without a cache."""
    cache_bytes_allocated: int = 0
    """At the end, with the room to grow; 0 without a cache."""

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed over all rows, the prefill and its token not counted; 0.0 if none."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


def generate(
    model: Decoder,
    ids: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    eos_id: int | None = None,
    ends: Tensor | None = None,
    use_cache: bool = True,
    prefill_chunk: int | None = None,
    on_token: Callable[[Step], None] | None = None,
    stats: GenerationStats | None = None,
) -> Tensor | list[Tensor]:
    """Continue prompts: greedily by default, sampled with a temperature.

    Args:
        model: a decoder of attamba.models.
        ids: integer tensor [B, T], or a list of B prompts of any lengths above zero (lists of
            ids or 1-D arrays).
        max_new_tokens: tokens added to each row at most; 0 gives the prompts back.
        on_token: called with the Step after every step.
        others: see `stream`.

    Returns:
        For a tensor: int64 [B, T + new] on its device, where new is the longest row's count and
        rows that ended earlier are filled with eos_id. For a list: a list of int64 1-D tensors
        [prompt + new] on the CPU, each cut after the token that ended it (the end-of-document
        token, or the one that completed a stop string).

    Raises:
        ValueError: see `stream`.
    """
    new: list[list[int]] = [[] for _ in ids]
    steps = stream(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        tokenizer=tokenizer,
        eos_id=eos_id,
        ends=ends,
        use_cache=use_cache,
        prefill_chunk=prefill_chunk,
        stats=stats,
    )
    with closing(steps):
        for step in steps:
            for row, token in zip(new, step.tokens):
                if token is not None:
                    row.append(token)
            if on_token is not None:
                on_token(step)
    if isinstance(ids, Tensor):
        longest = max(map(len, new))
        fill = _eos(eos_id, tokenizer) or 0  # without an eos_id no row ends before the others
        filled = [row + [fill] * (longest - len(row)) for row in new]
        tail = torch.tensor(filled, dtype=torch.int64, device=ids.device)
        return torch.cat([ids.to(torch.int64), tail], dim=1)
    prompts = [torch.as_tensor(p, dtype=torch.int64).cpu() for p in ids]
    return [torch.cat([p, torch.tensor(t, dtype=torch.int64)]) for p, t in zip(prompts, new)]


def stream(
    model: Decoder,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    eos_id: int | None = None,
    ends: Tensor | None = None,
    use_cache: bool = True,
    prefill_chunk: int | None = None,
    stats: GenerationStats | None = None,
) -> Generator[Step, None, None]:
    """Yield a Step for each new token of a batch, until every row has ended.

    Arguments are checked here, at the call, and not at the first step. The model is in eval mode
    while the iterator runs; its mode comes back when the iterator ends or is closed.

    Args:
        model, prompts, max_new_tokens: as for `generate`.
        temperature: 0.0 takes the likeliest token; above 0, logits are divided by it.
        top_k: sample among the k likeliest. Default: all.
        top_p: sample among the fewest likeliest tokens that hold this share of the probability
            (one at least), after top_k. Default: all.
        seed: of the sampling, at least 0. Row i draws one number per step from a generator of
            its own, made from (seed, i): what a row says does not depend on the rows beside it.
            Default: drawn from torch's global random state.
        stop: strings that end a row. They are found in the new text, across tokens, and are not
            part of Step.text. They need a tokenizer.
        tokenizer: turns new tokens into Step.text.
        eos_id: token that ends a row. Default: the tokenizer's; without one, none.
        ends: boundary "given" alone: bool [B, T + max_new_tokens], [n_layers, B, ...] or
            [n_layers, B, G, ...]. Columns are those of the batch padded on the left.
        use_cache: False computes everything anew at each step (for checks; slow).
        prefill_chunk: prompt tokens per forward pass. Default: all at once.
        stats: filled in while the iterator runs.

    Raises:
        ValueError: no prompt, an empty one, ids that the model does not know, or an option out
            of its range.
    """
    rows, mask = _batch(prompts, model)
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    _check_options(max_new_tokens, temperature, top_k, top_p, seed, prefill_chunk)
    if stops and tokenizer is None:
        raise ValueError(f"stop={list(stops)} needs tokenizer=..., to turn tokens into text")
    if "" in stops:
        raise ValueError("stop contains an empty string, which would end every row at once")
    _check_ends(model, ends, rows.shape[0], rows.shape[1] + max_new_tokens)
    sampler = Sampler(temperature, top_k, top_p, seed, rows.shape[0], rows.device)
    texts = [RowText(tokenizer, stops, row) for row in _unpadded(rows, mask)] if tokenizer else []
    runner = Runner(model, rows, mask, ends, use_cache, prefill_chunk)
    n_choices = model.config.vocab_size
    if tokenizer is not None:  # a model's vocabulary may be padded beyond the tokenizer's
        n_choices = min(n_choices, tokenizer.vocab_size)
    eos = _eos(eos_id, tokenizer)
    return _run(runner, sampler, texts, max_new_tokens, n_choices, eos, stats)


def _run(
    runner: Runner,
    sampler: Sampler,
    texts: list[RowText],
    max_new_tokens: int,
    n_choices: int,
    eos_id: int | None,
    stats: GenerationStats | None,
) -> Generator[Step, None, None]:
    stats = GenerationStats() if stats is None else stats
    stats.prompt_tokens = runner.prompt_tokens
    active = [True] * runner.rows
    # A text may end a row, so the next step must wait for it; without stops it need not.
    ahead = runner.captured and not any(text.matcher.stops for text in texts)
    waiting: deque[Drawn] = deque()
    was_training = runner.model.training
    runner.model.eval()
    try:
        begun = 0
        for index in range(max_new_tokens):
            start = time.perf_counter()
            # The device works on one more step while the host reads this one's tokens.
            while begun < max_new_tokens and len(waiting) <= (ahead and index > 0):
                drawn = Drawn(sampler(runner.next_logits()[:, :n_choices]))
                waiting.append(drawn)
                begun += 1
                if ahead:
                    runner.append_unread(drawn.ids, eos_id)
            tokens = waiting.popleft().tokens()  # waits for the device
            step = _step(tokens, active, texts, eos_id, last=index == max_new_tokens - 1)
            active = [a and f is None for a, f in zip(active, step.finish)]
            if not ahead:
                runner.append(tokens, active)
            seconds, count = time.perf_counter() - start, sum(t is not None for t in step.tokens)
            stats.new_tokens += count
            if index == 0:
                stats.prefill_seconds += seconds
            else:
                stats.decode_seconds += seconds
                stats.decode_tokens += count
            yield step
            if not any(active):
                break
    finally:
        runner.model.train(was_training)
        if runner.cache is not None:
            stats.cache_bytes_used = runner.cache.nbytes(used=True)
            stats.cache_bytes_allocated = runner.cache.nbytes()


def _step(
    drawn: list[int], active: list[bool], texts: list[RowText], eos_id: int | None, last: bool
) -> Step:
    """The Step of drawn tokens; advances the texts of the rows that are still active."""
    tokens: list[int | None] = [t if a else None for t, a in zip(drawn, active)]
    text = [""] * len(drawn)
    finish: list[Finish | None] = [None] * len(drawn)
    for i, token in enumerate(tokens):
        if token is None:
            continue
        if token == eos_id:
            finish[i] = "eos"
        elif texts:
            text[i], stopped = texts[i].push(token)
            finish[i] = "stop" if stopped else None
        if last and finish[i] is None:
            finish[i] = "length"
        if texts and finish[i] in ("eos", "length"):
            rest, stopped = texts[i].flush()
            text[i] += rest
            finish[i] = "stop" if stopped else finish[i]
    return Step(tokens, text, finish)


def _eos(eos_id: int | None, tokenizer: Tokenizer | None) -> int | None:
    return tokenizer.eos_id if eos_id is None and tokenizer is not None else eos_id


def _batch(prompts: Prompts, model: Decoder) -> tuple[Tensor, Tensor | None]:
    """ids int64 [B, T] on the model's device, and a mask [B, T] where rows were padded."""
    device = model.embed.weight.device
    vocab_size = model.config.vocab_size
    if isinstance(prompts, Tensor):
        rows = _checked(prompts, "ids", 2, vocab_size)
        if not rows.shape[0]:
            raise ValueError(f"ids has shape {tuple(rows.shape)}: no prompt; give at least one row")
        return rows.to(device), None
    if not len(prompts):
        raise ValueError("ids=[] holds no prompt; give at least one")
    if isinstance(prompts[0], int):
        raise ValueError("ids is one flat list; give a list of prompts: [ids]")
    lists = [
        _checked(torch.as_tensor(p), f"prompt {i}", 1, vocab_size) for i, p in enumerate(prompts)
    ]
    longest = max(len(p) for p in lists)
    rows = torch.stack([nn.functional.pad(p.cpu(), (longest - len(p), 0)) for p in lists])
    lengths = torch.tensor([len(p) for p in lists])
    mask = torch.arange(longest) >= longest - lengths[:, None]
    return rows.to(device), None if bool(mask.all()) else mask.to(device)


def _checked(ids: Tensor, name: str, dims: int, vocab_size: int) -> Tensor:
    if ids.dim() != dims:
        want = "[batch, tokens]" if dims == 2 else "[tokens]"
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; it must be {want}")
    if ids.shape[-1] == 0:
        raise ValueError(
            f"{name} is empty: a prompt needs at least one token (the tokenizer's eos_id begins "
            f"a document)"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {ids.dtype}; token ids must be integers (torch.int64)")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(
            f"{name} contains {wrong}; token ids must be from 0 to {vocab_size - 1} "
            f"(vocab_size={vocab_size}): is this the model's tokenizer?"
        )
    return ids.to(torch.int64)


def _unpadded(rows: Tensor, mask: Tensor | None) -> list[list[int]]:
    if mask is None:
        return rows.tolist()
    return [row[m].tolist() for row, m in zip(rows, mask)]


def _check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    prefill_chunk: int | None,
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be at least 0 (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1; leave it out to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    if seed is not None and seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1")


def _check_ends(model: Decoder, ends: Tensor | None, rows: int, length: int) -> None:
    mixers = [m for m in model.config.layer_mixers() if isinstance(m, AttambaMixer)]
    names = {mixer.policy for mixer in mixers}
    given = "given" in names
    if ends is None:
        if given:
            raise ValueError(
                f'boundary "given" needs ends=..., bool of shape [{rows}, {length}] '
                f"(prompt + max_new_tokens)"
            )
        return
    if not given:
        raise ValueError(f'ends is for boundary "given"; this model has {sorted(names) or "none"}')
    if ends.dtype != torch.bool or ends.dim() not in (2, 3, 4):
        raise ValueError(
            f"ends has shape {tuple(ends.shape)} and dtype {ends.dtype}; it must be bool "
            f"[batch, tokens], [n_layers, batch, tokens] or [n_layers, batch, kv_heads, tokens]"
        )
    if ends.shape[-1] != length:
        short = "do not cover" if ends.shape[-1] < length else "reach past"
        raise ValueError(
            f"ends {short} the sequence: they have {ends.shape[-1]} columns, but prompt + "
            f"max_new_tokens is {length}"
        )
