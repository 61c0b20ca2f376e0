"""`attamba bench decode`: time of one decoding step and bytes of the cache, at many lengths.

Reading 64k tokens through a transformer takes minutes on a CPU and would tell nothing more, so
caches are filled with random keys and values by their own rule; then real steps are taken.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attamba.bench import common
from attamba.display import format_bytes

if TYPE_CHECKING:
    import torch

    from attamba.models import Decoder
    from attamba.modules.cache import DecodeCache

LENGTHS = "1k,2k,4k,8k,16k,32k,64k"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `attamba bench decode`."""
    common.add_common_arguments(parser, LENGTHS)
    common.add_model_arguments(parser)
    parser.add_argument(
        "--repeats", type=int, default=24, help="timed steps of each model (default: 24)"
    )
    parser.add_argument(
        "--longest", action="store_true", help="on CUDA: also find the longest context that fits"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write --json. Returns the exit status."""
    lengths = common.parse_lengths(args.lengths)
    device = common.set_up(args.device, args.threads)
    common.fill_in(args, device)
    record: dict[str, Any] = {
        "benchmark": "decode",
        "settings": {
            "dim": args.dim,
            "layers": args.layers,
            "chunk_size": args.chunk_size,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "repeats": args.repeats,
        },
        "environment": common.environment(device),
        "rows": [],
    }
    models = _build_models(args, device)
    if device.type == "cuda":
        from attamba.bench import decode_cuda
        from attamba.bench.kernels import copy_rate

        rate = record["copy_bytes_per_second"] = copy_rate(device)
    for length in lengths:
        print(f"decode: {length} tokens ...", flush=True)
        if device.type == "cuda":
            row = decode_cuda.measure(models, length, args.batch_size, args.repeats, rate)
        else:
            row = measure(models, length, args.batch_size, args.repeats)
        record["rows"].append(row)
        common.save(args.json, record)
    if device.type == "cuda" and args.longest:
        record["longest"] = _longest(models, args.batch_size)
    for table in tables(record):
        print(f"\n{table}")
    common.save(args.json, record)
    return 0


def _longest(models: dict[str, Decoder], batch_size: int) -> dict[str, Any]:
    from attamba.bench import decode_cuda

    itemsize = models["transformer"].embed.weight.element_size()
    return {
        name: decode_cuda.longest_context(model, batch_size, itemsize)
        for name, model in models.items()
    }


def measure(
    models: dict[str, Decoder], length: int, batch_size: int, repeats: int
) -> dict[str, Any]:
    """One row: for each model step time (ms, median and 90th percentile) and cache bytes.

    Bytes are those of a cache of exactly `length` tokens; the timed steps come after it.
    """
    import torch

    device = next(iter(models.values())).embed.weight.device
    row: dict[str, Any] = {"length": length}
    steps: dict[str, Callable[[], object]] = {}
    generator = torch.Generator().manual_seed(length)
    with torch.inference_mode():
        for name, model in models.items():
            cache = model.new_cache(batch_size=batch_size)
            cache.fill(length, generator)
            row[name] = {"bytes_used": cache.nbytes(used=True), "bytes_allocated": cache.nbytes()}
            steps[name] = _stepper(model, cache, batch_size, device)
        times = common.interleaved_seconds(steps, repeats, device)
    for name, taken in times.items():
        row[name]["step_ms"] = common.median_ms(taken)
        row[name]["step_ms_p90"] = sorted(taken)[math.ceil(0.9 * len(taken)) - 1] * 1e3
    row["speedup"] = row["transformer"]["step_ms"] / row["attamba"]["step_ms"]
    row["bytes_ratio"] = row["transformer"]["bytes_used"] / row["attamba"]["bytes_used"]
    steps.clear()
    gc.collect()  # caches of 64k tokens hold gigabytes: none may outlive its row
    return row


def tables(record: dict[str, Any]) -> list[common.Table]:
    """A record that run() made, as tables: step time, cache bytes; on CUDA bandwidth as well."""
    times, sizes = [], []
    for row in record["rows"]:
        pair = [row[name] for name in common.MODELS]
        tokens = f"{row['length']:,}"
        times.append(
            [tokens, *(f"{m['step_ms']:.2f} ms" for m in pair), f"{row['speedup']:.2f}"]
            + [f"{m['step_ms_p90']:.2f} ms" for m in pair]
        )
        sizes.append(
            [tokens, *(format_bytes(m["bytes_used"]) for m in pair)]
            + [f"{row['bytes_ratio']:.2f}"]
            + [format_bytes(m["bytes_allocated"]) for m in pair]
        )
    first = ["tokens", *common.MODELS]
    found = [
        common.Table("one step", [*first, "times faster", "attamba p90", "transformer p90"], times),
        common.Table(
            "cache", [*first, "times smaller", "attamba allocated", "transformer allocated"], sizes
        ),
    ]
    if "copy_bytes_per_second" in record:
        found.append(_bandwidth_table(record))
    if "longest" in record:
        found.append(_longest_table(record["longest"]))
    return found


def _bandwidth_table(record: dict[str, Any]) -> common.Table:
    lines = []
    for row in record["rows"]:
        ran = (ms for ms in row["library"].values() if isinstance(ms, float))
        library = min(ran, default=math.nan)
        for name, result in row.items():
            if isinstance(result, dict) and "floor_ms" in result:
                cells = [f"{row['length']:,} {name}", f"{result['step_ms']:.3f} ms"]
                cells += [f"{result['floor_ms']:.3f} ms", f"{result['share_of_floor']:.0%}"]
                cells += [f"{result['tokens_per_second']:,.0f}", f"{result['speedup']:.2f}"]
                lines.append([*cells, f"{library / result['step_ms']:.2f}"])
        for name, taken in row["library"].items():
            cell = f"{taken:.3f} ms" if isinstance(taken, float) else "does not run"
            lines.append([f"{row['length']:,} transformer, {name}", cell, "", "", "", "", ""])
    rate = record["copy_bytes_per_second"] / 1e12
    return common.Table(
        f"captured steps; the device copies {rate:.2f} TB/s (read + written)",
        [
            "tokens, model",
            "step",
            "floor",
            "share",
            "tokens/s",
            "times faster than the fastest transformer",
            "than one with library attention",
        ],
        lines,
    )


def _longest_table(longest: dict[str, Any]) -> common.Table:
    base = longest["transformer"]["tokens"]
    lines = []
    for name, found in longest.items():
        step = "does not fit" if found["step_ms"] is None else f"{found['step_ms']:.2f} ms"
        lines.append([name, f"{found['tokens']:,}", f"{found['tokens'] / base:.2f}", step])
    return common.Table(
        "longest context that fits", ["model", "tokens", "times longer", "step"], lines
    )


def _build_models(args: argparse.Namespace, device: torch.device) -> dict[str, Decoder]:
    import torch

    from attamba.models import build_model

    torch.manual_seed(0)
    models = {}
    more = ("head_cyclic", "shared_heads") if device.type == "cuda" else ()
    for name in (*common.MODELS, *more):
        config = common.model_config(
            name, dim=args.dim, layers=args.layers, chunk_size=args.chunk_size
        )
        shown = name if name in common.MODELS else f"attamba {name}"
        models[shown] = build_model(config).to(device, getattr(torch, args.dtype)).eval()
    return models


def _stepper(
    model: Decoder, cache: DecodeCache, batch_size: int, device: torch.device
) -> Callable[[], object]:
    import torch

    token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    return lambda: model(token, cache=cache)
