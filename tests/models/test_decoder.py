"""The decoder: its inputs, its errors, its gradients, half precision, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attamba
from attamba.config import ConfigError
from attamba.models import Decoder

VOCAB = 11
ATTAMBA = {
    "type": "attamba",
    "n_heads": 4,
    "ssm_heads": 2,
    "state_dim": 4,
    "chunk_size": 4,
    "leading_tokens": 6,
}
TRANSFORMER = {"type": "transformer", "n_heads": 4}
VARIANTS: dict[str, Any] = {
    "chunk": ATTAMBA,
    "sequence": {**ATTAMBA, "ssm_scope": "sequence"},
    "per head": {**ATTAMBA, "ssm_scope": "sequence", "boundary": "head_cyclic"},
    "kv_proj": {**ATTAMBA, "kv_proj": True},
    "grouped": {**ATTAMBA, "kv_proj": True, "n_kv_heads": 2, "head_dim": 6, "conv_width": 2},
    "unbounded": {**ATTAMBA, "leading_tokens": None},
    "no window": {**ATTAMBA, "leading_tokens": 0},
    "transformer": TRANSFORMER,
    "sliding": {**TRANSFORMER, "window": 5, "n_kv_heads": 2, "head_dim": 6},
    "hybrid": [ATTAMBA, TRANSFORMER],
}


def _config(mixer: Any = ATTAMBA, **fields: Any) -> attamba.ModelConfig:
    settings = {"vocab_size": VOCAB, "dim": 16, "n_layers": 2, "ffn_dim": 24, "mixer": mixer}
    return attamba.ModelConfig(**{**settings, **fields})


def _model(mixer: Any = ATTAMBA, **fields: Any) -> Decoder:
    torch.manual_seed(0)
    return attamba.build_model(_config(mixer, **fields)).eval()


def _ids(batch: int = 2, seq: int = 20) -> Tensor:
    return torch.randint(VOCAB, (batch, seq))


def _relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / want.norm())


# --------------------------------------------------------------------------------------------
# Inputs and outputs
# --------------------------------------------------------------------------------------------


def test_logits_are_the_head_of_the_hidden_state():
    model, ids = _model(), _ids()
    hidden = model(ids, return_hidden=True)
    assert hidden.shape == (2, 20, 16)
    logits = model(ids)
    assert logits.shape == (2, 20, VOCAB) and logits.dtype == torch.float32
    assert torch.equal(model.head(hidden), logits)


def test_embeddings_may_be_given_instead_of_ids():
    model, ids = _model(), _ids()
    embeds = model.embed(ids)
    assert torch.equal(model(inputs_embeds=embeds), model(ids))
    cache = model.new_cache(2)
    parts = [model(inputs_embeds=e, cache=cache) for e in embeds.split([13, 7], 1)]
    assert _relative_error(torch.cat(parts, 1), model(ids)) < 1e-5
    for both in ({}, {"ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="pass either ids or inputs_embeds"):
            model(**both)
    separator = _model({**ATTAMBA, "boundary": {"type": "separator", "tokens": [1]}})
    with pytest.raises(ValueError, match="boundary='separator' looks at token ids"):
        separator(inputs_embeds=embeds)


def test_an_empty_row_of_tokens():
    assert _model()(_ids(2, 0)).shape == (2, 0, VOCAB)


def test_given_ends_in_every_shape():
    model, ids = _model({**ATTAMBA, "boundary": "given", "ssm_scope": "sequence"}), _ids()
    row = torch.rand(2, 20) < 0.3
    want = model(ids, ends=row)
    per_layer = row.expand(2, -1, -1)
    assert torch.equal(model(ids, ends=per_layer), want)
    assert torch.equal(model(ids, ends=per_layer[:, :, None]), want)
    assert torch.equal(model(ids, ends=per_layer[:, :, None].expand(-1, -1, 4, -1)), want)
    other = per_layer.clone()
    other[1] = ~other[1]
    assert not torch.equal(model(ids, ends=other), want), "each layer has its own"
    heads = per_layer[:, :, None].repeat(1, 1, 4, 1)
    heads[:, :, 3] = False
    assert not torch.equal(model(ids, ends=heads), want), "each head has its own"


def test_given_ends_concern_the_layers_that_take_them():
    """Those of a hybrid's other layers are their own; options may stand in a dictionary."""
    given, cyclic = {**ATTAMBA, "boundary": {"type": "given"}}, {**ATTAMBA, "chunk_size": 3}
    model, ids = _model([given, cyclic]), _ids()
    row = torch.rand(2, 20) < 0.3
    want = model(ids, ends=row)
    per_layer = row.repeat(2, 1, 1)
    per_layer[1] = ~row
    assert torch.equal(model(ids, ends=per_layer), want)
    per_layer[0] = ~row
    assert not torch.equal(model(ids, ends=per_layer), want)
    cache = model.eval().new_cache(2)
    steps = [model(ids[:, t : t + 1], ends=row[:, t : t + 1], cache=cache) for t in range(20)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids, ends=row))
    with pytest.raises(ValueError, match="ends was passed, but no layer has boundary='given'"):
        _model([cyclic, cyclic])(ids, ends=row)


