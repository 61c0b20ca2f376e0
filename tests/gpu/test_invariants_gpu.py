"""The invariants of the architecture with the Triton kernels in the model, float32 and bfloat16.

tests/test_invariants.py draws hundreds of models for the mathematics; here a fixed list of them
goes through the kernels that a GPU runs by default. In bfloat16 two ways to the same logits round
differently at every layer: they must agree to 5%.
"""

from __future__ import annotations

import pytest
import torch
from drawing import VOCAB, at, build, ends_for, pieces
from torch import Tensor

from attamba.models import accounting
from attamba.ops.chunking import make_span

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
SEQ = 150
SMALL = {"type": "attamba", "n_heads": 4, "state_dim": 4, "ssm_heads": 2, "kv_proj": True}
MIXERS = {
    "uniform": {"boundary": "uniform", "chunk_size": 3, "leading_tokens": 5},
    "cyclic": {"boundary": "cyclic", "chunk_size": 8, "leading_tokens": 8},
    "no window": {"boundary": "cyclic", "chunk_size": 4, "leading_tokens": 0, "n_kv_heads": 1},
    "sequence": {"chunk_size": 8, "leading_tokens": 20, "ssm_scope": "sequence"},
    "head_cyclic": {
        "boundary": "head_cyclic",
        "chunk_size": 8,
        "leading_tokens": 8,
        "ssm_scope": "sequence",
        "n_kv_heads": 2,
    },
    "jitter": {"boundary": "jitter", "chunk_size": 7, "leading_tokens": 3},
    "random": {"boundary": "random", "chunk_size": 5, "leading_tokens": 3},
    "separator": {"boundary": {"type": "separator", "tokens": [1, 2]}, "leading_tokens": 8},
    "budget": {"boundary": {"type": "budget", "max_chunks": 6}, "leading_tokens": 8},
    "given": {
        "boundary": "given",
        "leading_tokens": 8,
        "ssm_scope": "sequence",
        "n_kv_heads": 2,
    },
    "long chunks": {"chunk_size": 100, "leading_tokens": 64, "sink": False},
    "unbounded": {"chunk_size": 8, "leading_tokens": None},
}
OTHERS = {
    "full": {"type": "transformer", "n_heads": 4, "n_kv_heads": 2},
    "window": {"type": "transformer", "n_heads": 4, "window": 9},
}
ALL = {**{name: {**SMALL, **options} for name, options in MIXERS.items()}, **OTHERS}

every_mixer = pytest.mark.parametrize("name", ALL)
every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def set_up(name, dtype, seq=SEQ, batch=3):
    model = build(ALL[name]).cuda().to(dtype)
    ids = torch.randint(VOCAB, (batch, seq), device="cuda")
    ends = ends_for(model, batch, seq)
    return model, ids, None if ends is None else ends.cuda(), torch.Generator().manual_seed(0)


def agree(got: Tensor, want: Tensor, what: str, bound: float | None = None) -> None:
    assert got.shape == want.shape and got.isfinite().all(), what
    error = float((got.float() - want.float()).norm() / want.float().norm())
    bound = BOUNDS[want.dtype] if bound is None else bound
    assert error < bound, f"{what}: relative error {error:.2e}"


@every_mixer
@every_dtype
def test_one_truth_in_pieces_and_token_by_token(name, dtype):
    model, ids, ends, rng = set_up(name, dtype)
    full = model(ids, **at(ends))
    for cuts in (pieces(SEQ, rng, 40), [slice(t, t + 1) for t in range(SEQ)]):
        cache = model.new_cache(3)
        parts = [model(ids[:, cut], cache=cache, **at(ends, columns=cut)) for cut in cuts]
        agree(torch.cat(parts, 1), full, f"{len(cuts)} pieces")
        assert cache.lengths.tolist() == [SEQ] * 3


