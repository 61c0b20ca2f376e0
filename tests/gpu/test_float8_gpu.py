"""Training in float8 on a card that has it: products, losses, compiled and not, and no waiting."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from attamba.config import RunConfig, apply_overrides, from_dict
from attamba.models import build_model
from attamba.train import train
from attamba.train.float8 import CAPABILITY, use_float8
from attamba.train.loop import open_loop

pytest.importorskip("torchao.float8")
if torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
    pytest.skip("the device has no float8 products", allow_module_level=True)

RECIPES = ["tensorwise", "rowwise"]
ATTAMBA = {"type": "attamba", "n_heads": 4, "chunk_size": 4}
MIXERS: dict[str, Any] = {
    "attamba": ATTAMBA,
    "hybrid": [ATTAMBA, {"type": "transformer", "n_heads": 4}],
    "recurrent": [{"type": "mamba2"}, {"type": "mingru"}],
}
TREE: dict[str, Any] = {
    "model": {"dim": 256, "n_layers": 2, "mixer": ATTAMBA},
    "data": {"seq_len": 128, "batch_size": 8, "valid_fraction": 0.1},
    "optim": {"warmup_steps": 4},
    "train": {"steps": 24, "device": "cuda", "dtype": "bfloat16", "log_every": 1, "eval_rows": 4},
}


@pytest.fixture
def make_config(tmp_path):
    """make_config({"train.float8": "rowwise"}, out="name"): a tiny run on the GPU."""
    words = ["the", "cat", "dog", "sees", "and", "then"]
    draw = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(6000)))

    def make(overrides: dict[str, Any], out: str) -> RunConfig:
        keys = {"data.train": str(tmp_path / "text.txt"), "train.progress": False}
        tree = apply_overrides(TREE, {**keys, "out": str(tmp_path / out), **overrides})
        return from_dict(RunConfig, tree)

    return make


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [256, 63, 1])
def test_products_are_those_of_the_cpu(recipe, tokens):
    """Outputs and gradients of one map, of any number of tokens."""
    torch.manual_seed(0)
    config = from_dict(RunConfig, TREE).model
    x = torch.randn(tokens, config.dim)
    g = torch.randn(tokens, 2 * 3 * config.dim)
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = build_model(config).to(device)
        use_float8(model, recipe)
        linear = model.layers[0].get_submodule("ffn.w13")
        inputs = x.detach().to(device, torch.bfloat16).requires_grad_()
        out = linear(inputs)
        out.backward(g.to(device, out.dtype))
        found.append([t.detach().float().cpu() for t in (out, inputs.grad, linear.weight.grad)])
    for on_cpu, on_gpu in zip(*found):
        assert (on_gpu - on_cpu).norm() / on_cpu.norm() < 1e-2


@pytest.mark.parametrize("mixer", list(MIXERS))
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_follows_bfloat16(make_config, recipe, compiled, mixer):
    change = {"train.compile": compiled, "model.mixer": MIXERS[mixer]}
    losses = []
    for name in ("none", recipe):
        records = train(make_config({**change, "train.float8": name}, out=name)).metrics
        losses.append([r["loss"] for r in records if r["kind"] == "train"])
    plain, float8 = losses
    assert float8 != plain and float8[-1] < 0.8 * float8[0]
    assert float8 == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activations_can_be_computed_anew(make_config, kind):
    same = {"train.float8": "rowwise", "train.compile": True, "train.steps": 8}
    losses = []
    for anew in ("none", kind):
        change = {**same, "parallel.activation_checkpointing": anew}
        records = train(make_config(change, out=anew)).metrics
        losses.append([r["loss"] for r in records if r["kind"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_does_not_wait_for_the_device(make_config, compiled):
    change = {"train.compile": compiled, "train.float8": "tensorwise"}
    with open_loop(make_config(change, out="run")) as loop:
        for _ in range(3):
            loop.run.take_step()  # compiles, and makes the optimizer's state
        loop.run.read()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                loop.run.take_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loop.run.read()["skipped"] == 0
