"""Ranks that share tokens of rows or heads of layers: loss and gradients of one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from meshes import alone, assert_equal, assert_same_records, gradients_of, of_one, run_on
from ranks import in_meshes, on_ranks, train_until
from torch import Tensor

from attamba.config import ConfigError, RunConfig
from attamba.data import UNSCORED, Batch
from attamba.models import build_model
from attamba.train.distributed import Ranks, check_ranks, open_ranks
from attamba.train.parallelize import parallelize

ATTAMBA = {"type": "attamba", "n_heads": 4, "chunk_size": 4, "leading_tokens": 5}
ATTAMBA |= {"state_dim": 8, "ssm_heads": 2}
SEQUENCE = {**ATTAMBA, "ssm_scope": "sequence"}
MAMBA = {"type": "mamba2", "ssm_dim": 32, "head_dim": 8, "state_dim": 8}
GROUPED = {"n_heads": 4, "n_kv_heads": 2}
RECURRENT = [MAMBA, {"type": "mingru"}, {"type": "minlstm"}, {"type": "hawk", "n_blocks": 4}]

MIXERS: dict[str, Any] = {
    "chunk": ATTAMBA,
    "sequence": SEQUENCE,
    "heads apart": {**SEQUENCE, **GROUPED, "kv_proj": True, "boundary": "head_cyclic"},
    "separators": {**ATTAMBA, "boundary": {"type": "separator", "tokens": [1, 2, 3]}},
    "chunks of any length": {**ATTAMBA, "boundary": "random", "leading_tokens": 0},
    "a wide window": {**ATTAMBA, "leading_tokens": 27, "kv_proj": True, **GROUPED},
    "budget": {**ATTAMBA, "boundary": {"type": "budget", "max_chunks": 6}, "sink": False},
    "mean": {**ATTAMBA, "compressor": "mean"},
    "gated": {**ATTAMBA, "compressor": "gated", "boundary": "jitter"},
    "every state": {**ATTAMBA, "leading_tokens": None},
    "attention": [
        {"type": "transformer", **GROUPED},
        {"type": "transformer", "n_heads": 4, "window": 7},
    ],
    "recurrent": RECURRENT,
}


def rows(config: RunConfig, share: tuple[int, int]) -> Batch:
    """This share of rows with documents of their own in each, and targets that do not count."""
    draw = np.random.default_rng(3)
    shape = (config.data.batch_size, config.data.seq_len)
    inputs, targets = draw.integers(0, config.model.vocab_size, (2, *shape))
    targets = np.where(draw.random(shape) < 0.2, UNSCORED, targets)
    doc_ids = (draw.random(shape) < 0.06).cumsum(1)
    doc_ids[0] = 0
    i, n = share
    part = slice(i * shape[0] // n, (i + 1) * shape[0] // n)
    return Batch(inputs[part], targets[part], doc_ids[part])


def gradients(config: RunConfig, ranks: Ranks) -> dict[str, Tensor]:
    """Loss, norm and every clipped gradient of `rows`."""
    return gradients_of(run_on(config, ranks), rows(config, ranks.share))


def undecayed(config: RunConfig) -> list[str]:
    with open_ranks(config) as ranks:
        run = run_on(config, ranks)
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    groups = run.optimizer.param_groups
    return sorted(names[p] for g in groups if g["weight_decay"] == 0.0 for p in g["params"])


@pytest.fixture
def make_shared(make_config):
    """make_shared(mixer, mesh, more): rows of 24 tokens, enough for four ranks."""

    def make(mixer: Any, mesh: dict[str, int], more: dict[str, Any] | None = None) -> RunConfig:
        change = {f"parallel.{name}": size for name, size in mesh.items()}
        n_layers = max(2, len(mixer)) if isinstance(mixer, list) else 2
        change |= {"model.mixer": mixer, "model.n_layers": n_layers}
        change |= {"data.batch_size": 4, "data.seq_len": 24, "optim.grad_clip": 0.5}
        change |= more or {}
        return make_config(change, out=change.pop("out", "run"))

    return make


def test_rows_shared_by_two(make_shared):
    configs = {name: make_shared(mixer, {"context": 2}) for name, mixer in MIXERS.items()}
    assert_equal(2, configs, gradients)


def test_rows_shared_by_four(make_shared):
    """Windows and chunks that reach over several ranks, too."""
    configs = {name: make_shared(mixer, {"context": 4}) for name, mixer in MIXERS.items()}
    rows_whole = {"data.doc_mask": False}
    configs |= {
        f"{name}, no documents": make_shared(MIXERS[name], {"context": 4}, rows_whole)
        for name in ("chunk", "heads apart", "attention", "recurrent")
    }
    assert_equal(4, configs, gradients)


def test_the_same_parameters_decay(make_shared):
    """Sharded parameters are new ones: what they stand for must not be lost."""
    config = make_shared([ATTAMBA, {"type": "hawk", "n_blocks": 4}], {"shard": 2})
    found = on_ranks(2, undecayed, config)
    expected = undecayed(alone(config))
    assert found == [expected, expected]
    assert "layers.0.mixer.compressors.A_log" in expected


def test_layers_shared_by_two(make_shared):
    configs = {name: make_shared(mixer, {"tensor": 2}) for name, mixer in MIXERS.items()}
    configs["tied"] = make_shared(ATTAMBA, {"tensor": 2}, {"model.tie_embeddings": True})
    assert_equal(2, configs, gradients)


FEW = {name: MIXERS[name] for name in ("chunk", "heads apart", "gated", "attention", "recurrent")}
MESHES = {
    "tensor, shard": {"tensor": 2, "shard": 2},
    "tensor, replicate": {"tensor": 2, "replicate": 2},
    "context, shard": {"context": 2, "shard": 2},
    "context, replicate": {"context": 2, "replicate": 2},
    "tensor, context": {"context": 2, "tensor": 2},
    "tensor alone": {"tensor": 4},
}


def test_meshes_of_four(make_shared):
    # Each mixer in three of the meshes, tensor and context among them; each mesh with three mixers.
    configs = {
        f"{mesh}: {name}": make_shared(mixer, sizes)
        for i, (mesh, sizes) in enumerate(MESHES.items())
        for j, (name, mixer) in enumerate(FEW.items())
        if (name == "recurrent" if sizes.get("tensor") == 4 else (j - i) % 5 < 3)
    }
    whole = {"model.mixer.ssm_heads": 4, "model.n_layers": 1}
    configs["four"] = make_shared(ATTAMBA, {"tensor": 4}, whole)
    odd = {**MAMBA, "state_dim": 5}  # rows of in_proj that four ranks do not divide
    configs["odd"] = make_shared(odd, {"tensor": 4}, {"model.n_layers": 1})
    anew = {"parallel.activation_checkpointing": "full", "train.accumulate": 2}
    configs["anew"] = make_shared(SEQUENCE, {"tensor": 2, "context": 2}, anew)
    some = {"parallel.activation_checkpointing": "selective"}
    configs["some anew"] = make_shared(ATTAMBA, {"tensor": 2, "context": 2}, some)
    assert_equal(4, configs, gradients)


def test_a_run_goes_on_in_other_meshes(make_shared):
    """Tensor 2 x shard 2, one process, context 2 x tensor 2, two copies: one curve."""
    mixers = [ATTAMBA, MAMBA]
    change = {"train.eval_every": 4, "train.save_every": 0, "train.steps": 10}
    change |= {"model.tie_embeddings": True, "optim.weight_decay": 0.5}
    change |= {"train.chunk_sizes": [2, 4], "train.accumulate": 2}
    straight = train_until(make_shared(mixers, {"shard": 1}, {**change, "out": "straight"}))

    def on(mesh: dict[str, int]) -> RunConfig:
        return make_shared(mixers, mesh, change)

    on_ranks(4, train_until, on({"tensor": 2, "shard": 2}), 3)
    assert train_until(on({"shard": 1}), 2) == []
    on_ranks(4, train_until, on({"tensor": 2, "context": 2}), 2)
    on_ranks(2, train_until, on({"replicate": 2}), 1)
    records, *_ = on_ranks(2, train_until, on({"tensor": 2}))
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 11))
    assert_same_records(records, straight)


def logits_of_rows(config: RunConfig, ids: Tensor, ends: Tensor, doc_ids: Tensor) -> Tensor:
    """Of all ranks' tokens in order, with the caller's own chunk ends."""
    with open_ranks(config) as ranks:
        model = build_model(config.model)
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        forward = parallelize(model, ranks.mesh, config)
        with torch.no_grad():
            logits = forward(ids, ends=ends, doc_ids=doc_ids)
        if ranks.alone:
            return logits
        wrong = [
            (ids[:, :-1], {}, "rows of 23 tokens cannot be divided among 4 ranks"),
            (ids, {"attention_mask": torch.ones_like(ids)}, "neither a cache nor attention_mask"),
            (ids, {"cache": model.new_cache(len(ids))}, "neither a cache nor attention_mask"),
        ]
        for rows, options, text in wrong:
            with pytest.raises(ValueError, match=text):
                forward(rows, **options)
        parts = [torch.empty_like(logits) for _ in range(ranks.size)]
        torch.distributed.all_gather(parts, logits)
        return torch.cat(parts, 1)


@pytest.mark.parametrize("scope", ["chunk", "sequence"])
def test_given_chunks_of_shared_rows(make_shared, scope):
    """Chunks of any length, over several ranks; with scope sequence in each head its own."""
    given = {**ATTAMBA, "boundary": "given", "ssm_scope": scope}
    config = make_shared(given, {"context": 4})
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(256, (4, 24), generator=draw)
    heads = 4 if scope == "sequence" else 1
    ends = torch.rand(2, 4, heads, 24, generator=draw) < 0.15
    doc_ids = (torch.rand(4, 24, generator=draw) < 0.05).cumsum(1)
    expected = logits_of_rows(alone(config), ids, ends, doc_ids)
    for found in on_ranks(4, logits_of_rows, config, ids, ends, doc_ids):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (ATTAMBA, {"parallel.context": 5}, r"context=5 does not divide data\.seq_len=24"),
    ({**ATTAMBA, "ssm_heads": 1}, {"parallel.tensor": 2}, r"tensor=2 .* mixer\.ssm_heads=1"),
    ({**SEQUENCE, **GROUPED, "kv_proj": True}, {"parallel.tensor": 4}, r"the 2 key/value heads"),
    (MAMBA, {"parallel.tensor": 8}, r"the 4 heads \(ssm_dim / head_dim\) of a layer"),
    ({"type": "hawk", "n_blocks": 3, "hidden_dim": 24}, {"parallel.tensor": 2}, r"n_blocks=3"),
    ({"type": "minlstm"}, {"parallel.tensor": 3}, r"tensor=3 does not divide mixer\.hidden_dim=32"),
    (ATTAMBA, {"parallel.tensor": 2, "model.ffn_dim": 33}, r"model\.ffn_dim=33"),
    (ATTAMBA, {"parallel.tensor": 2, "model.vocab_size": 257}, r"model\.vocab_size=257"),
    (
        {**ATTAMBA, "ssm_scope": "strided"},
        {"parallel.context": 2},
        r"context=2 .* mixer\.ssm_scope=strided",
    ),
    (
        {**ATTAMBA, "boundary": "first_ssm"},
        {"parallel.tensor": 2},
        r"tensor=2 .* mixer\.boundary=first_ssm",
    ),
]


@pytest.mark.parametrize(("mixer", "change", "text"), WRONG)
def test_what_cannot_be_shared_is_named(make_shared, mixer, change, text):
    config = make_shared(mixer, {"shard": 1}, change)
    size = config.parallel.context * config.parallel.tensor
    with pytest.raises(ConfigError, match=text):
        check_ranks(config, size)


def test_what_divides_can_be_shared(make_shared):
    config = make_shared(ATTAMBA, {"context": 2, "tensor": 2})
    assert check_ranks(config, 8) == (1, 2, 2, 2)
    with pytest.raises(ConfigError, match=r"context=2, parallel\.tensor=2 ask for 4 ranks"):
        check_ranks(config, 6)
    with pytest.raises(ConfigError, match="batch_size=4 cannot be divided among 8 ranks"):
        check_ranks(config, 32)


def compiled_gradients(configs: list[RunConfig]) -> list[dict[str, Tensor]]:
    """By the compiler's front end alone, which is what parts of parameters must get through."""
    torch.compile = partial(torch.compile, backend="eager")
    return in_meshes(configs, gradients_anew)


