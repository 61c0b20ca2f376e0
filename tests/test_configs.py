"""Every recipe in configs/ can be used, and the paper's models have the paper's sizes."""

from pathlib import Path

import pytest
import torch

import attamba
from attamba.config import ModelConfig, RunConfig, from_dict, load_run_config, to_dict
from attamba.models.accounting import cache_bytes, n_parameters

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))

MILLIONS = {
    "attamba-p4": 62.8,
    "attamba-p8": 62.8,
    "attamba-p16": 62.8,
    "transformer": 60.0,
    "transformer-kv-p4": 53.7,
    "transformer-kv-p8": 52.7,
    "transformer-kv-p16": 52.2,
    "transformer-flops-p4": 54.3,
    "transformer-flops-p8": 53.4,
    "transformer-flops-p16": 52.8,
    "transformer-window-p4": 60.0,
    "transformer-window-p8": 60.0,
    "transformer-window-kv-p4": 53.7,
    "transformer-window-kv-p8": 52.7,
}
"""Logged by the paper's runs."""


def _meta_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = attamba.build_model(config)
    return sum(p.numel() for p in model.parameters())


def _model(name: str) -> ModelConfig:
    return load_run_config(CONFIGS / "paper" / f"{name}.yaml").model


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_parses_and_builds(path: Path):
    config = load_run_config(path)
    assert from_dict(RunConfig, to_dict(config)) == config
    assert _meta_parameters(config.model) == n_parameters(config.model)
    assert path.read_text().startswith("# ")


def test_every_run_has_a_folder_of_its_own():
    outs = [load_run_config(path).out for path in RECIPES]
    assert outs == [f"runs/{path.stem}" for path in RECIPES]


def test_the_paper_s_models_are_all_there():
    assert {path.stem for path in RECIPES if path.parent.name == "paper"} == set(MILLIONS)


@pytest.mark.parametrize("name", MILLIONS)
def test_the_paper_s_sizes(name: str):
    assert n_parameters(_model(name)) == pytest.approx(MILLIONS[name] * 1e6, rel=0.005)


@pytest.mark.parametrize("name", MILLIONS)
def test_the_paper_s_training(name: str):
    config = load_run_config(CONFIGS / "paper" / f"{name}.yaml")
    assert config.data.batch_size * config.data.seq_len * config.train.steps == 16 * 1024 * 60_000
    optim = config.optim
    assert (optim.lr, optim.weight_decay, optim.warmup_steps) == (3e-3, 0.033, 5000)
    assert (optim.min_lr_ratio, optim.grad_clip, config.train.dtype) == (1e-6, 1.0, "bfloat16")


@pytest.mark.parametrize("chunk_size", [4, 8, 16])
def test_the_narrow_transformers_cache_as_little(chunk_size: int):
    full = cache_bytes(_model("transformer"), 1024)
    assert cache_bytes(_model(f"transformer-kv-p{chunk_size}"), 1024) * chunk_size == full


@pytest.mark.parametrize(("chunk_size", "window"), [(4, 260), (8, 136)])
def test_the_windows_hold_as_many_entries(chunk_size: int, window: int):
    # All chunks of 1024 tokens and L = P leading ones.
    assert window == 1024 // chunk_size + {4: 4, 8: 8}[chunk_size]
    mixer = _model(f"transformer-window-p{chunk_size}").layer_mixers()[0]
    assert getattr(mixer, "window", None) == window


def test_the_small_model_is_small():
    assert 9e6 < n_parameters(load_run_config(CONFIGS / "small-10m.yaml").model) < 11e6
