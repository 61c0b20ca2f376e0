"""attamba plan: what ranks that share rows or layers receive, against a run's collectives."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from planning import ATTAMBA, MIXERS, NARROW, run_config

from attamba.config import RunConfig
from attamba.models import build_model
from attamba.models.splits import splits
from attamba.plan import traffic
from attamba.plan.layout import make_layout

COUNT = """
import json, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
import attamba
from attamba.config import RunConfig, from_dict
from attamba.train.distributed import DIMENSIONS
from attamba.train.parallelize import parallelize, tensor_ranks
from attamba.train.tensor import cross_entropy_sum

rank = 2

def run(tree):
    config = from_dict(RunConfig, tree)
    p, n = config.parallel, config.parallel.context * config.parallel.tensor
    mesh = init_device_mesh("cpu", (1, 1, p.context, p.tensor), mesh_dim_names=DIMENSIONS)
    model = attamba.build_model(config.model)
    forward = parallelize(model, mesh, config)
    sent = {"context": 0, "sums": 0, "rows": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = str(func)
            if not name.startswith("_c10d_functional") or "wait" in name or "wrap" in name:
                return out
            kind = "context" if p.context > 1 else "sums"
            if "all_to_all" in name:
                own = args[1][rank] * out[:1].nbytes
                sent["rows" if p.tensor > 1 else "context"] += out.nbytes - own
            elif "all_gather" in name:
                sent[kind] += out.nbytes - args[0].nbytes
            elif "reduce_scatter" in name:
                sent[kind] += args[0].nbytes - out.nbytes
            elif "all_reduce" in name:
                sent["sums"] += 2 * (n - 1) / n * out.nbytes
            else:
                raise NotImplementedError(name)
            return out

    with Count():
        mixed = config.train.dtype == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
            y = forward(torch.zeros(1, 64, dtype=torch.long))
        y = y.float().flatten(0, 1)
        if p.tensor > 1:
            targets = torch.zeros(len(y), dtype=torch.long)
            cross_entropy_sum(y, targets, -100, tensor_ranks(mesh)).backward()
        else:
            y.logsumexp(-1).sum().backward()
    return sent

dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
print(json.dumps([run(tree) for tree in json.loads(sys.argv[1])]))
dist.destroy_process_group()
"""
"""Rank 2 of 4 in a process group that only pretends."""

FOUR = {**ATTAMBA, "ssm_heads": 4}
SHARED_MIXERS: dict[str, Any] = {
    **MIXERS,
    "sequence": {**FOUR, "ssm_scope": "sequence"},
    "long chunks": {**FOUR, "chunk_size": 12, "leading_tokens": 16},
    "hybrid": [NARROW, MIXERS["transformer"], MIXERS["mamba2"]],
}
DIVISIBLE = {
    "chunk": FOUR,
    "gated": MIXERS["gated"],
    "transformer": {"type": "transformer", "n_heads": 4},
    "mamba2": MIXERS["mamba2"],
    "hawk": {"type": "hawk", "hidden_dim": 64, "n_blocks": 4},
}


def runs(mixers: dict[str, Any], **mesh: int) -> dict[str, RunConfig]:
    """Each mixer in bfloat16, and as layers that are computed anew in float32."""
    configs = {}
    for name, mixer in mixers.items():
        vocab = {"vocab_size": 52}
        mixed = {"train": {"dtype": "bfloat16"}, "model": vocab, "parallel": mesh}
        configs[name] = run_config(mixer, **mixed)
        anew = {"parallel": {**mesh, "activation_checkpointing": "full"}, "model": vocab}
        configs[f"{name}, anew"] = run_config(mixer, **anew)
    return configs


ROWS, LAYERS = runs(SHARED_MIXERS, context=4), runs(DIVISIBLE, tensor=4)


@pytest.fixture(scope="module")
def sent() -> list[dict[str, float]]:
    """Of ROWS and of LAYERS, by one process."""
    configs = [*ROWS.values(), *LAYERS.values()]
    trees = json.dumps([dataclasses.asdict(config) for config in configs])
    done = subprocess.run([sys.executable, "-c", COUNT, trees], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_ranks_that_share_rows_send_what_is_planned(sent):
    for (name, config), found in zip(ROWS.items(), sent[: len(ROWS)]):
        layout = make_layout(config)
        planned = traffic.context_keys(config, layout) + traffic.context_states(config, layout)
        assert planned == found["context"] > 0, name
        assert found["sums"] == found["rows"] == 0


def of_small_parameters(config: RunConfig) -> float:
    """Gradients of what every tensor rank holds whole and uses a part of, summed: not planned."""
    with torch.device("meta"):
        model = build_model(config.model)
    uses = splits(model)
    whole = [
        p.numel()
        for name, p in model.named_parameters()
        if uses[name].small or (uses[name].dim is None and ".mixer." in name)
    ]
    return 2 * 3 / 4 * 4 * sum(whole)


def test_ranks_that_share_layers_send_what_is_planned(sent):
    for (name, config), found in zip(LAYERS.items(), sent[len(ROWS) :]):
        layout = make_layout(config)
        sums = traffic.tensor_sums(config, layout) + of_small_parameters(config)
        assert sums == pytest.approx(found["sums"], rel=1e-9), name
        assert found["context"] == 0
        received = traffic.tensor_rows(config, layout)  # of the rank that receives most
        assert 0.5 * received <= found["rows"] <= received > 0, name