def test_given_ends_of_a_policy_are_that_policy():
    ids = _ids(1, 40)
    cyclic, given = _model(), _model({**ATTAMBA, "boundary": "given"})
    t = torch.arange(40)
    ends = torch.stack([(t + 1) % 4 == 0, (t + 3) % 4 == 0])[:, None]
    assert torch.equal(given(ids, ends=ends), cyclic(ids))


def test_int_masks_and_int32_ids():
    model, ids = _model(), _ids()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    out = model(ids.int(), attention_mask=mask)
    assert _relative_error(out[0, 7:], model(ids[:1, 7:])[0]) < 1e-5
    assert _relative_error(out[1], model(ids[1:])[0]) < 1e-5


def test_draws_change_training_alone():
    model, ids = _model({**ATTAMBA, "boundary": "random"}), _ids()

    def run(draw: int, training: bool) -> Tensor:
        model.set_draw(draw)
        return model.train(training)(ids)

    assert torch.equal(run(1, False), run(2, False))
    assert torch.equal(run(1, True), run(1, True))
    assert not torch.equal(run(1, True), run(2, True))


# --------------------------------------------------------------------------------------------
# Building
# --------------------------------------------------------------------------------------------


def test_weights_come_from_the_global_random_state():
    a, b = _model(), _model()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    c = attamba.build_model(_config())
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_initial_scale():
    """Truncated normals, deviation fan_in ** -0.5, for compressors' outputs ssm_init of it."""
    model = _model({**ATTAMBA, "ssm_init": 0.5}, dim=64, vocab_size=400)
    mixer = model.layers[0].mixer
    fans = {
        model.embed.weight: 64,
        model.head.weight: 64,
        mixer.wq.weight: 64,
        mixer.compressors.in_proj.weight: 64,
        mixer.compressors.out_proj: 32 / 0.5**2,
        model.layers[0].ffn.w2.weight: 24,
    }
    for weight, fan in fans.items():
        assert abs(float(weight.detach().std()) * fan**0.5 - 0.98) < 0.06
        assert float(weight.detach().abs().max()) <= 3 * fan**-0.5
    decay = mixer.compressors.A_log.detach().exp()
    assert 0.01 <= float(decay.min()) <= float(decay.max()) <= 2


def test_tied_embeddings():
    model = _model(tie_embeddings=True)
    assert model.head.weight is model.embed.weight
    assert sum(p.numel() for p in model.parameters()) == (
        sum(p.numel() for p in _model().parameters()) - VOCAB * 16
    )
    model(_ids()).sum().backward()
    assert model.embed.weight.grad.norm() > 0


def test_hybrids_cycle_their_mixers():
    model = _model([ATTAMBA, TRANSFORMER], n_layers=5)
    names = [type(layer.mixer).__name__ for layer in model.layers]
    assert names == ["ChunkAttention", "Attention"] * 2 + ["ChunkAttention"]
    assert [model.layers[i].mixer.boundary.offset for i in (0, 2, 4)] == [0, 1, 3]


def test_no_layer_holds_another():
    model = _model([ATTAMBA, TRANSFORMER])
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len({id(p) for p in model.parameters()})
    assert all(n.count("layers.") <= 1 for n in names)


