"""Training on two GPUs, whose ranks talk by NCCL, against one: meshes, compiling, checkpoints.

All configurations of two ranks are trained in one start of them; each test looks at one.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import yaml
from ranks import NCCL, on_ranks, train_until
from waiting import assert_steps_do_not_wait

import attamba
from attamba.config import RunConfig, apply_overrides, from_dict, to_dict
from attamba.data import load_tokenizer, prepare
from attamba.train import list_checkpoints, read_metrics
from attamba.train.float8 import CAPABILITY
from attamba.train.sinks import Record

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

TREE: dict[str, Any] = {
    "model": {"dim": 128},
    "data": {"seq_len": 256, "batch_size": 4, "valid_fraction": 0.1},
    "optim": {"lr": 1e-3, "warmup_steps": 4},
    "train": {"steps": 4, "device": "cuda", "log_every": 1, "eval_rows": 3, "save_every": 0},
}
ATTAMBA = {"type": "attamba", "n_heads": 4, "chunk_size": 8, "leading_tokens": 24}
ATTAMBA |= {"state_dim": 16, "ssm_heads": 4}
MIXERS: dict[str, Any] = {
    "chunk": ATTAMBA,
    "heads": {**ATTAMBA, "ssm_scope": "sequence", "boundary": "head_cyclic"},
    "transformer": {"type": "transformer", "n_heads": 4},
    "hybrid": [
        ATTAMBA,
        {"type": "mamba2", "ssm_dim": 128, "head_dim": 32, "state_dim": 16},
        {"type": "hawk", "n_blocks": 4},
    ],
}
MESHES = ("replicate", "shard", "tensor", "context")


class Kind(NamedTuple):
    """A way to train, and how far two ranks may be from one, relative to it."""

    change: dict[str, Any]
    loss: float
    norm: float
    reference: str
    """The kind that one GPU trains by, which keeps all activations and does not compile."""


ROUNDED = {"train.dtype": "bfloat16"}
ANEW, COMPILED = {"parallel.activation_checkpointing": "full"}, {"train.compile": True}
KINDS = {
    # Sums in another order, which AdamW enlarges from step to step. By PyTorch: the kernels'
    # exact products take minutes to compile, and are other tests' subject.
    "float32": Kind({}, 2e-5, 2e-4, "float32"),
    "anew": Kind(ANEW, 2e-5, 2e-4, "float32"),
    # By the kernels: 8 bits of mantissa, and each sum that is divided among ranks is rounded once
    # more.
    "bfloat16": Kind(ROUNDED, 3e-3, 2e-2, "bfloat16"),
    "compiled": Kind({**ROUNDED, **COMPILED}, 3e-3, 2e-2, "bfloat16"),
    "compiled, anew": Kind({**ROUNDED, **COMPILED, **ANEW}, 3e-3, 2e-2, "bfloat16"),
    # 4 bits; and each rank scales its own part of the tokens.
    "float8": Kind({**ROUNDED, "train.float8": "rowwise"}, 2e-2, 0.1, "float8"),
}


class Case(NamedTuple):
    """What two ranks train."""

    mixer: str
    mesh: str
    kind: str

    def __str__(self) -> str:
        return ", ".join(self)


CASES = [
    *(Case(mixer, mesh, "float32") for mixer in MIXERS for mesh in MESHES),
    *(Case(mixer, mesh, "bfloat16") for mixer in ("heads", "hybrid") for mesh in MESHES),
    *(Case("heads", mesh, "anew") for mesh in MESHES[1:]),
    Case("heads", "shard", "float8"),
    *(Case("heads", mesh, "compiled") for mesh in MESHES[1:]),
    Case("heads", "shard", "compiled, anew"),
]
TO_TWO, TO_ONE, NO_WAITING = "one rank, then two", "two ranks, then one", "does not wait"
CUT = 2
"""Steps before the checkpoint from which another number of ranks goes on."""

Make = Callable[..., RunConfig]
Outcomes = dict[str, list[dict[str, Any]]]
"""By the run's name, of each rank: its records and graphs, or the error."""


