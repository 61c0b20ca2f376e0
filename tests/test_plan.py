"""attamba plan: ranks that share by hand, the command, and the page made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from planning import ATTAMBA, DIM, MIXERS, NARROW, TRANSFORMER, run_config

import attamba
from attamba import cli
from attamba.config import ConfigError, RunConfig, load_run_config
from attamba.models.accounting import countable, layer_ends, n_parameters
from attamba.plan import memory, pages, traffic
from attamba.plan.estimate import beside, make_plan, step_flops
from attamba.plan.layout import Layout, make_layout
from attamba.plan.policies import as_transformer, entries_of_others

ROOT = Path(__file__).parent.parent


# --------------------------------------------------------------------------------------------
# Tensor and context parallelism
# --------------------------------------------------------------------------------------------


def test_tensor_ranks_hold_a_part():
    config = run_config(TRANSFORMER, model={"n_layers": 1})
    alone, shared = (make_layout(config, ranks=n, tensor=n) for n in (1, 2))
    matrices = 2 * DIM * DIM + 2 * DIM * 32 + 3 * DIM * 40 + 2 * 50 * DIM
    vectors = 3 * DIM
    for layout, parts in ((alone, 1), (shared, 2)):
        held = memory.states(config, layout, memory.parameters(config, layout))
        assert held["weights"] == 4 * (matrices // parts + vectors)
    # [tokens, d] in float32: layer 4, embedding and head 2, and the loss; half, there and back
    sums = traffic.tensor_sums(config, shared)
    assert sums == 64 * 2 * 0.5 * 4 * ((4 + 2) * DIM + 3)
    assert traffic.tensor_sums(config, alone) == 0
    ours = run_config(NARROW, model={"n_layers": 1})
    compressors = 64 * 2 * 0.5 * 4 * (2 * 32 + 2 * 2)
    assert traffic.tensor_sums(ours, make_layout(ours, 2, 2)) == sums + compressors


def test_keys_of_other_ranks_are_those_of_the_mask():
    """The last rank's queries see these keys of other ranks, and no others."""
    from attamba.ops.chunking import visible

    config = run_config(ATTAMBA, data={"seq_len": 64})
    layout = make_layout(config, context=4)
    for i in range(3):
        ends = layer_ends(config.model, i, 64)
        seen = visible(ends[None], 5, 64)[0, 0, 48:, :48].any(0)
        old_ends = int(ends[0, :43].sum())
        assert int(seen.sum()) == old_ends + 5
        # Each rank sends as many as the one that has most.
        most = int(ends[0].unflatten(0, (4, 16)).sum(1).max())
        assert entries_of_others(config.model, i, layout) == 5 + 3 * most >= int(seen.sum())


def test_context_traffic_by_hand_and_against_all_keys():
    config = run_config(ATTAMBA, data={"seq_len": 4096}, train={"dtype": "bfloat16"})
    layout = make_layout(config, ranks=4, context=4)
    ours = traffic.context_keys(config, layout)
    whole = traffic.context_keys(beside(config), layout)
    entry = 2 * DIM * 2
    assert whole == 3 * 2 * entry * 3072  # layers; keys and gradients; tokens
    ends = [layer_ends(config.model, i, 4096).unflatten(-1, (4, 1024)) for i in range(3)]
    most = [int(of_ranks.sum(-1).max()) for of_ranks in ends]
    assert ours == 2 * entry * (3 * 5 + 3 * sum(most))
    assert whole / ours == pytest.approx(8, rel=0.03)
    anew = dataclasses.replace(config.parallel, activation_checkpointing="full")
    again = dataclasses.replace(config, parallel=anew)
    assert traffic.context_keys(again, layout) == pytest.approx(ours * 3 / 2)
    assert traffic.context_states(config, layout) == 2 * 3 * 7 * 4 * DIM
    held = memory.others_keys(config, layout)
    assert held == entry * (4 * 5 + 3 * sum(most) + 3 * max(most))
    assert memory.others_keys(again, layout) == 2 * entry * (5 + 3 * max(most))
    assert memory.others_keys(beside(config), layout) == 4 * entry * 3072
    alone = make_layout(config)
    assert traffic.context_keys(config, alone) == traffic.context_states(config, alone) == 0
    assert memory.others_keys(config, alone) == 0


