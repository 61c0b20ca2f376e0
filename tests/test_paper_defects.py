"""The nine defects of the paper's code, each with a test that fails on code that has it."""

from __future__ import annotations

import dataclasses
import math
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measuring import LargestTensor
from torch import Tensor

import attamba
from attamba.config import AttambaMixer, ConfigError, TransformerMixer
from attamba.mixers import MIXERS, HawkMixer, Mamba2Mixer, MinGRUMixer, MinLSTMMixer
from attamba.models import Decoder
from attamba.models.accounting import flops
from attamba.ops import chunk_attention
from attamba.ops.chunking import BOUNDARIES, make_span

VOCAB, DIM = 13, 16
ATTAMBA = {
    "type": "attamba",
    "n_heads": 4,
    "ssm_heads": 2,
    "state_dim": 4,
    "chunk_size": 8,
    "leading_tokens": 2,
}
TRANSFORMER = {"type": "transformer", "n_heads": 4}


def _model(mixer: Any = ATTAMBA, **fields: Any) -> Decoder:
    torch.manual_seed(0)
    settings = {"vocab_size": VOCAB, "dim": DIM, "n_layers": 2, "ffn_dim": 24, "mixer": mixer}
    return attamba.build_model(attamba.ModelConfig(**{**settings, **fields})).eval()


def _keys(model: Decoder, u: Tensor) -> Tensor:
    """The first layer's keys for its inputs u, [T, d] -> [T, G * D]."""
    mixer, span = model.layers[0].mixer, make_span(len(u), u.device)
    ends, _ = mixer.boundary(span)
    return mixer.project(u[None], ends, span)[1][0].flatten(1).detach()


def _moved(model: Decoder, at: int, seq: int = 24) -> list[int]:
    """Positions whose key changes when token `at` does."""
    u = torch.randn(seq, DIM)
    other = u.clone()
    other[at] += torch.randn(DIM)
    difference = (_keys(model, u) - _keys(model, other)).abs().amax(1)
    return (difference > 1e-5).nonzero()[:, 0].tolist()


def test_1_state_flows_along_the_chunk():
    """There, it flowed between tokens of one phase alone, so no chunk was ever compressed."""
    model = _model({**ATTAMBA, "conv_width": 1, "boundary": "uniform", "sink": False})
    assert _moved(model, at=11) == list(range(11, 16))  # to the last key of its chunk, 8..15
    assert _moved(model, at=8) == list(range(8, 16))


def test_1_the_convolution_sees_more_than_one_token():
    model = _model({**ATTAMBA, "boundary": "uniform", "sink": False})
    with torch.no_grad():
        model.layers[0].mixer.compressors.A_log.fill_(20.0)  # a state that forgets at once
    assert _moved(model, at=9) == [9, 10, 11, 12]
    assert _moved(model, at=14) == [14, 15], "and nothing before its chunk"


def test_2_the_cache_does_not_keep_every_token():
    model, seq = _model(), 800
    model.requires_grad_(False)
    cache = model.new_cache(1)
    model(torch.randint(VOCAB, (1, seq)), cache=cache)
    entry = 2 * DIM * 4
    state = sum(t.nbytes for layer in cache.layers for t in layer.state.tensors().values())
    per_layer = (cache.nbytes(used=True) - state) / 2 / entry
    assert seq / 8 <= per_layer <= seq / 8 + 4
    held = max(layer.kv.k.shape[2] for layer in cache.layers)
    assert held < seq / 2, "allocated, not only counted"


@pytest.mark.parametrize("packed", [False, True])
def test_2_training_builds_no_dense_mask(packed):
    seq = 1024
    model = _model({**ATTAMBA, "leading_tokens": 16}, n_layers=1).train()
    ids, doc_ids = torch.randint(VOCAB, (1, seq)), torch.arange(seq)[None] // 600
    with LargestTensor() as largest:
        model(ids, doc_ids=doc_ids if packed else None).sum().backward()
    assert len(largest.operators) == 2
    # 4 heads x a block of 128 queries x (chunk ends, sink, window and block)
    assert largest.elements <= 4 * 128 * (seq // 8 + 1 + 16 + 128) < seq * seq / 4


@pytest.mark.parametrize("mixer", [ATTAMBA, {**ATTAMBA, "ssm_scope": "sequence"}])
def test_3_outputs_do_not_depend_on_the_inputs_length(mixer):
    """There, the last boundary moved to the end of the input."""
    model, ids = _model(mixer), torch.randint(VOCAB, (1, 40))
    full = model(ids)
    for seq in range(1, 40):
        assert torch.allclose(model(ids[:, :seq]), full[:, :seq], atol=1e-5), seq


def test_3_decoding_a_token_is_the_full_forward():
    """There, one token built its mask from a length of one."""
    model, ids = _model().requires_grad_(False), torch.randint(VOCAB, (1, 40))
    cache = model.new_cache(1)
    steps = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(40)], 1)
    assert torch.allclose(steps, model(ids), atol=1e-5)


