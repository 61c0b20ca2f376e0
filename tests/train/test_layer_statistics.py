"""Statistics of each layer: against plain loops, and on several ranks."""

import math

import pytest
import torch
from ranks import on_ranks

from attamba.config import ModelConfig
from attamba.data import Batch
from attamba.models import build_model
from attamba.modules.mixer import AttentionInputs
from attamba.ops.chunking import make_span
from attamba.train import layers, train
from attamba.train.layers import attention_figures, by_module

FIGURES = {
    *("activation_rms", "activation_absmax", "grad_norm", "update_ratio"),
    *("attention_entropy", "window_entropy", "past_entropy", "past_share"),
}
ATTENTION = {"attention_entropy", "window_entropy", "past_entropy", "past_share"}


def entropy(weights):
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights if w > 0)


def plain_figures(q, k, ends, lead, doc_ids, queries):
    """By loops over rows, heads, queries and keys."""
    found = {name: [] for name in sorted(ATTENTION)}
    batch, _, heads, width = q.shape
    groups = k.shape[2]
    for b in range(batch):
        for h in range(heads):
            g = h * groups // heads
            for t in queries:
                window, past = [], []
                for s in range(t + 1):
                    if doc_ids is not None and doc_ids[b, s] != doc_ids[b, t]:
                        continue
                    weight = math.exp(float(q[b, t, h] @ k[b, s, g]) / math.sqrt(width))
                    if lead is None or s >= t - lead:
                        window.append(weight)
                    elif ends is not None and ends[b % len(ends), g % len(ends[0]), s]:
                        past.append(weight)
                found["attention_entropy"].append(entropy(window + past))
                found["window_entropy"].append(entropy(window))
                found["past_share"].append(sum(past) / sum(window + past))
                if past:
                    found["past_entropy"].append(entropy(past))
    return {name: sum(v) / len(v) if v else math.nan for name, v in found.items()}


@pytest.mark.parametrize("lead", [0, 3, None])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_figures_are_those_of_plain_loops(lead, heads, packed):
    torch.manual_seed(0)
    q, k = torch.randn(2, 13, 4, 6), torch.randn(2, 13, 2, 6)
    ends = torch.rand(2, heads, 13) < 0.4
    doc_ids = torch.tensor([[0] * 5 + [1] * 8, [0] * 13]) if packed else None
    for n, queries in ((13, range(13)), (3, (3, 7, 12)), (99, range(13))):
        for own in (ends, None):
            found = attention_figures(AttentionInputs(q, k, own, lead), doc_ids, n)
            want = plain_figures(q, k, own, lead, doc_ids, queries)
            assert {name: float(v[0] / v[1]) for name, v in found.items()} == pytest.approx(
                want, rel=1e-4, abs=1e-5, nan_ok=True
            )


MIXERS = {
    "attamba": {"type": "attamba", "n_heads": 2, "leading_tokens": 3, "boundary": "head_cyclic"},
    "transformer": {"type": "transformer", "n_heads": 4, "n_kv_heads": 2, "window": 5},
}
MIXERS["attamba"] |= {"ssm_scope": "sequence", "chunk_size": 2}


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_the_inputs_are_those_that_the_layer_attends_by(mixer):
    """Weights made from them, times the values, are what the mixer puts out."""
    torch.manual_seed(0)
    config = ModelConfig(dim=32, n_layers=1, mixer=mixer)
    layer = build_model(config).layers[0].mixer
    x, span = torch.randn(2, 11, 32), make_span(11, torch.device("cpu"))
    seen = layer.attention_inputs(x, span)
    repeats = seen.q.shape[2] // seen.k.shape[2]
    k = seen.k.repeat_interleave(repeats, 2)
    scores = torch.einsum("bthd,bshd->bhts", seen.q, k) / math.sqrt(seen.q.shape[-1])
    t, s = torch.arange(11)[:, None], torch.arange(11)
    visible = (s <= t) & (s >= t - seen.leading_tokens)
    if seen.ends is not None:
        past = seen.ends.repeat_interleave(repeats, 1)[:, :, None]
        visible = visible | (past & (s < t - seen.leading_tokens))
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    values = []
    layer.wo.register_forward_pre_hook(lambda _, inputs: values.append(inputs[0]))
    layer(x, span)
    if mixer["type"] == "transformer":
        v = layer._project(x)[2]
    else:
        v = layer.project(x, seen.ends, span)[2]
    y = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(repeats, 2)).flatten(2)
    assert torch.allclose(values[0], y, atol=1e-5)


def of(result):
    return {r["step"]: r for r in result.metrics if r["kind"] == "layers"}


LAYERS = {"metrics.layers_every": 4, "model.n_layers": 2}


def test_every_so_often_there_is_a_record_of_each_layer(make_config):
    result = train(make_config(LAYERS))
    assert list(of(result)) == [4, 8, 12]
    trained = {r["step"]: r for r in result.metrics if r["kind"] == "train"}
    for step, record in of(result).items():
        assert set(record) == FIGURES | {"kind", "step", "tokens", "seconds"}
        layers = ["layers.0", "layers.1"]
        for name in FIGURES - {"grad_norm", "update_ratio"}:
            assert list(record[name]) == layers
        norms = record["grad_norm"]
        assert list(norms) == ["embed", *layers, "norm", "head"]
        # optim.grad_clip is below them: they are put back to what they were
        assert math.hypot(*norms.values()) == pytest.approx(trained[step]["grad_norm"], rel=1e-4)
        assert trained[step]["grad_norm"] > 1.5
        if step < 12:  # the last learning rate is next to nothing
            assert all(0 < ratio < 0.1 for ratio in record["update_ratio"].values())
        assert all(0.05 < share < 0.9 for share in record["past_share"].values())


