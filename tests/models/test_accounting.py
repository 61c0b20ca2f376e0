"""Formulas against the model itself: parameters, attention entries, FLOPs, cache bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attamba
from attamba.mixers import attends
from attamba.models.accounting import (
    attention_entries,
    cache_bytes,
    flops,
    flops_per_token,
    layer_ends,
    n_parameters,
)
from attamba.ops.chunking import visible

ATTAMBA = {"type": "attamba", "n_heads": 4, "ssm_heads": 2, "state_dim": 4, "leading_tokens": 5}
TRANSFORMER = {"type": "transformer", "n_heads": 4}
MIXERS: dict[str, Any] = {
    "attamba": ATTAMBA,
    "P=1": {**ATTAMBA, "chunk_size": 1},
    "L=0": {**ATTAMBA, "leading_tokens": 0, "sink": False, "chunk_size": 3},
    "unbounded": {**ATTAMBA, "leading_tokens": None},
    "narrow": {**ATTAMBA, "kv_proj": True, "n_kv_heads": 2, "head_dim": 6},
    "compressor": {**ATTAMBA, "ssm_dim": 24, "ssm_heads": 3, "state_dim": 7, "conv_width": 2},
    "per head": {**ATTAMBA, "boundary": "head_cyclic", "ssm_scope": "sequence"},
    "grouped per head": {
        **ATTAMBA,
        "boundary": "head_cyclic",
        "ssm_scope": "sequence",
        "kv_proj": True,
        "n_kv_heads": 2,
        "chunk_size": 3,
    },
    "random": {**ATTAMBA, "boundary": "random"},
    "budget": {**ATTAMBA, "boundary": {"type": "budget", "max_chunks": 6}},
    "transformer": TRANSFORMER,
    "window": {**TRANSFORMER, "window": 9, "n_kv_heads": 1, "head_dim": 6},
    "hybrid": [ATTAMBA, TRANSFORMER],
    "mean": {**ATTAMBA, "compressor": "mean"},
    "mean of projected": {**ATTAMBA, "compressor": "mean", "kv_proj": True, "n_kv_heads": 2},
    "gated": {**ATTAMBA, "compressor": "gated", "gate_positions": 3},
    "gated narrow": {**ATTAMBA, "compressor": "gated", "kv_proj": True, "n_kv_heads": 1},
    "strided": {**ATTAMBA, "ssm_scope": "strided", "chunk_size": 3, "boundary": "jitter"},
    "mamba2": {"type": "mamba2", "head_dim": 8},
    "mamba2 of any size": {
        "type": "mamba2",
        "ssm_dim": 12,
        "head_dim": 3,
        "state_dim": 5,
        "conv_width": 2,
    },
    "mingru": {"type": "mingru"},
    "mingru of any size": {"type": "mingru", "hidden_dim": 10, "conv_width": 1},
    "minlstm": {"type": "minlstm"},
    "hawk": {"type": "hawk"},
    "hawk of any size": {"type": "hawk", "hidden_dim": 9, "n_blocks": 3, "conv_width": 2},
    "recurrent hybrid": [{"type": "hawk"}, ATTAMBA, {"type": "mingru"}],
}


def _config(mixer: Any, **fields: Any) -> attamba.ModelConfig:
    settings = {"vocab_size": 13, "dim": 16, "n_layers": 3, "ffn_dim": 24, "mixer": mixer}
    return attamba.ModelConfig(**{**settings, **fields})


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True, "ffn_dim": None, "n_layers": 1}])
def test_parameters(name, fields):
    config = _config(MIXERS[name], **fields)
    with torch.device("meta"):
        model = attamba.build_model(config)
    assert n_parameters(config) == sum(p.numel() for p in model.parameters())


def test_parameters_of_the_papers_sizes():
    """The with-projection ablation aside, within 3% of the logged models."""
    paper = {"vocab_size": 32_000, "dim": 512, "n_layers": 8, "ffn_dim": 1536}
    transformer = _config({"type": "transformer", "n_heads": 8}, **paper)
    assert abs(n_parameters(transformer) / 60.0e6 - 1) < 0.03
    attamba_8 = _config({"type": "attamba", "n_heads": 8, "state_dim": 32}, **paper)
    assert abs(n_parameters(attamba_8) / 62.8e6 - 1) < 0.03


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("seq", [1, 5, 6, 7, 60])
def test_attention_entries_are_the_visible_pairs(name, seq):
    config = _config(MIXERS[name])
    total = 0
    for i, mixer in enumerate(config.layer_mixers()):
        if not attends(mixer):
            continue
        if mixer.type == "transformer":
            lead = None if mixer.window is None else mixer.window - 1
        else:
            lead = mixer.leading_tokens
        groups = mixer.n_kv_heads or mixer.n_heads
        ends = layer_ends(config, i, seq)[None].expand(1, groups, -1)
        total += int(visible(ends, lead, seq).sum()) * mixer.n_heads // groups
    assert attention_entries(config, seq) == total


def test_entries_and_bytes_of_policies_that_need_to_be_told():
    tokens = torch.randint(13, (1, 60))
    config = _config({**ATTAMBA, "boundary": {"type": "separator", "tokens": [1, 2]}})
    ends = torch.isin(tokens, torch.tensor([1, 2]))[0]
    given = _config({**ATTAMBA, "boundary": "given", "sink": True})
    told = torch.stack([layer_ends(config, i, 60, tokens) for i in range(3)])
    assert (told & ends).sum() == 3 * ends.sum()
    for formula in (attention_entries, cache_bytes):
        assert formula(config, 60, tokens=tokens) == formula(given, 60, ends=told)
        with pytest.raises(ValueError, match="boundary='separator' looks at token ids"):
            formula(config, 60)
        with pytest.raises(ValueError, match="boundary='given' needs ends="):
            formula(given, 60)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_measured(name, dtype):
    config = _config(MIXERS[name])
    model = attamba.build_model(config).to(dtype).eval().requires_grad_(False)
    for batch, pieces in ((1, [1, 5]), (3, [40, 1, 1, 20])):
        cache = model.new_cache(batch)
        for seq in pieces:
            model(torch.randint(13, (batch, seq)), cache=cache)
        want = cache_bytes(config, sum(pieces), dtype.itemsize, batch)
        assert cache.nbytes(used=True) == want


def _linear_flops(model: nn.Module, counter: FlopCounterMode) -> int:
    """FLOPs that were counted inside modules of type Linear."""
    counts, root = counter.get_flop_counts(), type(model).__name__
    names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    return sum(sum(counts[f"{root}.{name}"].values()) for name in names)


@pytest.mark.parametrize("name", MIXERS)
def test_projection_flops_are_those_counted(name):
    batch, seq = 2, 10
    config = _config(MIXERS[name])
    model = attamba.build_model(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(13, (batch, seq)))
    counted = _linear_flops(model, counter)
    if name == "transformer":  # all matrix products but attention's own are projections
        by_operator = counter.get_flop_counts()["Global"]
        assert by_operator[torch.ops.aten.mm] == counted
    # matrices that are no module of type Linear: several side by side
    others = ("compressors.out_proj", "gate_weight")
    compressed = [p for n, p in model.named_parameters() if n.endswith(others)]
    counted += sum(2 * p.numel() for p in compressed) * batch * seq
    assert flops(config, seq).projections * batch * seq == counted


@pytest.mark.parametrize("name", MIXERS)
def test_attention_flops_are_four_per_entry_and_channel(name):
    config = _config(MIXERS[name])
    got = flops(config, 60)
    if not any(attends(mixer) for mixer in config.layer_mixers()):
        assert got.attention == attention_entries(config, 60) == 0
    elif not isinstance(config.mixer, list):
        width = config.mixer.head_dim or 4
        assert got.attention * 60 == pytest.approx(4 * width * attention_entries(config, 60))
    total = got.projections + got.attention + got.scan
    assert got.total == total == flops_per_token(config, 60, training=False)
    assert flops_per_token(config, 60) == 3 * total


def test_attention_flops_grow_as_T_over_P_plus_L():
    def attention(P: int, L: int, seq: int) -> float:
        mixer = {**ATTAMBA, "chunk_size": P, "leading_tokens": L}
        return flops(_config(mixer), seq).attention

    for P, L in ((4, 16), (8, 64), (32, 500)):
        for seq in (4_000, 64_000):
            past = (seq - L) ** 2 / (2 * seq * P)  # the mean query's, T/2P where L is small
            window = L + 1 - L**2 / (2 * seq)
            expected = 3 * 4 * 16 * (past + window + 1)  # one more: the sink
            assert attention(P, L, seq) == pytest.approx(expected, rel=0.01)
    dense = flops(_config(TRANSFORMER), 64_000).attention
    assert dense / attention(8, 64, 64_000) == pytest.approx(8, rel=0.05)


def test_scan_flops_by_hand_and_at_any_length():
    config = _config({**ATTAMBA, "ssm_dim": 6, "ssm_heads": 2, "state_dim": 5, "conv_width": 3})
    convolution = (6 + 5 + 5) * 3 * 2
    state = 6 * 5 * (1 + 1 + 1 + 2)  # decay, outer product, sum, read (multiply and add)
    skip = 6 * 2
    assert flops(config, 10).scan == 3 * 2 * (convolution + state + skip)
    assert flops(config, 10_000).scan == flops(config, 10).scan
    assert flops(_config(TRANSFORMER), 10).scan == 0


def test_scan_flops_of_the_others_by_hand():
    def scan(mixer: dict[str, Any]) -> float:
        return flops(_config(mixer, n_layers=1), 10).scan

    mamba2 = {"type": "mamba2", "ssm_dim": 12, "head_dim": 3, "state_dim": 5, "conv_width": 2}
    assert scan(mamba2) == (12 + 5 + 5) * 2 * 2 + 12 * 5 * 5 + 12 * 2
    # convolution; z g, decay, sum
    assert scan({"type": "mingru", "hidden_dim": 10, "conv_width": 2}) == 16 * 2 * 2 + 10 * 3
    assert scan({"type": "minlstm", "hidden_dim": 10, "conv_width": 2}) == 16 * 2 * 2 + 10 * 3
    # convolution; scale, gate, decay, sum
    hawk = {"type": "hawk", "hidden_dim": 9, "n_blocks": 3, "conv_width": 2}
    assert scan(hawk) == 9 * 2 * 2 + 9 * 4
    assert scan({**ATTAMBA, "compressor": "mean"}) == 16 * 2
    # K and V: bias, weight, twice decay and sum, quotient
    assert scan({**ATTAMBA, "compressor": "gated"}) == 2 * 16 * 7


def test_default_widths_cost_about_as_much_as_full_attention():
    """But Mamba-2, whose customary width has half as many again, and more in its B, C and heads."""
    sizes = {"vocab_size": 32_000, "dim": 512, "n_layers": 8, "ffn_dim": 1536}
    full = n_parameters(_config({"type": "transformer", "n_heads": 8}, **sizes))
    for name, low, high in (
        ("mingru", 1.0, 1.01),
        ("minlstm", 1.0, 1.001),
        ("hawk", 1.0, 1.03),
        ("mamba2", 1.05, 1.12),
    ):
        assert low <= n_parameters(_config({"type": name}, **sizes)) / full <= high, name