@pytest.mark.parametrize("P, n", [(2, 8), (4, 8), (3, 5), (8, 8), (16, 3)])
def test_4_layers_take_turns_even_where_chunks_are_shorter_than_layers_are_many(P, n):
    """There, the offset was layer * (P // n), zero everywhere for P < n."""
    model = _model({**ATTAMBA, "chunk_size": P, "sink": False}, n_layers=n)
    span = make_span(5 * P, torch.device("cpu"))
    ends = torch.stack([layer.mixer.boundary(span)[0][0, 0] for layer in model.layers])
    phases = {int(row.nonzero()[0]) for row in ends}
    assert len(phases) == min(P, n)
    if n >= P:
        assert ends.any(0).all(), "every token ends a chunk in some layer"


@pytest.mark.parametrize("L", [0, 1, 3, 64])
def test_5_L_leading_tokens_are_L_earlier_ones_and_the_query_itself(L):
    """There, they were L + 1 positions whatever one took them for."""
    seq = 200
    q = torch.zeros(1, seq, 1, seq)  # equal weights on all that is visible
    v = torch.eye(seq)[None, :, None]
    for backend in ("torch", "reference"):
        weights = chunk_attention(q, torch.zeros_like(v), v, None, L, backend=backend)[0, :, 0]
        for t in (0, L, L + 1, 150):
            seen = weights[t].nonzero()[:, 0].tolist()
            assert seen == list(range(max(0, t - L), t + 1))


@pytest.mark.parametrize("window", [1, 4])
def test_5_a_transformers_window_counts_the_query(window):
    model = _model({**TRANSFORMER, "window": window}, n_layers=1)
    embeds = model.embed(torch.randint(VOCAB, (1, 20))).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds)[0, 15].sum(), embeds)
    seen = gradient[0].abs().amax(1).nonzero()[:, 0].tolist()
    assert seen == list(range(16 - window, 16))


# --------------------------------------------------------------------------------------------
# 6: no setting without effect
# --------------------------------------------------------------------------------------------

FLIPS: dict[type, dict[str, Any]] = {
    attamba.ModelConfig: {
        "vocab_size": 17,
        "dim": 32,
        "n_layers": 3,
        "ffn_dim": 40,
        "mixer": TRANSFORMER,
        "rope_theta": 100.0,
        "norm_eps": 0.1,
        "tie_embeddings": True,
    },
    AttambaMixer: {
        "type": "transformer",
        "compressor": "mean",
        "n_heads": 2,
        "n_kv_heads": 2,
        "head_dim": 2,
        "chunk_size": 3,
        "leading_tokens": 5,
        "boundary": "uniform",
        "ssm_scope": "sequence",
        "sink": False,
        "kv_proj": True,
        "state_dim": 6,
        "ssm_dim": 12,
        "ssm_heads": 4,
        "conv_width": 2,
        "ssm_init": 0.0,
        "gate_positions": 3,
    },
    Mamba2Mixer: {
        "type": "mingru",
        "ssm_dim": 64,
        "head_dim": 4,
        "state_dim": 6,
        "conv_width": 2,
    },
    MinGRUMixer: {"type": "minlstm", "hidden_dim": 8, "conv_width": 2},
    MinLSTMMixer: {"type": "hawk", "hidden_dim": 8, "conv_width": 2},
    HawkMixer: {"type": "mamba2", "hidden_dim": 16, "n_blocks": 2, "conv_width": 2},
    TransformerMixer: {
        "type": "attamba",
        "n_heads": 2,
        "n_kv_heads": 2,
        "head_dim": 2,
        "window": 5,
    },
}


def _outcome(**config: Any) -> tuple[list[torch.Size], Tensor] | ConfigError:
    """What can be seen of a config: its error, or its parameters' shapes and its logits."""
    try:
        model = _model(**config)
    except ConfigError as error:
        return error
    ids = torch.arange(40)[None] % VOCAB
    return [p.shape for p in model.parameters()], model(ids).detach()


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, ConfigError) or isinstance(b, ConfigError):
        return True
    return a[0] != b[0] or float((a[1] - b[1]).abs().max()) > 1e-4