def test_windows_bring_no_more_than_they_reach():
    config = run_config({**TRANSFORMER, "window": 9}, data={"seq_len": 64})
    layout = make_layout(config, context=4)
    assert entries_of_others(config.model, 0, layout) == 8
    unbounded = run_config({**ATTAMBA, "leading_tokens": None}).model
    assert entries_of_others(unbounded, 0, layout) == 48
    assert entries_of_others(run_config(MIXERS["hawk"]).model, 0, layout) == 0


# --------------------------------------------------------------------------------------------
# Work, and whole plans
# --------------------------------------------------------------------------------------------


def test_flops_of_a_step():
    config = run_config(TRANSFORMER, data={"batch_size": 4})
    forward = attamba.models.accounting.flops_per_token(config.model, 64, training=False)
    layout = make_layout(config, ranks=4)
    assert step_flops(config, layout) == (3 * forward * 64, 0)
    full = run_config(
        TRANSFORMER, data={"batch_size": 4}, parallel={"activation_checkpointing": "full"}
    )
    assert step_flops(full, layout) == (3 * forward * 64, (forward - 2 * 50 * DIM) * 64)


def test_a_plan_s_sums_and_time():
    config = run_config(ATTAMBA)
    plan = make_plan(config, make_layout(config), decode_tokens=100)
    assert plan.total_memory == sum(plan.memory.values()) > plan.memory["weights"]
    assert plan.total_traffic == 0
    assert plan.seconds(tflops=2e-6, mfu=0.5) == plan.flops / 1e6
    assert plan.cache == attamba.models.accounting.cache_bytes(config.model, 100, 2)
    assert plan.n_parameters == n_parameters(config.model)


def test_more_ranks_hold_less_and_send_more():
    config = run_config(ATTAMBA, data={"batch_size": 8})
    plans = [make_plan(config, make_layout(config, ranks=n)) for n in (1, 2, 8)]
    weights = [plan.memory["weights"] for plan in plans]
    assert weights[0] > weights[1] > weights[2] >= weights[0] / 8
    sent = [plan.total_traffic for plan in plans]
    assert sent[0] == 0 < sent[1] < sent[2]


def test_the_transformer_beside_has_the_same_sizes():
    model = as_transformer(run_config([NARROW, MIXERS["hawk"]]).model)
    for mixer in model.layer_mixers():
        assert (mixer.type, mixer.n_heads, mixer.n_kv_heads) == ("transformer", 4, 2)
        assert mixer.window is None
    assert as_transformer(run_config(MIXERS["mingru"]).model).mixer.n_heads == 1
    assert model.dim == DIM and model.ffn_dim == 40


def test_chunks_that_follow_the_text_have_the_mean_length():
    separator = {**ATTAMBA, "boundary": {"type": "separator", "tokens": [1]}}
    for mixer in (separator, {**ATTAMBA, "boundary": "given"}):
        config = run_config(mixer)
        assert countable(config.model) == run_config(ATTAMBA).model
        assert make_plan(config, make_layout(config), 50).cache > 0
    for name in ("uniform", "random", "jitter"):
        model = run_config({**ATTAMBA, "boundary": name}).model
        assert countable(model) == model


# --------------------------------------------------------------------------------------------
# Layouts and mistakes
# --------------------------------------------------------------------------------------------