def test_updates_are_those_of_the_weights(make_config, tmp_path):
    from attamba.train import load

    config = make_config(LAYERS | {"train.save_every": 1, "train.keep": 99})
    record = of(train(config))[8]
    before, after = (by_module(load(config.out, step=step)[0]) for step in (7, 8))
    for name, ratio in record["update_ratio"].items():
        change = [(a - b).detach() for a, b in zip(after[name], before[name])]
        norms = [
            torch.cat([t.detach().flatten() for t in group]).norm()
            for group in (change, before[name])
        ]
        assert ratio == pytest.approx(float(norms[0] / norms[1]), rel=1e-4)


def test_a_step_that_is_left_out_updates_nothing(make_config, monkeypatch):
    from attamba.train.run import Run

    plain = Run._clip
    monkeypatch.setattr(
        Run, "_clip", lambda self: plain(self) * (math.nan if self.step == 3 else 1)
    )
    record = of(train(make_config(LAYERS)))[4]
    assert set(record["update_ratio"].values()) == {0.0}
    assert set(record["grad_norm"].values()) == {None}


def test_more_queries_give_other_means(make_config):
    few, many = (
        of(train(make_config(LAYERS | {"train.steps": 4, "metrics.layers_queries": n}, out=str(n))))
        for n in (1, 64)
    )
    assert few[4]["attention_entropy"] != many[4]["attention_entropy"]
    assert few[4]["activation_rms"] == many[4]["activation_rms"]


def test_mixers_without_attention_have_no_entropy(make_config):
    hybrid = [{"type": "transformer", "n_heads": 2}, {"type": "mamba2"}]
    record = of(train(make_config(LAYERS | {"model.mixer": hybrid, "train.steps": 4})))[4]
    assert list(record["attention_entropy"]) == ["layers.0"]
    assert record["past_share"] == {"layers.0": 0.0}
    assert record["past_entropy"] == {"layers.0": None}
    assert list(record["activation_rms"]) == ["layers.0", "layers.1"]


def records_of(configs):
    """On rank 0, of each run."""
    results = [train(config) for config in configs]
    return [of(result)[4] for result in results if result.is_main]


HEADS_APART = {"type": "attamba", "n_heads": 4, "n_kv_heads": 2, "kv_proj": True, "chunk_size": 4}
HEADS_APART |= {"boundary": "head_cyclic", "ssm_scope": "sequence", "leading_tokens": 5}
SHARED = {
    "chunks of layers": {"model.n_layers": 2},
    "chunks of heads": {"model.mixer": HEADS_APART | {"state_dim": 8, "ssm_heads": 2}},
    "attention and others": {
        "model.mixer": [
            {"type": "transformer", "n_heads": 2, "window": 9},
            {"type": "transformer", "n_heads": 2},
            {"type": "mamba2", "ssm_dim": 32, "head_dim": 8, "state_dim": 8},
        ],
        "model.n_layers": 3,
    },
}


def assert_same_figures(found, expected):
    assert found.keys() == expected.keys()
    for name in FIGURES:
        assert found[name].keys() == expected[name].keys()
        for module, value in expected[name].items():
            want = None if value is None else pytest.approx(value, rel=1e-3)
            assert found[name][module] == want, (name, module)


@pytest.mark.parametrize("mesh", [{"context": 4}, {"tensor": 2, "context": 2}], ids=str)
def test_where_ranks_share_layers_or_rows_they_are_those_of_one(make_config, documents, mesh):
    """Rows are of several documents; windows, chunks and attention reach over ranks."""
    several = {f"parallel.{key}": value for key, value in mesh.items()}
    configs, alone = [], []
    for name, mixer in SHARED.items():
        change = LAYERS | mixer | {"train.steps": 4, "data.train": documents[0]}
        alone.append(make_config(change, out=f"alone, {name}"))
        configs.append(make_config(change | several, out=name))
    found, *others = on_ranks(math.prod(mesh.values()), records_of, configs)
    assert not any(others)
    for name, record, expected in zip(SHARED, found, records_of(alone)):
        assert any(expected["past_entropy"].values()) == (name != "attention and others")
        assert_same_figures(record, expected)


@pytest.mark.parametrize("mesh", [{"shard": 2}, {"replicate": 2, "shard": 1}])
def test_on_several_ranks_they_are_means_over_the_first_row_of_each(
    make_config, documents, mesh, monkeypatch
):
    """As of a process that looks at both rows; gradients and updates are those of one anyway."""
    change = LAYERS | {"train.steps": 4, "data.train": documents[0]}

    def both(batch):
        """Rows 0 and 2 of 4, which are the first of two ranks."""
        return Batch(batch.inputs[::2], batch.targets[::2], batch.doc_ids[::2])

    monkeypatch.setattr(layers, "_looked_at", both)
    (alone,) = records_of([make_config(change, out="alone")])
    several = {f"parallel.{key}": value for key, value in mesh.items()}
    found, nothing = on_ranks(2, records_of, [make_config(change | several, out="several")])
    assert nothing == []
    assert_same_figures(found[0], alone)
