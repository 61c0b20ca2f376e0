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
    parser.add_argument(
        "--repeats", type=int, default=24, help="timed steps of each model (default: 24)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write --json. Returns the exit status."""
    lengths = common.parse_lengths(args.lengths)
    device = common.set_up(args.device, args.threads)
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
    for length in lengths:
        print(f"decode: {length} tokens ...", flush=True)
        record["rows"].append(measure(models, length, args.batch_size, args.repeats))
    for table in tables(record):
        print(f"\n{table}")
    if args.json is not None:
        common.write_json(args.json, record)
    return 0


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
    """A record that run() made, as tables: step time, cache bytes."""
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
    return [
        common.Table("one step", [*first, "times faster", "attamba p90", "transformer p90"], times),
        common.Table(
            "cache", [*first, "times smaller", "attamba allocated", "transformer allocated"], sizes
        ),
    ]


def _build_models(args: argparse.Namespace, device: torch.device) -> dict[str, Decoder]:
    import torch

    from attamba.models import build_model

    torch.manual_seed(0)
    models = {}
    for name in common.MODELS:
        config = common.model_config(
            name, dim=args.dim, layers=args.layers, chunk_size=args.chunk_size
        )
        models[name] = build_model(config).to(device, getattr(torch, args.dtype)).eval()
    return models


def _stepper(
    model: Decoder, cache: DecodeCache, batch_size: int, device: torch.device
) -> Callable[[], object]:
    import torch

    token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    return lambda: model(token, cache=cache)
