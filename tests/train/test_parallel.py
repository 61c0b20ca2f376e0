"""The same run on one rank and on several: losses, gradients, validation, files, errors."""

from __future__ import annotations

import dataclasses
import fcntl
import re
import shutil

import numpy as np
import pytest
import torch
from meshes import CPU, assert_equal, assert_same_records, gradients_of, run_on
from ranks import on_ranks, train_until
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attamba.config import ConfigError, RunConfig
from attamba.data import UNSCORED, Batch
from attamba.train import TrainingDiverged, losses, train
from attamba.train.distributed import Ranks, device_of_rank, mesh_sizes, open_ranks
from attamba.train.optim import local
from attamba.train.run import Run

JITTER = {"type": "attamba", "n_heads": 2, "chunk_size": 4, "leading_tokens": 6}
JITTER |= {"boundary": "jitter", "state_dim": 8, "ssm_heads": 2}
MAMBA = {"type": "mamba2", "ssm_dim": 32, "head_dim": 16, "state_dim": 8}
HYBRID = [JITTER, {"type": "transformer", "n_heads": 2, "window": 16}]

REPLICATE = {"parallel.replicate": 4}
SHARD = {"parallel.shard": 4}
BOTH = {"parallel.replicate": 2, "parallel.shard": 2}

CASES = {
    "replicate": REPLICATE,
    "shard": SHARD,
    "both": BOTH,
    "both, accumulated": BOTH | {"train.accumulate": 2},
    "hybrid": BOTH | {"model.mixer": HYBRID, "model.n_layers": 3},
    "strided": SHARD | {"model.mixer.ssm_scope": "strided"},
    "boundaries by scores": BOTH | {"model.mixer.boundary": "first_ssm", "model.n_layers": 2},
    "tied": SHARD | {"model.tie_embeddings": True},
    "recurrent": SHARD | {"model.mixer": [{"type": "mingru"}, MAMBA], "model.n_layers": 2},
    "whole layers anew": BOTH | {"parallel.activation_checkpointing": "full"},
    "all but products anew": SHARD | {"parallel.activation_checkpointing": "selective"},
    "mixed precision": SHARD | {"train.dtype": "bfloat16"},
    "gathered in bfloat16": BOTH | {"train.dtype": "bfloat16", "parallel.gather_dtype": "bfloat16"},
}
LOOSE = {"mixed precision": 2e-2, "gathered in bfloat16": 0.15}


class Unequal:
    """Rows of which some tokens do not count, in each row another number of them."""

    def __init__(self, rows) -> None:
        self.all, self.n_windows = rows, rows.n_windows

    def batch(self, step: int) -> Batch:
        batch = self.all.batch(step)
        hidden = np.cumsum(batch.inputs, 1) % 7 < batch.inputs[:, :1] % 7
        return dataclasses.replace(batch, targets=np.where(hidden, UNSCORED, batch.targets))


def unequal(config: RunConfig, ranks: Ranks) -> Run:
    run = run_on(config, ranks)
    run.sources = dataclasses.replace(run.sources, train=Unequal(run.sources.train))
    return run


def gradients(config: RunConfig, ranks: Ranks) -> dict[str, Tensor]:
    """Loss, norm and every clipped gradient of the second step's rows."""
    run = unequal(config, ranks)
    return gradients_of(run, run.sources.train.batch(1))


@pytest.fixture
def make_parallel(make_config):
    """make_config for rows enough for four ranks, twice."""

    def make(overrides=None, out="run"):
        small = {"data.batch_size": 8, "data.seq_len": 40, "optim.grad_clip": 0.5}
        return make_config({**small, **(overrides or {})}, out=out)

    return make


def test_gradients_are_those_of_one_rank(make_parallel):
    """In every mesh, with rows that count unequally: loss, norm, and the clipped gradients."""
    configs = {name: make_parallel(change) for name, change in CASES.items()}
    assert_equal(4, configs, gradients, loose=LOOSE)


def test_activations_can_be_computed_anew_on_one_device(make_parallel):
    alone = Ranks(CPU)
    expected = gradients(make_parallel(), alone)
    for kind in ("full", "selective"):
        found = gradients(make_parallel({"parallel.activation_checkpointing": kind}), alone)
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (kind, key)


def saved_bytes(config: RunConfig) -> int:
    """What the forward pass keeps for the backward pass, beside parameters."""
    run = unequal(config, Ranks(CPU))
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run._loss_sum(losses.on_device(run.sources.train.batch(0), CPU))
    loss.backward()
    return sum(held.values())


def test_activations_computed_anew_are_not_kept(make_parallel):
    kinds = ("none", "full")
    deep = {"model.n_layers": 4}
    kept = [
        saved_bytes(make_parallel(deep | {"parallel.activation_checkpointing": kind}))
        for kind in kinds
    ]
    assert kept[1] < kept[0] / 2