def test_build_on_the_meta_device_and_fill_in_later():
    with torch.device("meta"):
        model = attamba.build_model(_config([ATTAMBA, TRANSFORMER])).eval()
    assert all(p.is_meta for p in model.parameters())
    real = _model([ATTAMBA, TRANSFORMER])
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    model.set_draw(0)
    ids = _ids()
    assert torch.equal(model(ids), real(ids))
    cache = model.new_cache(2)
    assert _relative_error(model(ids, cache=cache), real(ids)) < 1e-5


def test_the_state_dict_is_parameters_alone():
    model = _model({**ATTAMBA, "boundary": "jitter"})
    assert set(model.state_dict()) == {n for n, _ in model.named_parameters()}


# --------------------------------------------------------------------------------------------
# Gradients, half precision, compilation
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_used(name):
    model, ids = _model(VARIANTS[name]).train(), _ids()
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for parameter, tensor in model.named_parameters():
        assert tensor.grad is not None, parameter
        assert tensor.grad.isfinite().all() and tensor.grad.norm() > 1e-8, parameter


@pytest.mark.parametrize("name", VARIANTS)
def test_backends_agree_on_logits_and_gradients(name):
    """The torch operators inside a model against the plain references inside the same model."""
    spec, ids, doc_ids = VARIANTS[name], _ids(2, 70), torch.arange(70).expand(2, -1) // 30
    results = []
    for backend in ("torch", "reference"):
        one = {**spec, "backend": backend} if isinstance(spec, dict) else None
        model = _model(one or [{**m, "backend": backend} for m in spec]).train()
        logits = model(ids, doc_ids=doc_ids)
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for got, want in zip(*results):
        assert _relative_error(got, want) < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16(name):
    model = _model(VARIANTS[name], dim=32)
    ids = _ids(2, 60)
    exact = model(ids)
    model = model.bfloat16()
    full = model(ids)
    assert full.dtype == torch.bfloat16
    assert _relative_error(full, exact) < 5e-2
    cache = model.new_cache(2)
    assert all(layer.kv.k.dtype == torch.bfloat16 for layer in cache.layers)
    cuts = [slice(0, 33), *(slice(t, t + 1) for t in range(33, 60))]
    decoded = torch.cat([model(ids[:, cut], cache=cache) for cut in cuts], 1)
    assert _relative_error(decoded, full) < 5e-2


def test_autocast():
    model, ids = _model(dim=32).train(), _ids(2, 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
    assert logits.dtype == torch.bfloat16
    assert _relative_error(logits, model(ids)) < 5e-2
    logits.float().square().mean().backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


def test_a_compiled_training_step_is_the_eager_one():
    model = _model({**ATTAMBA, "boundary": "jitter"}).train()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    losses = []
    for draw in (1, 2):
        ids, doc_ids = _ids(2, 41), torch.arange(40).expand(2, -1) // 25
        model.set_draw(draw)
        steps = []
        for forward in (model, compiled):
            logits = forward(ids[:, :-1], doc_ids=doc_ids)
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            steps.append([loss, *gradients])
        for got, want in zip(*steps):
            assert _relative_error(got, want) < 1e-4
        losses.append(float(loss.detach()))
    assert counter.frame_count == 1, "another draw of the boundaries compiles nothing again"
    assert losses[0] != losses[1]
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda m: m(torch.tensor([[3, 11]])), "token id 11 is outside the vocabulary 0..10; is"),
        (lambda m: m(torch.tensor([[-2, 3]])), "token id -2 is outside the vocabulary 0..10"),
        (lambda m: m(torch.tensor([3, 4])), r"ids must be int64 \[B, T\], not torch.int64 \[2\]"),
        (
            lambda m: m(_ids(2, 3), attention_mask=_mask("111", "110")),
            "attention_mask has padding to the right of a token; pad prompts on the left",
        ),
        (
            lambda m: m(_ids(2, 3), attention_mask=_mask("111", "101"), cache=m.new_cache(2)),
            "attention_mask has padding to the right of a token",
        ),
        (
            lambda m: m(_ids(2, 3), attention_mask=_mask("11", "11")),
            r"attention_mask has shape \[2, 2\], expected \[2, 3\]",
        ),
        (
            lambda m: m(_ids(2, 3), doc_ids=torch.zeros(3)),
            r"doc_ids has shape \[3\], expected \[2, 3\]",
        ),
        (
            lambda m: m(_ids(2, 3), doc_ids=torch.zeros(2, 3).long(), cache=m.new_cache(2)),
            "doc_ids goes neither with attention_mask nor with a cache; decode documents as rows",
        ),
        (
            lambda m: m(_ids(2, 3), doc_ids=torch.zeros(2, 3), attention_mask=_mask("111", "111")),
            "doc_ids goes neither with attention_mask nor with a cache",
        ),
        (lambda m: m(_ids(3, 3), cache=m.new_cache(2)), "the cache has 2 rows, the input 3"),
        (
            lambda m: m(_ids(2, 3), ends=torch.ones(2, 3).bool()),
            "ends was passed, but no layer has boundary='given'; set mixer.boundary=given",
        ),
    ],
)
def test_errors_of_a_call(call, text):
    with pytest.raises(ValueError, match=text):
        call(_model())


