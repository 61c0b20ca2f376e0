"""attamba plan: activations, states and traffic by formula against models that run."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from planning import DIM, MIXERS, NARROW, ROWS, TRANSFORMER, run_config
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import attamba
from attamba.config import RunConfig
from attamba.models.accounting import n_parameters
from attamba.ops.chunking import make_span
from attamba.ops.cross_entropy import cross_entropy
from attamba.plan import memory, traffic
from attamba.plan.activations import layer_keeps
from attamba.plan.layout import make_layout
from attamba.train.optim import build_optimizer

# --------------------------------------------------------------------------------------------
# Activations
# --------------------------------------------------------------------------------------------


def saved_bytes(mixer: dict[str, Any], seq: int, dtype: torch.dtype) -> int:
    """What a layer saves for its backward pass, of tensors that have no data, without the weights.

    Operators are the Triton ones, of which no kernel is run.
    """
    mixer = {**mixer, "backend": "triton"}
    config = attamba.ModelConfig(vocab_size=13, dim=DIM, n_layers=1, mixer=mixer)
    layer = attamba.build_model(config).layers[0]
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros(ROWS, seq, DIM, requires_grad=True)
        span = make_span(seq, x.device, doc_ids=torch.zeros(ROWS, seq, dtype=torch.int32))
        mixed = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with mixed, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x, span, None, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def of_a_cpu(config: attamba.ModelConfig, c: int = 4) -> int:
    """Bytes per token that only a CPU keeps: results of norms that have a gain, float32; SiLU and
    product of the feed-forward part, c bytes a number."""
    mixer = config.layer_mixers()[0]
    inner = mixer.inner(config.dim) if mixer.type == "mamba2" else 0
    return 4 * (2 * config.dim + inner) + 2 * c * (config.ffn_dim or 3 * config.dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXERS)
def test_a_layer_keeps_what_it_saves(name, dtype):
    """Per token, to 1%: weights and tables of fixed size drop out of the difference."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tensors without data are on the CPU, where Triton is its interpreter")
    mixer = MIXERS[name]
    short, long = (saved_bytes(mixer, seq, dtype) for seq in (128, 256))
    measured = (long - short) / (ROWS * 128)
    config = attamba.ModelConfig(vocab_size=13, dim=DIM, n_layers=1, mixer=mixer)
    heads = getattr(config.layer_mixers()[0], "n_heads", None)
    rotary = 0 if heads is None else 4 * DIM // heads
    kept = layer_keeps(config, config.layer_mixers()[0], dtype.itemsize).everything
    of_cpu = of_a_cpu(config, dtype.itemsize)
    assert kept + rotary + of_cpu == pytest.approx(measured, rel=0.01)


def test_the_kernel_s_longest_chunk_is_the_plan_s():
    pytest.importorskip("triton")
    from attamba.ops.compress.triton import fits_a_tile
    from attamba.plan.activations import LARGEST_TILE

    assert fits_a_tile(LARGEST_TILE, torch.bfloat16)
    assert not fits_a_tile(LARGEST_TILE + 1, torch.bfloat16)


def test_the_kernels_largest_state_and_tile_are_the_plan_s():
    pytest.importorskip("triton")
    from attamba.ops.compress.scan import triton as scan
    from attamba.plan import activations

    assert (scan.TILE, scan.LARGEST_SIDE) == (activations.TILE, activations.LARGEST_SIDE)
    assert scan.passes_states(torch.bfloat16, 64, 64)
    assert not scan.passes_states(torch.bfloat16, 64, 65)
    assert not scan.passes_states(torch.bfloat16, 65, 64)


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_activations_of_a_model(kind):
    config = run_config(parallel={"activation_checkpointing": kind}, data={"batch_size": 2})
    held = memory.activations(config, make_layout(config))
    layers = [layer_keeps(config.model, mixer, 4) for mixer in config.model.layer_mixers()]
    of_a_layer = {
        "none": layers[0].everything,
        "selective": 4 * DIM + layers[0].products,
        "full": 4 * DIM,
    }[kind]
    around = 4 * 16 + 4 * DIM + 4 + 4 * DIM  # rotary table, final norm, head
    assert held["activations"] == (3 * of_a_layer + around) * 2 * 64
    logits = 8 * 50
    most = logits if kind == "none" else max(logits, layers[0].everything)
    assert held["loss, or one layer anew"] == most * 2 * 64
    assert layers[0].products < layers[0].everything


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_what_checkpointing_keeps(kind):
    """A layer under `parallelize`, between its passes: what is alive, without the weights."""
    from attamba.train.parallelize import parallelize

    config = run_config(TRANSFORMER, parallel={"activation_checkpointing": kind})
    model = attamba.build_model(config.model)
    parallelize(model, None, config)
    x = torch.zeros(1, 64, DIM, requires_grad=True)
    span = make_span(64, x.device)
    with Alive(model.parameters()) as alive:
        y = model.layers[0](x, span, None, None)
    assert y.shape == x.shape
    kept = layer_keeps(config.model, config.model.layer_mixers()[0], 4)
    # x is the caller's; y, the rotary table and a CPU's norms are not the plan's.
    others = (4 * DIM + 4 * 16) * 64
    if kind == "none":
        planned = (kept.everything - 4 * DIM + of_a_cpu(config.model)) * 64
    else:
        planned = (kept.products if kind == "selective" else 0) * 64
    assert alive.now == pytest.approx(planned + others, rel=0.001)


