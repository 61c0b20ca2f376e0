"""The training loop on CUDA: it does not wait for the device, and measures what it does there."""

from __future__ import annotations

import json
import math
import pickle
import random
from typing import Any

import pytest
import torch
from torch import nn
from waiting import assert_steps_do_not_wait

from attamba.config import RunConfig, apply_overrides, from_dict
from attamba.train import train
from attamba.train.chunk_sizes import draw_size
from attamba.train.loop import open_loop
from attamba.train.losses import Rows
from attamba.train.passes import CapturedPasses
from attamba.train.phases import PHASES, Phases
from attamba.train.run import Run

TREE: dict[str, Any] = {
    "model": {"dim": 128, "n_layers": 2, "mixer": {"n_heads": 2, "chunk_size": 4}},
    "data": {"seq_len": 128, "batch_size": 4, "valid_fraction": 0.1},
    "train": {"steps": 12, "device": "cuda", "dtype": "bfloat16", "log_every": 4, "eval_rows": 4},
}


@pytest.fixture
def make_config(tmp_path):
    """make_config({"optim.lr": 1e-3}): a tiny run on the GPU."""
    words = ["the", "cat", "dog", "sees", "and", "then"]
    draw = random.Random(0)
    for i in range(20):  # rows hold several documents
        text = " ".join(draw.choice(words) for _ in range(300))
        (tmp_path / f"{i}.txt").write_text(text)

    def make(overrides: dict[str, Any] | None = None, out: str = "run") -> RunConfig:
        keys = {"data.train": [str(p) for p in tmp_path.glob("*.txt")], "train.progress": False}
        tree = apply_overrides(TREE, {**keys, "out": str(tmp_path / out), **(overrides or {})})
        return from_dict(RunConfig, tree)

    return make


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("threshold", [None, 10.0])
def test_a_step_does_not_wait_for_the_device(make_config, compiled, threshold):
    change = {"train.compile": compiled, "spikes.threshold": threshold, "train.accumulate": 2}
    assert_steps_do_not_wait(make_config(change))


MIXERS: dict[str, Any] = {
    "attamba": {"type": "attamba", "n_heads": 2, "chunk_size": 4},
    "heads": {
        "type": "attamba",
        "n_heads": 2,
        "chunk_size": 4,
        "ssm_scope": "sequence",
        "boundary": "head_cyclic",
    },
    "random": {"type": "attamba", "n_heads": 2, "chunk_size": 4, "boundary": "random"},
    "gated": {"type": "attamba", "n_heads": 2, "chunk_size": 4, "compressor": "gated"},
    "hybrid": [{"type": "transformer", "n_heads": 2}, {"type": "mamba2"}],
    "recurrent": [{"type": "hawk"}, {"type": "mingru"}],
}


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_statistics_of_layers_do_not_wait_for_the_device(make_config, mixer):
    change = {"model.mixer": MIXERS[mixer], "metrics.layers_every": 1}
    assert_steps_do_not_wait(make_config(change))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mixer", list(MIXERS))
def test_cuda_graphs_change_nothing(make_config, mixer, compiled):
    """Two passes a step, validation in between, another chunk size from step to step."""
    change = {"model.mixer": MIXERS[mixer], "train.compile": compiled, "train.accumulate": 2}
    if mixer == "attamba":
        change["train.chunk_sizes"] = [2, 4]
    losses = []
    for graphs in (False, True):
        config = make_config(
            {**change, "train.cuda_graphs": graphs, "train.log_every": 1, "train.eval_every": 5},
            out=f"graphs-{graphs}",
        )
        records = train(config).metrics
        losses.append([r.get("loss", r.get("valid_loss")) for r in records])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[1][0] != losses[1][-1]


def test_captured_gradients_are_the_same(make_config):
    """Of two passes a step and another chunk size in each, which come back."""
    change = {"train.accumulate": 2, "train.chunk_sizes": [2, 4], "train.dtype": "float32"}
    found = []
    for graphs in (False, True):
        with open_loop(make_config({**change, "train.cuda_graphs": graphs}, f"{graphs}")) as loop:
            run = loop.run
            sizes = [draw_size([2, 4], run.config.train.seed, step) for step in range(6)]
            for step in range(6):
                run.step = step
                run.optimizer.zero_grad()
                with run.drawn_chunks():
                    run.gradients(run.send(run.sources.train.batch(step)))
                found.append([p.grad.clone() for p in run.model.parameters()])
    assert set(sizes) == {2, 4}
    for plain, captured in zip(found[:6], found[6:]):
        for a, b in zip(plain, captured):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()))