def _by(backend: str, mixer: Any) -> Any:
    """The mixer, or each of a list, with this backend."""
    if isinstance(mixer, list):
        return [_by(backend, one) for one in mixer]
    return {**mixer, "backend": backend}


def has_float8() -> bool:
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.get_device_capability() >= CAPABILITY


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(mixer, overrides, out="name"): a tiny run on rows that hold several documents."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "texts").mkdir()
    draw, words = random.Random(0), ["the", "cat", "dog", "sees", "and", "then"]
    for i in range(100):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(5, 120)))
        (folder / "texts" / f"{i}.txt").write_text(text)
    prepare(folder / "texts", folder / "tokens", load_tokenizer("bytes"))

    def made(mixer: str, overrides: dict[str, Any], out: str) -> RunConfig:
        exact = overrides.get("train.dtype", "float32") == "float32"
        layers = _by("torch" if exact else "auto", MIXERS[mixer])
        change: dict[str, Any] = {"data.train": str(folder / "tokens")}
        change |= {"out": str(folder / "runs" / out)}
        change |= {"model.mixer": layers, "train.progress": False}
        change["model.n_layers"] = len(layers) if isinstance(layers, list) else 2
        return from_dict(RunConfig, apply_overrides(TREE, change | overrides))

    return made


def on_two(make: Make, case: Case, out: str | None = None) -> RunConfig:
    mesh = {f"parallel.{case.mesh}": 2}
    return make(case.mixer, {**KINDS[case.kind].change, **mesh}, out or str(case))


def of_each_rank(runs: dict[str, tuple[RunConfig, int | None]], folder: Path) -> None:
    """Train each, up to a step or to the end; what comes of it is in files, whatever follows."""
    rank = dist.get_rank()
    for name, (config, step) in runs.items():
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        try:
            found: dict[str, Any] = {"records": _records(name, config, step)}
            found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        except Exception:
            found = {"error": traceback.format_exc()}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))


def _records(name: str, config: RunConfig, step: int | None) -> list[Record]:
    if name == NO_WAITING:
        assert_steps_do_not_wait(config)
        return []
    records = train_until(config, step)
    assert dist.get_backend_config() == NCCL
    assert torch.cuda.current_device() == dist.get_rank()
    return records