@pytest.mark.parametrize(
    "ends, text",
    [
        (torch.zeros(2, 3), "ends must be boolean, not torch.float32; use ends.bool()"),
        (torch.zeros(3).bool(), r"ends has shape \[3\]; it must be \[B, T\], \[n_layers, B, T\]"),
        (torch.zeros(3, 2, 3).bool(), r"ends has shape \[3, 2, 1, 3\]; .* n_layers=2, B=2, T=3"),
        (torch.zeros(2, 5, 1, 3).bool(), r"ends has shape \[2, 5, 1, 3\]"),
        (
            torch.zeros(2, 9).bool(),
            r"ends has 9 positions, but this call has 3 tokens, after \[6, 6\] in the cache; "
            r"pass the ends of this call's tokens alone",
        ),
        (None, r"boundary='given' needs ends=..., bool \[B, T\] or \[n_layers, B, T\]"),
        (torch.zeros(2, 2, 4, 3).bool(), "ends differ between heads .* mixer.ssm_scope=sequence"),
    ],
)
def test_errors_of_given_ends_after_a_cache(ends, text):
    model = _model({**ATTAMBA, "boundary": "given"})
    cache = model.new_cache(2)
    model(_ids(2, 6), ends=torch.zeros(2, 6).bool(), cache=cache)
    with pytest.raises(ValueError, match=text):
        model(_ids(2, 3), ends=ends, cache=cache)
    if ends is None or ends.shape[-1] == 3:
        with pytest.raises(ValueError, match=text):
            model(_ids(2, 3), ends=ends)


@pytest.mark.parametrize("cached", [False, True])
def test_ends_for_a_wrong_number_of_heads(cached):
    model = _model({**ATTAMBA, "boundary": "given", "ssm_scope": "sequence"})
    cache = model.new_cache(2) if cached else None
    with pytest.raises(ValueError, match=r"ends has shape \[.*3, 5\]"):
        model(_ids(2, 5), ends=torch.zeros(2, 2, 3, 5).bool(), cache=cache)


@pytest.mark.parametrize(
    "mixer, text",
    [
        (
            {**ATTAMBA, "boundary": "head_cyclic"},
            "mixer.boundary=head_cyclic needs mixer.ssm_scope=sequence",
        ),
        ({**ATTAMBA, "n_heads": 3}, "mixer.n_heads=3 does not divide dim=16; set mixer.head_dim"),
        ({**ATTAMBA, "n_kv_heads": 2}, r"n_kv_heads \* head_dim = 2 \* 4 = 8 must equal dim = 16"),
        ({**ATTAMBA, "leading_tokens": -1}, "mixer.leading_tokens=-1 must be at least 0"),
        ({**ATTAMBA, "chunk_size": 0}, "mixer.chunk_size=0 must be at least 1"),
    ],
)
def test_configs_that_do_not_fit(mixer, text):
    with pytest.raises(ConfigError, match=text):
        _config(mixer)


def test_a_config_that_was_changed_is_checked_again():
    config = _config()
    config.mixer.chunk_size = 0
    with pytest.raises(ConfigError, match=r"mixer\.chunk_size=0 must be at least 1"):
        attamba.build_model(config)
    with pytest.raises(ValueError, match="boundary='cycilc' is not a policy"):
        attamba.build_model(_config({**ATTAMBA, "boundary": "cycilc"}))