def test_6_the_flips_name_every_field():
    for cls, flips in FLIPS.items():
        names = {f.name for f in dataclasses.fields(cls)}
        assert set(flips) == names - {"backend"}, cls


@pytest.mark.parametrize("name", FLIPS[attamba.ModelConfig])
def test_6_every_field_of_the_model_matters(name):
    assert _differ(_outcome(), _outcome(**{name: FLIPS[attamba.ModelConfig][name]}))


@pytest.mark.parametrize("name", FLIPS[AttambaMixer])
def test_6_every_field_of_the_attamba_mixer_matters(name):
    flip = {name: FLIPS[AttambaMixer][name]}
    if name == "type":
        flip = {"mixer": TRANSFORMER}
        assert _differ(_outcome(), _outcome(**flip))
        return
    base = {**ATTAMBA, "compressor": "gated"} if name == "gate_positions" else ATTAMBA
    assert _differ(_outcome(mixer=base), _outcome(mixer={**base, **flip}))
    if name in ("n_kv_heads", "head_dim"):  # no longer an error where keys are projected
        base = {**ATTAMBA, "kv_proj": True}
        outcome = _outcome(mixer={**base, **flip})
        assert not isinstance(outcome, ConfigError) and _differ(_outcome(mixer=base), outcome)


@pytest.mark.parametrize("name", FLIPS[TransformerMixer])
def test_6_every_field_of_the_transformer_mixer_matters(name):
    flip = {**TRANSFORMER, name: FLIPS[TransformerMixer][name]}
    if name == "type":
        flip = ATTAMBA
    assert _differ(_outcome(mixer=TRANSFORMER), _outcome(mixer=flip))


@pytest.mark.parametrize(
    "name, field",
    [
        (name, field)
        for name in ("mamba2", "mingru", "minlstm", "hawk")
        for field in FLIPS[MIXERS[name]]
    ],
)
def test_6_every_field_of_a_recurrent_mixer_matters(name, field):
    base = {"type": name, **({"head_dim": 8} if name == "mamba2" else {})}
    flipped = {"type": FLIPS[MIXERS[name]]["type"]}
    if field != "type":
        flipped = {**base, field: FLIPS[MIXERS[name]][field]}
    assert not isinstance(_outcome(mixer=base), ConfigError)
    assert _differ(_outcome(mixer=base), _outcome(mixer=flipped))


@pytest.mark.parametrize(
    "mixer",
    [{"type": "mamba2", "head_dim": 8}, {"type": "hawk"}, {**ATTAMBA, "compressor": "mean"}],
)
def test_6_the_backend_of_a_scan_is_the_one_that_is_asked_for(mixer, monkeypatch):
    asked = []
    for module in ("chunk_scan", "linear_scan"):
        module = import_module(f"attamba.ops.{module}")

        def choose(backend, *of, real=module.choose):
            asked.append(backend)
            return real(backend, *of)

        monkeypatch.setattr(module, "choose", choose)
    _model({**mixer, "backend": "reference"}, n_layers=1)(torch.zeros(1, 5, dtype=torch.long))
    assert set(asked) == {"reference"}


@pytest.mark.parametrize("mixer", [ATTAMBA, TRANSFORMER], ids=["attamba", "transformer"])
def test_6_the_backend_matters(mixer):
    model = _model(
        {**mixer, "backend": "reference", **({"window": 9} if mixer is TRANSFORMER else {})}
    )
    with LargestTensor() as plain:
        model(torch.zeros(1, 40, dtype=torch.long))
    assert not plain.operators
    with pytest.raises(ConfigError, match=r"mixer\.backend='trotch' must be one of: auto, torch"):
        _model({**mixer, "backend": "trotch"})


@pytest.mark.parametrize(
    "spec, flip, training",
    [
        ({"type": "jitter"}, {"seed": 1}, True),
        ({"type": "random"}, {"seed": 1}, False),
        ({"type": "separator", "tokens": [1]}, {"tokens": [2]}, False),
        ({"type": "separator", "tokens": [1]}, {"max_chunk": 3}, False),
        ({"type": "budget"}, {"max_chunks": 4}, False),
    ],
)
def test_6_every_option_of_a_boundary_matters(spec, flip, training):
    ids = torch.arange(40)[None] % VOCAB
    logits = [
        _model({**ATTAMBA, "boundary": boundary}).train(training)(ids)
        for boundary in (spec, {**spec, **flip})
    ]
    assert not torch.allclose(*logits, atol=1e-4)
    assert set(flip) <= set(BOUNDARIES[spec["type"]].options)


