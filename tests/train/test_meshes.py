"""Rows as training draws them, packed and mixed, in every mesh; meshes of three and four ways."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from meshes import CPU, alone, assert_equal, assert_same_records, gradients_of, run_on
from ranks import on_ranks, train_until
from torch import Tensor

from attamba.config import RunConfig
from attamba.data import UNSCORED
from attamba.train.distributed import Ranks
from attamba.train.sinks import Record

ATTAMBA = {"type": "attamba", "n_heads": 4, "chunk_size": 4, "leading_tokens": 5}
ATTAMBA |= {"state_dim": 8, "ssm_heads": 2}
MIXERS = [
    {**ATTAMBA, "ssm_scope": "sequence", "boundary": "jitter"},
    {"type": "transformer", "n_heads": 4, "n_kv_heads": 2},
    ATTAMBA,
]
SMALL = {"model.mixer": MIXERS, "model.n_layers": 3, "optim.grad_clip": 0.5}
SMALL |= {"data.seq_len": 40, "data.batch_size": 8}

DATA: dict[str, dict[str, Any]] = {
    "stream": {},
    "best fit": {"data.packing": "best_fit"},
    "best fit, rows whole": {"data.packing": "best_fit", "data.doc_mask": False},
    "sources": {"data.sources": True},
    "sources, best fit": {"data.sources": True, "data.packing": "best_fit"},
    "generated": {"data.generate": {"type": "recall", "pairs": 6, "n_keys": 9}, "data.train": ""},
}
MESHES = {
    "replicate, shard": {"replicate": 2, "shard": 2},
    "context": {"context": 4},
    "tensor, context": {"tensor": 2, "context": 2},
    "tensor, shard": {"tensor": 2, "shard": 2},
}
THREE_WAYS = {
    "shard, context, tensor": {"shard": 2, "context": 2, "tensor": 2},
    "replicate, context, tensor": {"replicate": 2, "context": 2, "tensor": 2, "shard": 1},
    "replicate, shard, tensor": {"replicate": 2, "shard": 2, "tensor": 2},
    "replicate, shard, context": {"replicate": 2, "shard": 2, "context": 2},
}


@pytest.fixture
def make_meshed(make_config, documents):
    """make_meshed(data, mesh, more): a run on `documents`, by a name of DATA."""

    def make(data: str, mesh: dict[str, int], more: dict[str, Any] | None = None) -> RunConfig:
        change = {"data.train": documents[0], **SMALL, **DATA[data]}
        if change.get("data.sources"):
            weighted = [{"path": path, "weight": w} for path, w in zip(documents, (3, 2))]
            change |= {"data.train": "", "data.sources": weighted}
        change |= {f"parallel.{name}": size for name, size in mesh.items()} | (more or {})
        return make_config(change, out=change.pop("out", "run"))

    return make


def gradients(config: RunConfig, ranks: Ranks) -> dict[str, Tensor]:
    """Loss, norm and every clipped gradient of the rows of the fourth step."""
    run = run_on(config, ranks)
    return gradients_of(run, run.sources.train.batch(3))


def test_the_rows_are_what_they_are_called(make_meshed):
    """Several documents in a row; both sources; filling that does not count; masks that matter."""
    batches, losses = {}, {}
    for name in DATA:
        config = make_meshed(name, {"shard": 1}, {"model.n_layers": 1, "model.mixer": ATTAMBA})
        run = run_on(config, Ranks(CPU))
        batches[name] = run.sources.train.batch(3)
        losses[name] = float(run.gradients(run.send(batches[name])))
    for name, batch in batches.items():
        assert (batch.doc_ids.max() > 1) == (name != "generated"), name
        assert (batch.targets == UNSCORED).any() == ("fit" in name or name == "generated"), name
        both = (batch.inputs == ord("a")).any() and (batch.inputs == ord("z")).any()
        assert both == ("sources" in name), name
    assert np.array_equal(batches["best fit"].inputs, batches["best fit, rows whole"].inputs)
    assert losses["best fit"] != losses["best fit, rows whole"]


def test_every_kind_of_rows_in_every_mesh(make_meshed):
    configs = {
        f"{data}: {mesh}": make_meshed(data, sizes)
        for data in DATA
        for mesh, sizes in MESHES.items()
    }
    assert_equal(4, configs, gradients)


def test_meshes_of_three_dimensions(make_meshed):
    configs = {mesh: make_meshed("sources, best fit", sizes) for mesh, sizes in THREE_WAYS.items()}
    assert_equal(8, configs, gradients)


def test_a_mesh_of_all_four_dimensions(make_meshed):
    sizes = {"replicate": 2, "shard": 2, "context": 2, "tensor": 2}
    assert_equal(16, {"all": make_meshed("sources, best fit", sizes)}, gradients)


def test_a_run_on_packed_sources_goes_on_in_other_meshes(make_meshed):
    """Losses, norms and validation, by checkpoints of shard x context x tensor and others."""
    change = {"train.eval_every": 4, "train.eval_rows": 5, "train.steps": 8, "train.save_every": 0}
    change |= {"train.chunk_sizes": [2, 4], "train.accumulate": 2}

    def on(mesh: dict[str, int], out: str = "run") -> RunConfig:
        return make_meshed("sources, best fit", mesh, change | {"out": out})

    straight = train_until(alone(on({}, "straight")))
    on_ranks(8, train_until, on(THREE_WAYS["shard, context, tensor"]), 3)
    on_ranks(4, train_until, on(MESHES["context"]), 2)
    records, *_ = on_ranks(2, train_until, on({"tensor": 2}))
    assert [r["step"] for r in records if r["kind"] == "valid"] == [4, 8]
    assert_same_records(records, straight)


def test_compiled_layers_of_ranks_that_share_rows(make_meshed):
    """Compiled once for training, and once for validation's rows, however many chunks end.

    No machine code is made of the graphs; tests/gpu/test_ranks_gpu.py does that.
    """
    change: dict[str, Any] = {"model.n_layers": 1, "model.mixer": MIXERS[0]}
    change |= {"train.steps": 4, "train.eval_rows": 3, "train.save_every": 0}
    config = make_meshed("sources, best fit", {"context": 2}, change | {"out": "plain"})
    compiled = make_meshed(
        "sources, best fit", {"context": 2}, change | {"train.compile": True, "out": "compiled"}
    )
    plain, _ = on_ranks(2, train_until, config)
    (records, graphs), _ = on_ranks(2, train_and_count_graphs, compiled, timeout=400)
    assert_same_records(records, plain)
    first, last = graphs[0], graphs[-1]
    assert graphs[:3] == [first] * 3 and first < last <= 2 * first


def train_and_count_graphs(config: RunConfig) -> tuple[list[Record], list[int]]:
    """The records, and how many graphs there were after each step, and in the end."""
    stats = torch._dynamo.utils.counters["stats"]
    graphs: list[int] = []
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        records = train_until(config, at_step=lambda: graphs.append(stats["unique_graphs"]))
    return records, [*graphs, stats["unique_graphs"]]
