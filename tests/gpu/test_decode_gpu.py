"""Decoding on CUDA: kernels against plain loops, the model against its full forward, graphs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import attamba
from attamba.models import Decoder
from attamba.models.accounting import cache_bytes
from attamba.models.graph import CapturedStep
from attamba.ops.chunk_decode import (
    PAGE,
    CompressorWeights,
    Held,
    attend_step,
    compress_step,
)

CUDA = torch.device("cuda")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().float().cpu(), want.detach().float().cpu()
    return float((got - want).norm() / (want.norm() + 1e-9))


# --------------------------------------------------------------------------------------------
# The two operators
# --------------------------------------------------------------------------------------------


def _dense(q, keys, values, counts):
    """Attention of q [B, H, D] to the first counts[b, g] entries, float64."""
    batch, heads, width = q.shape
    groups = keys.shape[1]
    q = q.double().view(batch, groups, -1, width)
    scores = q @ keys.double().transpose(-1, -2) * width**-0.5
    seen = torch.arange(keys.shape[2], device=q.device) < counts[..., None]
    weights = scores.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1)
    return (weights @ values.double()).view(batch, heads, width)


@pytest.mark.parametrize(
    "dtype, heads, groups, width, window",
    [
        (torch.float32, 4, 4, 64, 65),
        (torch.float32, 6, 2, 80, None),
        (torch.float32, 40, 2, 16, 1),
        (torch.bfloat16, 4, 4, 64, 65),
        (torch.bfloat16, 8, 2, 64, None),
        (torch.bfloat16, 40, 2, 80, 65),
        (torch.bfloat16, 6, 2, 16, 1),
        (torch.bfloat16, 4, 4, 128, 65),
        (torch.float16, 4, 4, 64, 65),
        (torch.float16, 8, 2, 128, None),
    ],
)
def test_attend_step_over_many_entries(dtype, heads, groups, width, window):
    batch = 3
    held = Held(batch, groups, width, window, dtype, CUDA)
    held.reserve(1500)
    held.reserve(1500 + PAGE)
    for block in (*held.blocks.k, *held.blocks.v):
        block.fill_(float("nan"))
    lengths = torch.tensor([0, 300, 1400], device=CUDA)
    counts = lengths[:, None].expand(-1, groups)
    if window is not None:
        held.n_past.copy_(torch.randint(0, 1400, (batch, groups), device=CUDA))
        held.n_past[0] = 0
        held.n_past[lengths < window] = 0
        held.ring_ends.copy_(torch.rand(batch, groups, window, device=CUDA) < 0.5)
        counts = lengths.clamp(max=window)[:, None] + held.n_past
    for blocks in (held.blocks.k, held.blocks.v):
        begin = 0
        for block in blocks:
            there = torch.arange(begin, begin + block.shape[2], device=CUDA)
            here = there < counts[..., None]
            block.copy_(torch.where(here[..., None], torch.randn_like(block.float()), block))
            begin += block.shape[2]
    for step in range(4):
        past, ends_before = held.n_past.clone(), held.ring_ends.clone()
        q = torch.randn(batch, heads, width, device=CUDA, dtype=dtype)
        k, v = torch.randn(2, batch, groups, width, device=CUDA, dtype=dtype).unbind(0)
        ends = None if window is None else torch.rand(batch, groups, device=CUDA) < 0.5
        out = attend_step(q, k, v, held, lengths, ends=ends, backend="triton")
        counts = lengths[:, None].expand(-1, groups) + 1
        if window is not None:
            slot = (lengths % window)[:, None, None].expand(-1, groups, 1)
            pushed = ends_before.gather(2, slot)[..., 0] & (lengths >= window)[:, None]
            assert torch.equal(held.n_past, past + pushed)
            counts = (lengths + 1).clamp(max=window)[:, None] + held.n_past
        keys, values = held.blocks.joined(held.blocks.capacity)
        unseen = torch.arange(keys.shape[2], device=CUDA) >= counts[..., None]
        keys, values = (t.masked_fill(unseen[..., None], 0.0) for t in (keys, values))
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        assert relative(out, _dense(q, keys, values, counts)) < limit, step
        assert (held.arrivals == 0).all()


@pytest.mark.parametrize("batch", [1, 64, 300])
def test_entries_that_give_one_program_more_a_share(batch):
    """Of many rows programs begin when others of the same row are done: none may take the count
    of after the step for that of before, wherever a share ends (256 entries, 512, ...)."""
    groups, width, window = 8, 64, 4
    held = Held(batch, groups, width, window, torch.bfloat16, CUDA)
    held.reserve(1200)
    for block in (*held.blocks.k, *held.blocks.v):
        block.normal_()
    counts = torch.tensor([250, 252, 508, 764, 1020], device=CUDA)
    held.n_past.copy_(counts[torch.randint(0, 5, (batch, groups), device=CUDA)])
    held.ring_ends.fill_(True)
    lengths = torch.full((batch,), 4000, device=CUDA)
    ends = torch.ones(batch, groups, dtype=torch.bool, device=CUDA)
    for step in range(12):
        q, k, v = torch.randn(3, batch, groups, width, device=CUDA, dtype=torch.bfloat16).unbind(0)
        out = attend_step(q, k, v, held, lengths, ends=ends, backend="triton")
        seen = held.n_past + window
        keys, values = held.blocks.joined(held.blocks.capacity)
        unseen = torch.arange(keys.shape[2], device=CUDA) >= seen[..., None]
        keys, values = (t.masked_fill(unseen[..., None], 0.0) for t in (keys, values))
        assert relative(out, _dense(q, keys, values, seen)) < 1e-2, step
        assert (held.arrivals == 0).all()
        lengths = lengths + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner, heads, state", [(256, 8, 32), (96, 3, 16), (1024, 8, 64)])
def test_compress_step_is_its_reference(dtype, inner, heads, state):
    batch, channels = 3, 2 * (inner + 2 * state)
    shapes = [(channels, 4), (2, heads), (2, heads), (2, heads)]
    drawn = [torch.randn(s, device=CUDA).to(dtype) for s in shapes]
    weights = CompressorWeights(*drawn)
    plain = CompressorWeights(*[t.cpu() for t in drawn])
    h = torch.zeros(batch, 2 * heads, state, inner // heads, device=CUDA)
    conv = torch.zeros(batch, 3, channels, device=CUDA, dtype=dtype)
    theirs = [h.cpu(), conv.cpu()]
    for step in range(6):
        projected = torch.randn(batch, 2 * inner + channels + 2 * heads, device=CUDA, dtype=dtype)
        starts = torch.tensor([step == 4, False, step == 3], device=CUDA)
        y, h, conv = compress_step(projected, h, conv, weights, starts=starts, backend="triton")
        ref, *theirs = compress_step(
            projected.cpu(), *theirs, plain, starts=starts.cpu(), backend="reference"
        )
        assert relative(y, ref) < (1e-5 if dtype == torch.float32 else 5e-3)
        assert relative(h, theirs[0]) < 1e-5 and torch.equal(conv.cpu(), theirs[1])


# --------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------

MIXERS: dict[str, dict[str, Any]] = {
    "chunk": {"leading_tokens": 8},
    "per head": {"boundary": "head_cyclic", "ssm_scope": "sequence", "leading_tokens": 8},
    "every token": {"chunk_size": 1, "leading_tokens": 0},
    "unbounded": {"leading_tokens": None},
    "separator": {"boundary": {"type": "separator", "tokens": [1, 2]}, "leading_tokens": 5},
    "budget": {"boundary": {"type": "budget", "max_chunks": 20}, "leading_tokens": 5},
    "random": {"boundary": "random", "leading_tokens": 5},
    "grouped": {"n_kv_heads": 2, "kv_proj": True, "leading_tokens": 8},
    "transformer": {"type": "transformer"},
    "window": {"type": "transformer", "window": 9},
}


def _model(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    options = {"type": "attamba", "n_heads": 4, **MIXERS[name]}
    if options["type"] == "attamba":
        options = {"chunk_size": 4, "state_dim": 16, "ssm_heads": 4, **options}
    config = attamba.ModelConfig(vocab_size=40, dim=128, n_layers=3, ffn_dim=128, mixer=options)
    model = attamba.build_model(config).to(CUDA, dtype).eval()
    return model.requires_grad_(False)


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(40, shape, device=CUDA)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", MIXERS)
def test_decoding_is_the_full_forward(name, dtype, limit, captured):
    """Across a prompt, steps, another prompt and more steps."""
    model = _model(name, dtype)
    ids = _ids(2, 90)
    full = model(ids)
    cache = model.new_cache(2)
    step = CapturedStep(model, cache)

    def take(t: int) -> torch.Tensor:
        if captured:
            return step(ids[:, t : t + 1]).clone()[:, None]
        return model(ids[:, t : t + 1], cache=cache)

    parts = [model(ids[:, :33], cache=cache), *map(take, range(33, 60))]
    parts += [model(ids[:, 60:71], cache=cache), *map(take, range(71, 90))]
    assert relative(torch.cat(parts, 1), full) < limit
    assert cache.lengths.tolist() == [90, 90]


@pytest.mark.parametrize("name", MIXERS)
def test_ragged_rows_forked_reordered_and_reset_while_captured(name):
    model = _model(name)
    ids = _ids(3, 80)
    real = [50, 41, 7]
    full = [model(row[None])[0] for row in ids]
    padded, mask = torch.zeros(3, 50, dtype=torch.long, device=CUDA), torch.zeros(3, 50).bool()
    for row, n in enumerate(real):
        padded[row, 50 - n :], mask[row, 50 - n :] = ids[row, :n], True
    cache = model.new_cache(3)
    step = CapturedStep(model, cache)
    seen, rows = list(real), [0, 1, 2]

    def advance(steps: int, frozen: int | None = None) -> None:
        for _ in range(steps):
            now = torch.stack([ids[r, n] for r, n in zip(rows, seen)])[:, None]
            active = torch.ones(3, 1, dtype=torch.bool, device=CUDA)
            if frozen is not None:
                active[frozen] = False
            logits = step(now, None if frozen is None else active)
            for i, r in enumerate(rows):
                if i != frozen:
                    assert relative(logits[i], full[r][seen[i]]) < 1e-4, (i, seen)
                    seen[i] += 1

    model(padded, attention_mask=mask.to(CUDA), cache=cache)
    advance(5)
    advance(5, frozen=1)
    advance(3)
    index = [2, 0, 0]
    cache.reorder(torch.tensor(index, device=CUDA))
    seen, rows = [seen[i] for i in index], [rows[i] for i in index]
    advance(6)
    advance(3, frozen=0)
    cache.reset()
    seen[:] = [0, 0, 0]
    advance(12)
    assert cache.lengths.tolist() == seen


def test_2000_steps_grow_the_cache_by_one_entry_per_chunk():
    """Pages are added under a captured step; nothing is copied, and it is not captured anew."""
    model = _model("per head")
    cache = model.new_cache(2)
    step = CapturedStep(model, cache)
    captures = 0
    capture = step._capture

    def counted(masked):
        nonlocal captures
        captures += 1
        return capture(masked)

    step._capture = counted
    ids = _ids(2, 2000)
    for t in range(2000):
        logits = step(ids[:, t : t + 1])
        if t == 400:
            first = cache.layers[0].kv.blocks.k[0].data_ptr()
    assert captures == 1
    assert relative(logits, model(ids)[:, -1]) < 1e-4
    want = cache_bytes(model.config, 2000, batch_size=2)
    assert cache.nbytes(used=True) == want
    assert len(cache.layers[0].kv.blocks.k) > 1
    assert cache.layers[0].kv.blocks.k[0].data_ptr() == first


def test_generation_captured_is_generation_on_the_cpu():
    model = _model("chunk")
    prompts = [[1, 2, 3], [5] * 17, [9]]
    on_gpu = attamba.generate(model, prompts, max_new_tokens=40, eos_id=3)
    sampled = attamba.generate(model, prompts, max_new_tokens=40, temperature=0.9, seed=4)
    model.cpu()
    on_cpu = attamba.generate(model, prompts, max_new_tokens=40, eos_id=3)
    assert [r.tolist() for r in on_gpu] == [r.tolist() for r in on_cpu]
    on_cpu = attamba.generate(model, prompts, max_new_tokens=40, temperature=0.9, seed=4)
    assert [r.tolist() for r in sampled] == [r.tolist() for r in on_cpu]


def test_operators_say_what_they_change():
    importlib.import_module("attamba.ops.chunk_decode.triton")  # where they are registered
    held = Held(2, 2, 16, 5, torch.float32, CUDA)
    held.reserve(300)
    q, k, v = torch.randn(3, 2, 2, 16, device=CUDA).unbind(0)
    lengths = torch.tensor([4, 9], device=CUDA)
    ends = torch.ones(2, 1, dtype=torch.bool, device=CUDA)
    arguments = (q, k, v, None, None, None, None, ends, None, lengths, held.n_past)
    arguments += (held.ring_ends, held.last_end, held.blocks.page_table(), held.arrivals)
    torch.library.opcheck(torch.ops.attamba.attend_step, (*arguments, torch.float32, 5))
    shapes = [(2, 2 * 32 + 2 * 48 + 8), (2, 8, 8, 8), (2, 3, 96), (96, 4), (2, 4), (2, 4), (2, 4)]
    tensors = [torch.randn(shape, device=CUDA) for shape in shapes]
    torch.library.opcheck(torch.ops.attamba.compress_step, (*tensors, None, None))