@every_mixer
@every_dtype
def test_one_truth_left_padded(name, dtype):
    model, ids, ends, rng = set_up(name, dtype)
    full = model(ids, **at(ends))
    real = [SEQ, SEQ // 2, 3]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    padded_ends = None if ends is None else torch.rand_like(ends.float()) < 0.5
    for row, n in enumerate(real):
        padded[row, SEQ - n :], mask[row, SEQ - n :] = ids[row, :n], True
        if ends is not None:
            padded_ends[:, row, :, SEQ - n :] = ends[:, row, :, :n]
    cache = model.new_cache(3)
    cached = [
        model(padded[:, c], attention_mask=mask[:, c], cache=cache, **at(padded_ends, columns=c))
        for c in pieces(SEQ, rng, 20)
    ]
    whole = model(padded, attention_mask=mask, **at(padded_ends))
    for out in (whole, torch.cat(cached, 1)):
        for row, n in enumerate(real):
            # Padded rows go through other kernels, which round elsewhere in 16 bits.
            bound = None if dtype == torch.float32 else 1.5 * BOUNDS[dtype]
            agree(out[row, SEQ - n :], full[row, :n], f"row of {n}", bound)


@every_mixer
@every_dtype
def test_one_truth_packed(name, dtype):
    model, ids, ends, _ = set_up(name, dtype)
    full = model(ids, **at(ends))
    real = [SEQ, SEQ // 2, 1]
    row = torch.cat([ids[i, :n] for i, n in enumerate(real)])
    doc_ids = torch.cat([torch.full((n,), i, device="cuda") for i, n in enumerate(real)])
    packed = [ends[:, i : i + 1, :, :n] for i, n in enumerate(real)] if ends is not None else None
    packed_ends = None if packed is None else torch.cat(packed, -1)
    out = model(row[None], doc_ids=doc_ids[None], **at(packed_ends))[0]
    for i, part in enumerate(out.split(real)):
        agree(part, full[i, : real[i]], f"document {i}")


@every_mixer
@every_dtype
def test_prefix_consistency(name, dtype):
    model, ids, ends, _ = set_up(name, dtype)
    keep = 77
    changed = torch.cat([ids[:, :keep], (ids[:, keep:] + 1) % VOCAB], 1)
    full = model(ids, **at(ends))[:, :keep]
    if not isinstance(ALL[name].get("boundary"), dict) or "tokens" not in ALL[name]["boundary"]:
        agree(model(changed, **at(ends))[:, :keep], full, "changed")
    agree(model(ids[:, :keep], **at(ends, columns=slice(keep))), full, "removed")


@every_dtype
def test_limits(dtype):
    ids = torch.randint(VOCAB, (3, SEQ), device="cuda")

    def logits(**options):
        mixer = {**SMALL, "boundary": "cyclic", **options}
        return build(mixer).cuda().to(dtype)(ids)

    unbounded = logits(chunk_size=1, leading_tokens=None)
    agree(logits(chunk_size=1, leading_tokens=4), unbounded, "P = 1")
    whole = logits(chunk_size=8, leading_tokens=None)
    agree(logits(chunk_size=8, leading_tokens=SEQ + 3), whole, "L >= T")


@every_dtype
@pytest.mark.parametrize("changed_at", [0, 63, 64, SEQ - 1])
def test_locality(dtype, changed_at):
    model = build(ALL["cyclic"]).cuda().to(dtype)
    layer = model.layers[1].mixer
    u = torch.randn(1, SEQ, 32, device="cuda", dtype=dtype)
    other = u.clone()
    other[:, changed_at] += 1.0
    span = make_span(SEQ, u.device, tokens=torch.zeros(1, SEQ, dtype=torch.long, device="cuda"))
    ends, _ = layer.boundary(span)
    (_, k, v), (_, k2, v2) = (layer.project(t, ends, span) for t in (u, other))
    chunk_end = changed_at
    while chunk_end < SEQ - 1 and not ends[0, 0, chunk_end]:
        chunk_end += 1
    own = torch.zeros(SEQ, dtype=torch.bool, device="cuda")
    own[changed_at : chunk_end + 1] = True
    for a, b in ((k, k2), (v, v2)):
        difference = (a - b).abs().amax((0, 2, 3))
        assert (difference[~own] < 1e-5).all()
        assert difference[changed_at] > 1e-4


@every_mixer
def test_bytes(name):
    model, ids, ends, rng = set_up(name, torch.bfloat16, batch=1)
    cache = model.new_cache(1)
    for cut in pieces(SEQ, rng, 30):
        model(ids[:, cut], cache=cache, **at(ends, columns=cut))
    formula_ends = None if ends is None else ends[:, 0].cpu()
    want = accounting.cache_bytes(model.config, SEQ, 2, tokens=ids.cpu(), ends=formula_ends)
    assert cache.nbytes(used=True) == want <= cache.nbytes()


@every_mixer
@every_dtype
def test_forked_reset_and_reordered(name, dtype):
    model, ids, ends, _ = set_up(name, dtype)
    cache, cut = model.new_cache(3), SEQ - 20
    model(ids[:, :cut], cache=cache, **at(ends, columns=slice(cut)))
    rows = torch.tensor([2, 0, 0, 2], device="cuda")
    cache.reorder(rows)
    out = [
        model(ids[rows, t : t + 1], cache=cache, **at(ends, rows, slice(t, t + 1)))
        for t in range(cut, SEQ)
    ]
    full = model(ids, **at(ends))[rows]
    agree(torch.cat(out, 1), full[:, cut:], "forked")
    cache.reset()
    agree(model(ids[rows], cache=cache, **at(ends, rows)), full, "after reset")


@every_mixer
def test_gradients_are_those_of_the_torch_backend(name):
    ids = torch.randint(VOCAB, (2, SEQ), device="cuda")
    ends = ends_for(build(ALL[name]), 2, SEQ)
    ends = None if ends is None else ends.cuda()
    grads = []
    for backend in ("auto", "torch"):
        model = build({**ALL[name], "backend": backend}).cuda().requires_grad_(True)
        logits = model(ids, **at(ends))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for key, grad in grads[0].items():
        error = (grad - grads[1][key]).norm()
        assert error < 1e-3 * grads[1][key].norm() + 1e-7, key