def test_a_parameter_that_a_variant_leaves_out_has_no_gradient():
    weights = [nn.Parameter(torch.ones(3, device="cuda")) for _ in range(2)]
    used = [0]

    def mean_loss(rows: Rows, scored: torch.Tensor) -> torch.Tensor:
        return sum((weights[i] * rows.inputs).sum() for i in used) / scored

    passes = CapturedPasses(mean_loss, 2.0, weights)
    scored = torch.tensor(4.0, device="cuda")
    for round_ in range(2):
        for kept in ([0], [0, 1]):
            used[:] = kept
            for weight in weights:
                weight.grad = None
            for part in range(2):
                rows = Rows(*(torch.full((1, 3), 1 + part + round_, device="cuda") for _ in "itd"))
                passes.forward(rows, scored, variant=tuple(used))
                passes.backward()
            expected = torch.full((3,), (3 + 2 * round_) * 2.0 / 4.0, device="cuda")
            assert torch.equal(weights[0].grad, expected)
            if len(used) == 1:
                assert weights[1].grad is None
            else:
                assert torch.equal(weights[1].grad, expected)


def test_captured_passes_go_on_from_a_checkpoint(make_config):
    change = {"train.cuda_graphs": True, "train.log_every": 1, "train.save_every": 5}
    whole = train(make_config(change, out="whole")).metrics
    config, calls = make_config(change, out="cut"), iter(range(20))
    with pytest.raises(KeyboardInterrupt):
        train(config, should_stop=lambda: next(calls) == 6)
    parts = train(config).metrics
    losses = [[r["loss"] for r in records if r["kind"] == "train"] for records in (whole, parts)]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_records_have_what_a_gpu_has(make_config):
    config = make_config({"metrics.layers_every": 4, "metrics.peak_tflops": 100.0})
    records = train(config).metrics
    for record in (r for r in records if r["kind"] == "train"):
        assert 0 < record["mfu"] < 1
        assert record["memory_bytes"] <= record["memory_peak_bytes"]
        assert record["memory_bytes"] <= record["memory_reserved_bytes"]
        shares = [record[f"{name}_share"] for name in PHASES]
        assert all(share > 0 for share in shares) and sum(shares[1:]) <= 1.01
    layers = [r for r in records if r["kind"] == "layers"]
    assert [r["step"] for r in layers] == [4, 8, 12]
    assert all(0 < share < 1 for share in layers[0]["past_share"].values())


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_are_the_same_compiled_and_on_a_cpu(make_config, compiled):
    change = {"metrics.layers_every": 1, "train.steps": 1, "train.dtype": "float32"}
    on = {"train.compile": compiled, "train.device": "cuda"}
    found = train(make_config(change | on, out="gpu")).metrics
    wanted = train(make_config(change | {"train.device": "cpu"}, out="cpu")).metrics
    (gpu,), (cpu,) = ([r for r in x if r["kind"] == "layers"] for x in (found, wanted))
    for name in ("activation_rms", "grad_norm", "attention_entropy", "past_share"):
        assert gpu[name] == pytest.approx(cpu[name], rel=0.02), name


def test_a_step_that_is_not_finite_is_left_out(make_config, monkeypatch):
    plain = Run._loss_sum

    def loss_sum(self: Run, batch: Any) -> torch.Tensor:
        bad = self.model.training and self.step == 5
        return plain(self, batch) * (math.nan if bad else 1.0)

    monkeypatch.setattr(Run, "_loss_sum", loss_sum)
    records = [r for r in train(make_config()).metrics if r["kind"] == "train"]
    assert [r["skipped"] for r in records] == [0, 1, 1]
    assert all(math.isfinite(r["loss"]) for r in records)


def test_phases_are_measured_on_the_device():
    phases, device = Phases(torch.device("cuda")), torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    x @ x
    torch.cuda.synchronize()
    with phases("forward"):
        for _ in range(20):
            x @ x
    with phases("backward"):
        x @ x
    torch.cuda.synchronize()
    found = phases.take()
    assert found["forward"] > 5 * found["backward"] > 0


def test_a_profile_has_kernels_and_a_snapshot_of_the_memory(make_config):
    result = train(make_config({"profile": {"wait": 2, "steps": 2}}))
    folder = result.run_dir / "profile"
    events = json.loads((folder / "trace-step-00000003.json").read_text())["traceEvents"]
    assert {"forward", "backward", "optimizer"} <= {e.get("name") for e in events}
    assert any(e.get("cat") == "kernel" for e in events)
    snapshot = pickle.loads((folder / "memory-step-00000003.pickle").read_bytes())
    assert snapshot["segments"] and any(snapshot["device_traces"])