@pytest.mark.parametrize("name", ["mean", "gated", "window", "mingru", "minlstm", "hawk"])
def test_selective_checkpointing_keeps_products(name):
    """Mixers with a scan have products inside it on a CPU, and none on a GPU."""
    from attamba.train.parallelize import parallelize

    config = run_config(MIXERS[name], parallel={"activation_checkpointing": "selective"})
    model = attamba.build_model(config.model)
    parallelize(model, None, config)
    x = torch.zeros(1, 64, DIM, requires_grad=True)
    with Alive(model.parameters()) as alive:
        y = model.layers[0](x, make_span(64, x.device), None, None)
    kept = layer_keeps(config.model, config.model.layer_mixers()[0], 4)
    n_heads = MIXERS[name].get("n_heads", 0)
    rotary = 4 * DIM // 4 if n_heads else 0
    sums = 4 * n_heads  # attention's log-sum-exp, which on a CPU is not kept
    planned = (kept.products - sums + rotary) * 64 + y.nbytes
    assert alive.now == pytest.approx(planned, rel=0.01)


class _Skipped:
    """In the place of a kernel: Triton's interpreter would hold its arguments longer."""

    def __getitem__(self, grid: Any) -> _Skipped:
        return self

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


class Alive(TorchDispatchMode):
    """Bytes of storages made by operators that are still there, now and at the most.

    before: tensors that were there already.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_holds_logits_and_their_gradient(dtype):
    """At the peak, which is in the backward pass, and nothing else of weight."""
    pytest.importorskip("triton")
    hidden, head = torch.randn(64, 1), torch.randn(4000, 1, requires_grad=True)
    targets = torch.zeros(64, dtype=torch.long)
    with Alive([hidden, head]) as alive:
        logits = hidden.to(dtype) @ head.to(dtype).T
        loss = cross_entropy(logits, targets, -100, backend="triton").sum()
        del logits
        loss.backward()
    assert alive.peak == pytest.approx(2 * dtype.itemsize * 4000 * 64, rel=0.05)


@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("vocab_size", [50, 2000])
def test_the_peak_of_a_whole_pass(monkeypatch, kind, vocab_size):
    """Of a model's second pass, so that gradients are there: to 5%, weights and optimizer aside.

    Where the loss is small the peak is elsewhere: one layer's backward pass, which the plan leaves
    out, makes gradients of its activations.
    """
    from attamba.train.parallelize import parallelize

    pytest.importorskip("triton")
    for kernel in ("nats_kernel", "nats_backward_kernel"):
        monkeypatch.setattr(f"attamba.ops.cross_entropy.triton.{kernel}", _Skipped())
    config = run_config(
        TRANSFORMER,
        model={"vocab_size": vocab_size, "n_layers": 6},
        data={"seq_len": 256},
        parallel={"activation_checkpointing": kind},
    )
    model = attamba.build_model(config.model)
    forward = parallelize(model, None, config)
    ids = torch.zeros(1, 256, dtype=torch.long)

    def loss() -> Tensor:  # logits do not outlive it, as they do not in training
        return cross_entropy(forward(ids).flatten(0, 1), ids.flatten(), -100, "triton").mean()

    loss().backward()
    with Alive([t for p in model.parameters() for t in (p, p.grad)]) as alive:
        loss().backward()
    held = memory.activations(config, make_layout(config))
    layers = {"none": 6, "full": 1}[kind] if vocab_size == 50 or kind == "none" else 0
    planned = sum(held.values()) + layers * of_a_cpu(config.model) * 256
    assert alive.peak == pytest.approx(planned, rel=0.05)


# --------------------------------------------------------------------------------------------
# Weights, gradients, optimizer, and what FSDP sends
# --------------------------------------------------------------------------------------------


def test_states_of_one_process_are_those_held():
    config = run_config([NARROW, TRANSFORMER, MIXERS["hawk"]], model={"tie_embeddings": True})
    model = attamba.build_model(config.model)
    optimizer = build_optimizer(model, config.optim)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    layout = make_layout(config)
    sizes = memory.parameters(config, layout)
    held = memory.states(config, layout, sizes)
    parameters = list(model.parameters())
    assert held["weights"] == sum(p.nbytes for p in parameters) == 4 * n_parameters(config.model)
    assert held["gradients"] == sum(p.grad.nbytes for p in parameters)
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    assert held["optimizer state"] == sum(t.nbytes for t in tensors)
    assert memory.working_weights(config, layout, sizes) == 0


FSDP = """
import json, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
import attamba
from attamba.config import RunConfig, from_dict
from attamba.train.distributed import DIMENSIONS
from attamba.train.optim import build_optimizer
from attamba.train.parallelize import parallelize, reduce_on_last