def test_6_every_option_of_a_boundary_is_tried():
    known = {(name, option) for name, policy in BOUNDARIES.items() for option in policy.options}
    assert known == {
        ("jitter", "seed"),
        ("random", "seed"),
        ("separator", "tokens"),
        ("separator", "max_chunk"),
        ("budget", "max_chunks"),
    }


@pytest.mark.parametrize(
    "mixer",
    [
        ATTAMBA,
        TRANSFORMER,
        {**TRANSFORMER, "window": 9},
        {**ATTAMBA, "compressor": "mean"},
        {**ATTAMBA, "compressor": "gated"},
        {"type": "mamba2", "head_dim": 8},
        *({"type": name} for name in ("mingru", "minlstm", "hawk")),
    ],
)
def test_6_document_masks_are_not_ignored(mixer):
    model, ids = _model(mixer), torch.randint(VOCAB, (1, 40))
    doc_ids = torch.arange(40)[None] // 25
    packed = model(ids, doc_ids=doc_ids)
    assert torch.allclose(packed[:, :25], model(ids)[:, :25], atol=1e-5)
    assert not torch.allclose(packed[:, 25:], model(ids)[:, 25:], atol=1e-2)
    assert torch.allclose(packed[:, 25:], model(ids[:, 25:]), atol=1e-5)


# --------------------------------------------------------------------------------------------
# 7, 8, 9
# --------------------------------------------------------------------------------------------


def test_7_word_perplexity_divides_by_words():
    """There, the harness was patched to divide by the number of tokens."""
    from attamba.data import load_tokenizer
    from attamba.evaluate import evaluate

    text = "three little words\n"
    model, tokenizer = _model(vocab_size=256), load_tokenizer("bytes")
    result = evaluate(model, tokenizer, [text])
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]])
    logits = model(ids[:, :-1])[0].detach()
    nats = float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert (result.n_words, result.n_tokens) == (3, len(text))
    assert result.word_perplexity == pytest.approx(math.exp(nats / 3), rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(nats / len(text)), rel=1e-4)


def test_8_flops_count_chunks():
    """There, attention was counted as if it were dense."""
    seq = 32_768
    mixer = {**ATTAMBA, "leading_tokens": 64}
    ours = flops(_model(mixer).config, seq).attention
    dense = flops(_model(TRANSFORMER).config, seq).attention
    assert dense == 2 * 4 * DIM * (seq + 1) / 2
    assert 7.5 < dense / ours < 8
    halved = flops(_model({**mixer, "chunk_size": 16}).config, seq).attention
    assert 1.9 < ours / halved < 2.1


def _keeps_its_prefix(policy: Any) -> bool:
    """Are the second layer's ends, in a model, those of the shorter text?"""
    model, tokens = (
        _model({**ATTAMBA, "boundary": policy, "chunk_size": 4}),
        torch.randint(VOCAB, (1, 64)),
    )
    found = []
    boundary = model.layers[1].mixer.boundary
    real = boundary.rule

    def rule(*args):
        ends, carry = real(*args)
        found.append(ends)
        return ends, carry

    boundary.rule = rule
    for seq in range(1, 65):
        model(tokens[:, :seq])
    return all(torch.equal(ends, found[-1][..., : ends.shape[2]]) for ends in found)


def test_9_what_sees_the_future_says_so_and_does_not_decode():
    options = {"separator": {"tokens": [1]}}
    for name, cls in BOUNDARIES.items():
        if name in ("given", "head_cyclic"):  # the caller's own; another scope
            continue
        assert cls.causal == _keeps_its_prefix({"type": name, **options.get(name, {})}), name
    assert not all(cls.causal for cls in BOUNDARIES.values())


@pytest.mark.parametrize("name", ["first_attention", "first_ssm"])
def test_9_such_a_model_runs_and_decoding_refuses_it(name):
    model, ids = _model({**ATTAMBA, "boundary": name}), torch.randint(VOCAB, (2, 30))
    assert model(ids).isfinite().all()
    text = f"'{name}' chooses chunk ends from later tokens.*mixer.boundary=cyclic"
    with pytest.raises(ValueError, match=text):
        model.new_cache()
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=text):
            attamba.generate(model, ids, max_new_tokens=2, use_cache=use_cache)
