"""Recurrent mixers and rival compressors on CUDA: training, and decoding in captured steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scanning import assert_near

import attamba
from attamba.models import Decoder
from attamba.models.graph import CapturedStep, can_capture

VOCAB, CUDA = 50, torch.device("cuda")
ATTAMBA = {"type": "attamba", "n_heads": 4, "chunk_size": 4, "leading_tokens": 7, "state_dim": 8}
MIXERS: dict[str, Any] = {
    "mamba2": {"type": "mamba2", "head_dim": 32, "state_dim": 16},
    "mingru": {"type": "mingru"},
    "minlstm": {"type": "minlstm"},
    "hawk": {"type": "hawk"},
    "mean": {**ATTAMBA, "compressor": "mean"},
    "gated": {**ATTAMBA, "compressor": "gated"},
    "hybrid": [{"type": "hawk"}, ATTAMBA, {"type": "mamba2", "head_dim": 32, "state_dim": 16}],
}


def _model(name: str, backend: str = "auto") -> Decoder:
    torch.manual_seed(0)
    mixer = MIXERS[name]
    mixers = [{**m, "backend": backend} for m in (mixer if isinstance(mixer, list) else [mixer])]
    config = attamba.ModelConfig(vocab_size=VOCAB, dim=64, n_layers=3, ffn_dim=64, mixer=mixers)
    return attamba.build_model(config).to(CUDA).eval()


def _gradients(model: Any, ids: torch.Tensor, doc_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(ids, doc_ids=doc_ids)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_training_is_the_torch_backend_s(name, compiled):
    model, plain = _model(name), _model(name, "torch")
    run = torch.compile(model, fullgraph=True) if compiled else model
    for seq in (33, 130):
        ids = torch.randint(VOCAB, (3, seq), device=CUDA)
        doc_ids = (torch.rand(3, seq, device=CUDA) < 0.05).long().cumsum(1)
        got, want = _gradients(run, ids, doc_ids), _gradients(plain, ids, doc_ids)
        assert_near({n.removeprefix("_orig_mod."): g for n, g in got.items()}, want, 1e-3)


@pytest.mark.parametrize("name", MIXERS)
def test_bfloat16_autocast_is_near(name):
    model, ids = _model(name), torch.randint(VOCAB, (2, 300), device=CUDA)
    with torch.no_grad():
        full = model(ids)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            half = model(ids).float()
    assert float((half - full).norm() / full.norm()) < 3e-2


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("captured", [False, True])
def test_decoding_is_the_full_forward(name, captured):
    model, ids = _model(name).requires_grad_(False), torch.randint(VOCAB, (2, 60), device=CUDA)
    full, cache = model(ids), model.new_cache(2)
    assert can_capture(cache)
    with torch.inference_mode():
        parts = [model(ids[:, :20], cache=cache)]
        step = CapturedStep(model, cache) if captured else None
        for t in range(20, 60):
            now = ids[:, t : t + 1]
            out = model(now, cache=cache)[:, 0] if step is None else step(now).clone()
            parts.append(out[:, None])
    got = torch.cat(parts, 1)
    assert float((got - full).norm() / full.norm()) < 1e-4
    if step is not None:
        assert len(step._graphs) == 1


@pytest.mark.parametrize("name", MIXERS)
def test_rows_frozen_forked_and_reset_while_captured(name):
    model, ids = _model(name).requires_grad_(False), torch.randint(VOCAB, (3, 60), device=CUDA)
    full, cache = model(ids), model.new_cache(3)
    rows, seen = [0, 1, 2], [0, 0, 0]
    step = CapturedStep(model, cache)

    def advance(steps: int, frozen: int | None = None) -> None:
        for _ in range(steps):
            now = torch.stack([ids[r, n] for r, n in zip(rows, seen)])[:, None]
            active = torch.ones(3, 1, dtype=torch.bool, device=CUDA)
            if frozen is not None:
                active[frozen] = False
            logits = step(now, None if frozen is None else active)
            for i, r in enumerate(rows):
                if i != frozen:
                    want = full[r, seen[i]]
                    assert float((logits[i] - want).norm() / want.norm()) < 1e-4, (i, seen)
                    seen[i] += 1

    advance(9)
    advance(6, frozen=1)
    advance(4)
    index = [2, 1, 1]
    cache.reorder(torch.tensor(index, device=CUDA))
    rows[:], seen[:] = [rows[i] for i in index], [seen[i] for i in index]
    advance(6)
    advance(3, frozen=0)
    cache.reset()
    seen[:] = [0, 0, 0]
    advance(12)


@pytest.mark.parametrize("name", MIXERS)
def test_generation_is_generation_on_the_cpu(name):
    model, prompts = _model(name), [[1, 2, 3], [5] * 17, [9]]
    on_gpu = attamba.generate(model, prompts, max_new_tokens=40, eos_id=3)
    on_cpu = attamba.generate(model.cpu(), prompts, max_new_tokens=40, eos_id=3)
    assert [r.tolist() for r in on_gpu] == [r.tolist() for r in on_cpu]