@pytest.fixture(scope="module")
def command(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The command by torchrun, begun, and the folder of its run."""
    change = {**ROUNDED, "parallel.shard": 2, "metrics.peak_tflops": 100.0}
    config = make("chunk", change, "command")
    path = tmp_path_factory.mktemp("command") / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*torchrun, "--nproc-per-node", "2", "-m", "attamba.cli", "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    yield process, Path(config.out)
    process.terminate()  # torchrun ends its ranks, if there still are any
    process.wait(60)


@pytest.fixture(scope="module")
def trained(
    make: Make,
    command: Any,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, list[Record]], Outcomes]:
    """The records of one GPU, by mixer and kind, and the outcomes of two, of selected cases."""
    chosen = {
        item.callspec.params.get("case")
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    }
    to_two = on_two(make, Case("hybrid", "shard", "float32"), TO_TWO)
    assert train_until(make("hybrid", {}, TO_TWO), CUT) == []
    cases = [case for case in CASES if case in chosen and (case.kind != "float8" or has_float8())]
    runs: dict[str, tuple[RunConfig, int | None]] = {
        TO_TWO: (to_two, None),
        TO_ONE: (on_two(make, Case("hybrid", "shard", "float32"), TO_ONE), CUT),
        **{str(case): (on_two(make, case), None) for case in cases},
        NO_WAITING: (make("heads", {**ROUNDED, "parallel.shard": 2}, NO_WAITING), None),
    }
    folder = tmp_path_factory.mktemp("outcomes")
    with ThreadPoolExecutor(1) as pool:
        two = pool.submit(on_ranks, 2, of_each_rank, runs, folder, timeout=300, backend=NCCL)
        alone = {
            name: train_until(make(mixer, KINDS[kind].change, name))
            for mixer, kind in dict.fromkeys(
                [("hybrid", "float32"), *((c.mixer, KINDS[c.kind].reference) for c in cases)]
            )
            for name in [f"{mixer}, {kind}"]
        }
        failed = two.exception()
    return alone, {name: [_outcome(folder, name, r, failed) for r in (0, 1)] for name in runs}


def _outcome(folder: Path, name: str, rank: int, failed: BaseException | None) -> dict[str, Any]:
    path = folder / f"{name}.{rank}.json"
    if not path.exists():
        return {"error": f"rank {rank} did not come to the end of it: {failed!r}"}
    outcome: dict[str, Any] = json.loads(path.read_text())
    return outcome


def records_of(outcomes: Outcomes, name: str) -> list[Record]:
    """Of rank 0. Fails with the error of the rank that has one."""
    for outcome in outcomes[name]:
        assert "error" not in outcome, outcome["error"]
    assert outcomes[name][1]["records"] == []
    records: list[Record] = outcomes[name][0]["records"]
    return records


def assert_same(found: list[Record], expected: list[Record], kind: Kind) -> None:
    limits = {"loss": kind.loss, "valid_loss": kind.loss, "grad_norm": kind.norm, "lr": 1e-12}
    assert [r["kind"] for r in found] == ["train"] * TREE["train"]["steps"] + ["valid"]
    assert len(found) == len(expected)
    for left, right in zip(found, expected):
        assert left.keys() == right.keys()
        assert (left["step"], left["tokens"]) == (right["step"], right["tokens"])
        for key in left.keys() & limits.keys():
            assert left[key] == pytest.approx(right[key], rel=limits[key]), (key, left, right)
    assert expected[3]["loss"] < expected[0]["loss"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_train_as_one(trained, case):
    if case.kind == "float8" and not has_float8():
        pytest.skip("needs torchao, and devices with float8 products")
    alone, outcomes = trained
    kind = KINDS[case.kind]
    found = records_of(outcomes, str(case))
    assert_same(found, alone[f"{case.mixer}, {kind.reference}"], kind)
    for outcome in outcomes[str(case)]:
        assert (outcome["graphs"] > 0) == ("train.compile" in kind.change)


def test_two_ranks_go_on_from_the_checkpoint_of_one(trained):
    alone, outcomes = trained
    found = records_of(outcomes, TO_TWO)
    assert_same(found, alone["hybrid, float32"], KINDS["float32"])


def test_one_goes_on_from_the_checkpoint_of_two_ranks(trained, make):
    alone, outcomes = trained
    assert records_of(outcomes, TO_ONE) == []
    config = make("hybrid", {}, TO_ONE)
    (checkpoint,) = list_checkpoints(config.out)
    assert checkpoint.name == f"step-{CUT:08d}"
    assert len(list((checkpoint / "shards").iterdir())) == 2
    assert_same(train_until(config), alone["hybrid, float32"], KINDS["float32"])


def test_ranks_do_not_wait_for_their_devices(trained):
    assert records_of(trained[1], NO_WAITING) == []


def test_the_command_by_torchrun(command):
    process, folder = command
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    *steps, valid = read_metrics(folder / "metrics.jsonl")
    assert [record["step"] for record in steps] == [1, 2, 3, 4] and valid["kind"] == "valid"
    assert math.isfinite(valid["valid_loss"])
    for record in steps:
        assert math.isfinite(record["loss"]) and record["skipped"] == 0
        assert record["tokens_per_second"] > record["tokens_per_second_per_device"] > 0
        assert 0 < record["mfu"] < 1
    (checkpoint,) = list_checkpoints(folder)
    assert len(list((checkpoint / "shards").iterdir())) == 2
    model, tokenizer = attamba.load(folder, device="cuda")
    ids = torch.tensor([tokenizer.encode("the cat sees")], device="cuda")
    assert model(ids).isfinite().all()
