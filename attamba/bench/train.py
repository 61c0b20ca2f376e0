"""`attamba bench train`: time and peak memory of one training step, at many sequence lengths.

On a GPU: see train_gpu. On a CPU every (model, length) is measured in a process of its own,
because a process's peak memory never goes down: a second measurement in it could not be told from
the first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from attamba.bench import common
from attamba.config import to_dict
from attamba.display import format_bytes

LENGTHS = "1k,2k,4k,8k,16k"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `attamba bench train`."""
    common.add_common_arguments(parser, LENGTHS)
    common.add_model_arguments(parser)
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed steps of each model (default: 3)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and growth exponents, and write --json. Returns the exit status."""
    lengths = common.parse_lengths(args.lengths)
    device = common.set_up(args.device, args.threads)
    if device.type == "cuda":
        from attamba.bench import train_gpu

        return _finish(train_gpu.run(args, lengths, device), train_gpu.tables, args)
    common.fill_in(args, device)
    record: dict[str, Any] = {
        "benchmark": "train",
        "settings": {
            "dim": args.dim,
            "layers": args.layers,
            "heads": common.n_heads(args.dim),
            "chunk_size": args.chunk_size,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "repeats": args.repeats,
        },
        "environment": common.environment(device),
        "rows": [],
    }
    for length in lengths:
        row: dict[str, Any] = {"length": length}
        for name in common.MODELS:
            print(f"train: {name}, {length} tokens ...", flush=True)
            row[name] = _measure(name, length, args, str(device))
        record["rows"].append(row)
        common.save(args.json, record)
    record["growth"] = growth(record["rows"])
    return _finish(record, tables, args)


def _finish(
    record: dict[str, Any],
    tables: Callable[[dict[str, Any]], list[common.Table]],
    args: argparse.Namespace,
) -> int:
    for table in tables(record):
        print(f"\n{table}")
    if "growth" in record:
        print("", *growth_lines(record), sep="\n")
    common.save(args.json, record)
    return 0


def growth(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{model: {figure: exponent a}} where figure grows as T^a.

    Fitted to the lengths from a quarter of the longest on; empty where there is one alone.
    """
    rows = [row for row in rows if 4 * row["length"] >= rows[-1]["length"]]
    if len(rows) < 2:
        return {}
    x = [math.log(row["length"]) for row in rows]
    return {
        name: {
            figure: statistics.linear_regression(
                x, [math.log(row[name][figure]) for row in rows]
            ).slope
            for figure in ("step_ms", "attention_ms", "peak_bytes", "attention_entries")
        }
        for name in common.MODELS
    }


def growth_lines(record: dict[str, Any]) -> list[str]:
    """The growth exponents in words."""
    return [
        f"{name}: time grows as T^{g['step_ms']:.2f} (attention alone T^{g['attention_ms']:.2f}), "
        f"memory as T^{g['peak_bytes']:.2f}, attention-map entries as "
        f"T^{g['attention_entries']:.2f}"
        for name, g in record["growth"].items()
    ]


def tables(record: dict[str, Any]) -> list[common.Table]:
    """A record that run() made, as tables: time, peak memory, size of the attention map."""
    first = ["tokens", *common.MODELS]
    times, sizes, maps = [], [], []
    for row in record["rows"]:
        pair = [row[name] for name in common.MODELS]
        tokens = f"{row['length']:,}"
        times.append(
            [tokens, *(f"{m['step_ms']:.0f} ms" for m in pair), _ratio(row, "step_ms")]
            + [f"{m['attention_ms']:.1f} ms" for m in pair]
            + [_ratio(row, "attention_ms")]
        )
        sizes.append(
            [
                tokens,
                *(format_bytes(m["peak_bytes"]) for m in pair),
                _ratio(row, "peak_bytes"),
            ]
        )
        square = row["length"] ** 2 * record["settings"]["layers"] * record["settings"]["heads"]
        maps.append(
            [tokens, *(f"{m['attention_entries'] / 1e6:,.1f} M" for m in pair)]
            + [_ratio(row, "attention_entries")]
            + [f"T*T / {square / m['attention_entries']:.1f}" for m in pair]
        )
    alone = ["attention: attamba", "transformer", "times faster"]
    return [
        common.Table("forward and backward", [*first, "times faster", *alone], times),
        common.Table("peak memory above weights and gradients", [*first, "times smaller"], sizes),
        common.Table("entries of the attention map", [*first, "times fewer", *first[1:]], maps),
    ]


def _ratio(row: dict[str, Any], figure: str) -> str:
    return f"{row['transformer'][figure] / row['attamba'][figure]:.2f}"


def _measure(name: str, length: int, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Run attamba.bench.probe in a fresh process."""
    config = common.model_config(name, dim=args.dim, layers=args.layers, chunk_size=args.chunk_size)
    request = {
        "model": to_dict(config),
        "length": length,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "device": device,
        "dtype": args.dtype,
        "threads": args.threads,
    }
    child = subprocess.run(
        [sys.executable, "-m", "attamba.bench.probe", json.dumps(request)],
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        reason = (
            "killed by the system, most likely for want of memory; give shorter --lengths"
            if child.returncode < 0
            else child.stderr.strip()[-2000:]
        )
        raise RuntimeError(f"{name} at {length} tokens failed: {reason}")
    return json.loads(child.stdout)