def gradients_anew(config: RunConfig, ranks: Ranks) -> dict[str, Tensor]:
    """With nothing compiled before, as in a run of its own: else sizes would become symbols."""
    torch._dynamo.reset()
    return gradients(config, ranks)


def test_layers_can_be_compiled_in_every_mesh(make_shared):
    compiled = {"train.compile": True, "model.n_layers": 1}
    meshes = [{name: 2} for name in ("tensor", "context", "shard", "replicate")]
    configs = [make_shared(SEQUENCE, mesh, compiled) for mesh in meshes]
    plain = make_shared(SEQUENCE, {"shard": 1}, {**compiled, "train.compile": False})
    expected = of_one(plain, gradients)
    for of_rank in on_ranks(2, compiled_gradients, configs, timeout=400):
        for mesh, found in zip(meshes, of_rank):
            for key, tensor in expected.items():
                assert (found[key] - tensor).norm() < 5e-5 * tensor.norm(), (mesh, key)


def test_ranks_that_share_lose_about_as_much_to_bfloat16_as_one_does(make_shared):
    """Of each gradient, against float32: rounding errors differ, of sums over ranks, too."""
    mixed = {"train.dtype": "bfloat16"}
    meshes = [{"tensor": 2, "context": 2}, {"tensor": 2, "shard": 2}, {"context": 2, "shard": 2}]
    configs = [make_shared(ATTAMBA, mesh, mixed) for mesh in meshes]
    exact, rounded = (
        of_one(config, gradients) for config in (make_shared(ATTAMBA, {"shard": 1}), configs[0])
    )
    for of_rank in on_ranks(4, in_meshes, configs, gradients, timeout=400):
        for mesh, found in zip(meshes, of_rank):
            for key, tensor in exact.items():
                lost = (rounded[key] - tensor).norm() / tensor.norm()
                error = (found[key] - tensor).norm() / tensor.norm()
                assert error < 3 * lost + 0.03, f"{mesh}: {key} {error:.3f}, alone {lost:.3f}"