class Products(TorchDispatchMode):
    """Counts matrix products."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


def test_selective_does_not_multiply_again(make_parallel):
    counts = []
    for kind in ("none", "selective", "full"):
        config = make_parallel({"parallel.activation_checkpointing": kind})
        run = unequal(config, Ranks(CPU))
        loss = run._loss_sum(losses.on_device(run.sources.train.batch(0), CPU))
        with Products() as products:
            loss.backward()
        counts.append(products.n)
    none, selective, full = counts
    assert none == selective < full


def test_a_run_is_that_of_one_rank(make_parallel):
    """Losses, norms, rates, tokens and validation, of rows that do not divide among the ranks."""
    change = {"train.eval_rows": 3, "train.steps": 6, "model.mixer.boundary": "random"}
    records = on_ranks(2, train_until, make_parallel(change, out="several"))
    assert records[1] == []
    assert_same_records(records[0], train_until(make_parallel(change, out="alone")), 1e-4)


def test_many_chunk_sizes_are_drawn_alike(make_parallel):
    change = {"train.chunk_sizes": [2, 4, 8], "train.steps": 4}
    records = on_ranks(
        2, train_until, make_parallel(change | BOTH | {"parallel.shard": 1}, out="two")
    )
    assert_same_records(records[0], train_until(make_parallel(change, out="alone")), 1e-4)


WRONG = [
    ({"parallel.replicate": 3}, r"replicate=3, .* ask for 3 ranks, and there are 2"),
    ({"parallel.shard": 4}, r"shard=4 ask for 4 ranks, .*torchrun --nproc-per-node 4"),
    ({"data.batch_size": 3}, r"batch_size=3 cannot be divided among 2 ranks .* multiple of 2"),
    ({"train.accumulate": 8}, r"in train\.accumulate=8 parts each; make it a multiple of 16"),
    ({"eval.tasks": ["piqa"]}, r"eval\.tasks=\['piqa'\] are scored by one process"),
    ({"optim.lr": 2e-3}, r"holds a run of another configuration"),
    ({"data.train": "missing.txt"}, r"missing\.txt"),
    ({"data.train": "truncated"}, r"tokens-00000-000\.bin has \d+ bytes, .* says \d+ bytes"),
    ({"out": "locked"}, r"another process is training in this folder"),
]


def errors(configs: list[RunConfig]) -> list[str]:
    train(configs[0])
    found = []
    for config in configs[1:]:
        with pytest.raises(ValueError) as caught:
            train(config)
        found.append(str(caught.value))
    return found


def test_what_cannot_be_is_said_on_every_rank(make_parallel, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "truncated")
    shard = tmp_path / "truncated" / "tokens-00000-000.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    configs = [make_parallel({"train.steps": 1}, out="run")]
    for change, _ in WRONG:
        change = {"train.steps": 1, **change}
        if change.get("data.train") == "truncated":
            change["data.train"] = str(shard.parent)
        out = change.pop("out", "run" if "optim.lr" in change else "other")
        configs.append(make_parallel(change, out=out))
    (tmp_path / "locked").mkdir()
    with open(tmp_path / "locked" / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for found in on_ranks(2, errors, configs):
            assert len(found) == len(WRONG)
            for (_, text), error in zip(WRONG, found):
                assert re.search(text, error), error


def diverge(config: RunConfig) -> str:
    """The final norm's weights become infinite on one rank alone."""
    with open_ranks(config) as ranks, pytest.raises(TrainingDiverged) as caught:
        run = unequal(config, ranks)
        run.take_step()
        if ranks.rank == 1:
            local(run.model.norm.weight.data).fill_(float("inf"))
        run.save()
    return str(caught.value)


def test_a_weight_that_is_not_finite_on_one_rank_stops_all(make_parallel):
    for text in on_ranks(2, diverge, make_parallel()):
        assert text.startswith("step 1: norm.weight is not finite")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"parallel.tensor": 0}, r"parallel\.tensor=0 must be at least 1"),
        ({"parallel.context": 0}, r"parallel\.context=0 must be at least 1"),
        ({"parallel.replicate": 0}, r"parallel\.replicate=0 must be at least 1"),
        ({"parallel.shard": 0}, r"parallel\.shard=0 must be at least 1; -1 means all ranks"),
        ({"parallel.hang_timeout": 0}, r"parallel\.hang_timeout=0\.0 must be above 0"),
        ({"parallel.gather_dtype": "bfloat16"}, r"needs train\.dtype=bfloat16, not float32"),
        ({"parallel.shards": 2}, r"unknown key 'parallel\.shards'; did you mean 'shard'"),
    ],
)
def test_what_cannot_be_asked_for(make_config, change, text):
    with pytest.raises(ConfigError, match=text):
        make_config(change).validate()


def test_a_mesh_takes_the_ranks_that_are_left(make_config):
    parallel = make_config().parallel
    assert mesh_sizes(parallel, 1) == (1, 1, 1, 1)
    assert mesh_sizes(parallel, 8) == (1, 8, 1, 1)
    assert mesh_sizes(dataclasses.replace(parallel, replicate=4), 8) == (4, 2, 1, 1)
    shared = dataclasses.replace(parallel, context=2, tensor=4)
    assert mesh_sizes(shared, 16) == (1, 2, 2, 4)
    with pytest.raises(
        ConfigError, match=r"context=2, parallel\.tensor=4 ask for 8 ranks, .* are 12"
    ):
        mesh_sizes(shared, 12)
    with pytest.raises(ConfigError, match="there is 1"):
        mesh_sizes(dataclasses.replace(parallel, replicate=4), 1)


@pytest.mark.parametrize(
    ("seen", "shown", "found"),
    [(4, None, "cuda:2"), (4, "0,1,2,3", "cuda:2"), (1, "7", "cuda:0"), (1, None, None)],
)
def test_the_gpu_of_a_rank(monkeypatch, seen, shown, found):
    """Its number's, or the only one that a launcher shows it; never one that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    if found is not None:
        assert device_of_rank("auto") == torch.device(found)
        return
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=2: torch sees 1 CUDA devices here"):
        device_of_rank("auto")
