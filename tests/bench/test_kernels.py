"""attamba bench kernels, tune and train on a GPU: what can be checked without one."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from attamba.bench import common, kernels, plot, report, train_gpu, tune
from attamba.config import ConfigError
from attamba.models.accounting import attention_entries, cache_bytes, n_parameters
from attamba.ops.chunk_attention.tiles import KERNELS, LONG, TABLE

SWEEP = Path(__file__).parents[2] / "benchmarks" / "results" / "tune-h200.json"


@pytest.mark.parametrize("module", [kernels, tune])
def test_needs_cuda_and_says_so(module):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    with pytest.raises(ConfigError, match=r"--device=cpu: .* needs CUDA"):
        module.run(parser.parse_args(["--device", "cpu"]))


@pytest.mark.parametrize("boundary", ["cyclic", "head_cyclic"])
def test_visible_pairs_are_those_of_accounting(boundary):
    """The rate of the kernels counts what queries see, not what tiles compute."""
    args = argparse.Namespace(dim=512, layers=8, chunk_size=8)
    config = train_gpu.model_config(boundary, args)
    shape = kernels.Shape(length=500, batch=1, heads=8, width=64)
    per_layer = 8 * kernels.visible_pairs(shape, boundary)
    # Layer 3 of 8 stands for all: their ends differ by a few positions alone.
    assert per_layer == pytest.approx(attention_entries(config, 500) / 8, rel=0.01)


def test_the_trained_models_are_the_papers():
    args = argparse.Namespace(dim=512, layers=8, chunk_size=8)
    sizes = {n: n_parameters(train_gpu.model_config(n, args)) for n in train_gpu.CONTENDERS}
    assert sizes["transformer"] == pytest.approx(60.0e6, rel=0.01)
    assert sizes["cyclic"] == sizes["head_cyclic"] == pytest.approx(62.8e6, rel=0.01)
    assert sizes["shared_heads"] == pytest.approx(62.2e6, rel=0.01)


@pytest.mark.parametrize("chunk_size", [4, 8, 16])
def test_shared_heads_hold_as_much(chunk_size):
    """At any length, windows and states aside."""
    found = {}
    for name in ("head_cyclic", "shared_heads", "transformer"):
        config = common.model_config(name, dim=512, layers=2, chunk_size=chunk_size)
        found[name] = cache_bytes(config, 1 << 17) - cache_bytes(config, 1 << 16)
    assert found["shared_heads"] == pytest.approx(found["head_cyclic"], rel=1e-3)
    assert found["transformer"] == pytest.approx(chunk_size * found["head_cyclic"], rel=1e-3)


@pytest.mark.parametrize("dim", [512, 768, 896])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 32])
def test_shared_heads_are_a_model_at_any_size(dim, chunk_size):
    config = common.model_config("shared_heads", dim=dim, layers=1, chunk_size=chunk_size)
    config.validate()


def test_best_tiles_are_the_fastest_over_all_lengths():
    rows = [
        {"kernel": "dq", "width": 64, "length": length, "ms": ms, "block_m": block_m}
        | {"block_n": 64, "window_n": 64, "warps": 4, "stages": 2}
        for length, times in ((1024, {64: 1.0, 128: 1.1}), (8192, {64: 2.0, 128: 1.0}))
        for block_m, ms in times.items()
    ]
    first, second = tune.best(rows)
    assert "Tiles(128, 64, 64, 4, 2)" in first and "Tiles(64, 64, 64, 4, 2)" in second


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", [64, 128])
def test_candidates_are_distinct(kernel, width):
    tiles = tune.candidates(kernel, width)
    assert len(tiles) == len(set(tiles)) > 4


def test_reports_of_gpu_results():
    contender = {"step_ms": 10.0, "speedup": 1.5, "peak_bytes": 2**30, "memory_ratio": 0.9}
    row = {"length": 1024, "batch_size": 64, "transformer": {**contender, "attention": "flash"}}
    row |= dict.fromkeys(train_gpu.CONTENDERS[:2], contender)
    environment = {"command": "attamba bench train", "date": "2026-01-01", "device": "a card"}
    environment |= {"threads": 1, "torch": torch.__version__}
    record = {"benchmark": "train_gpu", "settings": {}, "environment": environment, "rows": [row]}
    text = report.markdown(record)
    assert "| 64 x 1,024 | 10.0 ms | 10.0 ms | 10.0 ms | 1.50 | 1.50 | flash |" in text
    four = {**record, "rows": [row | {"shared_heads": contender}]}
    assert "| 64 x 1,024 | 1.00 GiB | 1.00 GiB | 1.00 GiB | 1.00 GiB |" in report.markdown(four)
    times = {"forward": 1.0, "both": 3.0}
    row = {"length": 1024, "heads": 8, "width": 64, "ms": {"cyclic": times, "head_cyclic": times}}
    row |= {f"{n}_speedup": times for n in ("cyclic", "head_cyclic")}
    row |= {f"{n}_matrix_share": 0.45 for n in ("cyclic", "head_cyclic")}
    scan = {"scope": "chunk", "batch": 64, "length": 1024, "ms": {"triton": times}}
    scan["failed"] = {}
    scan["copy_share"] = {"forward": 0.5, "both": 0.25}
    peer = {"operator": "mamba2", "batch": 64, "length": 1024, "ms": {"attamba": times}}
    peers = [peer | {"failed": {"fla": why}} for why in ("CUDA out of memory. Tried", "no such")]
    peers.append({**peer, "operator": "other", "failed": {}})
    record |= {"benchmark": "kernels", "compressors": [scan], "peers": peers}
    text = report.markdown({**record, "rows": [row]})
    assert "| mamba2, 64 x 1,024 | 1.000 / 3.000 ms | out of memory |" in text
    assert "| mamba2, 64 x 1,024 | 1.000 / 3.000 ms | failed |" in text
    assert "| other, 64 x 1,024 | 1.000 / 3.000 ms | - |" in text
    assert "| chunk, 64 x 1,024 | 1.000 / 3.000 ms | 50% | 25% |" in text
    assert "| 1,024 x 8 heads of 64 | 1.000 ms | 1.000 ms | 1.00 | 1.00 | 45% |" in text


def test_results_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for length in (1024, 8192):
        contenders = ("cyclic", "head_cyclic", "transformer")
        rows.append({n: {"step_ms": length / 2, "peak_bytes": 2**30} for n in contenders})
        rows[-1] |= {"length": length, "batch_size": 1}
    card = {"benchmark": "train_gpu", "environment": {"device": "a card"}}
    record = card | {"settings": {"dim": 8, "repeats": 2}, "rows": rows}
    time, memory = plot.panels(record)
    assert time.curves[0].x == [1024, 8192] and time.curves[0].y == [512.0, 4096.0]
    assert [c.name for c in memory.curves] == ["cyclic", "head_cyclic", "transformer"]
    plot.draw([record], tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    assert text.startswith("<?xml") and text.count('<g id="axes_') == 2
    longer = record | {"settings": {"dim": 8, "repeats": 3}, "rows": [rows[0] | {"length": 512}]}
    assert [r["length"] for r in plot.joined([record, longer])[0]["rows"]] == [512, 1024, 8192]
    elsewhere = longer | {"environment": {"device": "another"}}
    assert len(plot.joined([record, elsewhere])) == 2


def test_tiles_are_those_that_were_measured():
    """Each is within 10% of the fastest of the sweep, at every length that it is for."""
    record = json.loads(SWEEP.read_text())
    ms: dict[tuple[str, int, int], dict[tuple[int, ...], float]] = {}
    for row in record["rows"]:
        tile = tune._tile(row)
        ms.setdefault((row["kernel"], row["width"], row["length"]), {})[tile] = row["ms"]
    for (chip, width), kernels_of in TABLE.items():
        assert chip == 9  # the sweep's
        for (kernel, head_width, length), times in ms.items():
            if head_width == width:
                tile = kernels_of[kernel][length >= LONG]
                assert times[dataclasses.astuple(tile)] < 1.1 * min(times.values())


def test_a_sweep_is_a_table():
    text = report.markdown(json.loads(SWEEP.read_text()))
    assert "| kernel | 1,024 tokens | 8,192 tokens | 65,536 tokens |" in text
    assert len([line for line in text.splitlines() if ", heads of " in line]) == 2 * len(KERNELS)