def test_layouts():
    config = run_config(NARROW, data={"batch_size": 8}, train={"accumulate": 2})
    assert make_layout(config) == Layout(1, 1, 1, 1, rows=4, passes=2, seq_len=64)
    layout = make_layout(config, ranks=16, tensor=2, context=4)
    assert (layout.shard, layout.rows, layout.tokens, layout.holders) == (2, 2, 32, 8)
    assert layout.ranks == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "--ranks=0 must be at least 1"),
        ({"tensor": -1}, "--tensor=-1 must be at least 1"),
        ({"ranks": 6, "tensor": 4}, "make 4 ranks, not --ranks=6"),
        ({"context": 3}, "context=3 does not divide data.seq_len=64"),
        ({"tensor": 4}, "tensor=4 does not divide the 2 key/value heads"),
        ({"ranks": 3}, "data.batch_size=8 rows cannot be divided among 3 ranks"),
    ],
)
def test_layouts_that_do_not_fit(options, message):
    config = run_config(NARROW, data={"batch_size": 8})
    with pytest.raises(ConfigError, match=message):
        make_layout(config, **options)


def test_the_command_prints_both_models(capsys):
    path = str(ROOT / "configs/tiny.yaml")
    command = ["plan", path, "data.seq_len=1024", "--ranks", "4", "--context", "2"]
    assert cli.main([*command, "--decode-tokens", "500", "--tflops", "100"]) == 0
    told = capsys.readouterr().out
    for text in (
        "4 ranks: replicate 1, shard 2, tensor 1, context 2",
        "attamba  transformer",
        "optimizer state",
        "keys and values of a row",
        "seconds at 40% of 100 TFLOPS",
        "decode cache of 500 tokens",
        "open chunks and states",
        "docs/scaling-out.md",
    ):
        assert text in told
    assert cli.main(["plan", path]) == 0
    told = capsys.readouterr().out
    assert "1 rank: " in told and "keys and values" not in told and "plan: no" not in told


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_has_a_plan(path, capsys):
    config = load_run_config(path)
    parallel = config.parallel
    ranks = parallel.replicate * max(1, parallel.shard) * parallel.context * parallel.tensor
    assert cli.main(["plan", str(path)]) == 0
    assert f"{ranks} rank" in capsys.readouterr().out


def test_what_a_plan_leaves_out_is_told(capsys):
    path = str(ROOT / "configs/tiny.yaml")
    strided = ["mixer.ssm_scope=strided", "mixer.boundary=cyclic"]
    assert cli.main(["plan", path, *strided]) == 0
    assert "ssm_scope=strided" in capsys.readouterr().out
    assert cli.main(["plan", path, "mixer.boundary={type: separator, tokens: [32]}"]) == 0
    assert "as if all had the mean length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--mfu", "40"], "--mfu=40.0 must be above 0 and at most 1"),
        (["--tflops", "0"], "--tflops=0.0 must be above 0"),
        (["--tflops", "inf"], "--tflops=inf must be above 0 and finite"),
        (["--decode-tokens", "0"], "--decode-tokens=0 must be at least 1"),
        (["mixer.chunk_sice=4"], "chunk_size"),
    ],
)
def test_the_command_s_mistakes(option, message, capsys):
    assert cli.main(["plan", str(ROOT / "configs/tiny.yaml"), *option]) == 2
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> Iterator[str]:
    yield pages.tables(ROOT / "configs/plan")


def test_the_page_is_what_the_code_says(tables):
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert f"{pages.BEGIN}\n\n{tables}\n\n{pages.END}" in page, "run: python -m attamba.plan"


def test_writing_puts_tables_between_the_markers(tables, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    monkeypatch.setattr(pages, "tables", lambda configs: tables)
    pages.write(page)
    assert page.read_text() == f"before\n{pages.BEGIN}\n\n{tables}\n\n{pages.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"page\.md has no lines"):
        pages.write(page)


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.1), ("7b", 7.24), ("70b", 68.98)])
def test_sizes_beside_the_published_ones(name, billions):
    """TinyLlama 1.1B, Mistral 7B (7.24 B), Llama 2 70B (68.98 B)."""
    config = load_run_config(ROOT / f"configs/plan/{name}.yaml")
    assert n_parameters(beside(config).model) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert isinstance(config, RunConfig) and billions < n_parameters(config.model) / 1e9