def run(tree):
    config = from_dict(RunConfig, tree)
    sizes = config.parallel.replicate, config.parallel.shard
    dist.init_process_group("fake", rank=0, world_size=sizes[0] * sizes[1], store=FakeStore())
    mesh = init_device_mesh("cpu", (*sizes, 1, 1), mesh_dim_names=DIMENSIONS)
    model = attamba.build_model(config.model)
    forward = parallelize(model, mesh, config)
    optimizer = build_optimizer(model, config.optim)
    sent = {"gathered": 0, "reduced": 0, "summed": 0}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            if "allgather_base" in name:
                sent["gathered"] += args[0].nbytes - args[1].nbytes
            elif "reduce_scatter_base" in name:
                sent["reduced"] += args[1].nbytes - args[0].nbytes
            elif "allreduce_" in name:
                sent["summed"] += args[0][0].nbytes
            else:
                assert "c10d" not in name, name
            return func(*args, **(kwargs or {}))

    with Count():
        for last in (False, True):
            reduce_on_last(model, last)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                y = forward(torch.zeros(1, 16, dtype=torch.long))
            y.float().logsumexp(-1).sum().backward()
        optimizer.step()
    dist.destroy_process_group()
    moments = [t for state in optimizer.state.values() for t in state.values()]
    return sent | {
        "weights": held(list(model.parameters())),
        "gradients": held([p.grad for p in model.parameters()]),
        "optimizer state": held(moments),
    }

def held(tensors):
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    storages = [t.untyped_storage() for t in local]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

print(json.dumps([run(tree) for tree in json.loads(sys.argv[1])]))
"""
"""Rank 0 of a process group that only pretends; FSDP does the rest."""
MESHES = [(1, 4, "bfloat16", "full"), (2, 3, "float32", "none")]


def on_mesh(replicate: int, shard: int, gather_dtype: str, kind: str) -> RunConfig:
    return run_config(
        [NARROW, TRANSFORMER],
        data={"seq_len": 16, "batch_size": 2 * replicate * shard},
        train={"accumulate": 2, "dtype": "bfloat16"},
        parallel={
            "replicate": replicate,
            "shard": shard,
            "gather_dtype": gather_dtype,
            "activation_checkpointing": kind,
        },
    )


@pytest.fixture(scope="module")
def of_meshes() -> list[dict[str, float]]:
    """What a rank of each of MESHES sends and holds, by one process."""
    trees = json.dumps([dataclasses.asdict(on_mesh(*mesh)) for mesh in MESHES])
    done = subprocess.run([sys.executable, "-c", FSDP, trees], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(MESHES)))
def test_fsdp_sends_and_holds_what_is_planned(of_meshes, number):
    measured, config = of_meshes[number], on_mesh(*MESHES[number])
    replicate, shard, *_ = MESHES[number]
    layout = make_layout(config)
    assert layout.ranks == replicate * shard and layout.passes == 2
    sizes = memory.parameters(config, layout)
    sent = traffic.traffic(config, layout, sizes)
    assert sent["weights gathered"] == measured["gathered"] > 0
    assert sent["gradients reduced"] == measured["reduced"] > 0
    ring = 2 * (replicate - 1) / replicate
    assert sent["gradients between copies"] == ring * measured["summed"]
    for name, held in memory.states(config, layout, sizes).items():
        assert held == measured[name] > 0


def test_whole_weights_by_hand():
    config = run_config(
        TRANSFORMER,
        model={"n_layers": 2},
        train={"dtype": "bfloat16"},
        parallel={"shard": 2},
        data={"batch_size": 2},
    )
    matrices = 2 * DIM * DIM + 2 * DIM * 32 + 3 * DIM * 40
    layer, rest = matrices + 2 * DIM, 2 * 50 * DIM + DIM

    def whole(**parallel: Any) -> float:
        changed = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, **parallel)
        )
        layout = make_layout(changed)
        return memory.working_weights(changed, layout, memory.parameters(changed, layout))

    gathered = 2 * 4 * rest + 2 * 4 * layer + (4 + 4) * layer
    assert whole() == gathered + 2 * (2 * matrices + 50 * DIM)
    assert whole(activation_checkpointing="full") == gathered + 2 * (matrices + 50 * DIM)
    assert whole(gather_dtype="bfloat16") == 2 * 2 * rest + 2 * 2 * layer + (2 + 4) * layer
