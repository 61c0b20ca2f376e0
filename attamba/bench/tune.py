"""`attamba bench tune`: measures the tile sizes that chunk attention's kernels can have.

Prints the fastest of each kernel as entries of attamba/ops/chunk_attention/tiles.py, which a
person then puts there: programs do not tune themselves. Candidates are compiled by as many
processes as there are cores and then timed one after the other.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from attamba.bench import common
from attamba.bench.kernels import TOKENS, Shape, graph_ms, layer_ends

if TYPE_CHECKING:
    from attamba.ops.chunk_attention.tiles import Tiles

LENGTHS = "1k,8k,64k"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `attamba bench tune`."""
    common.add_common_arguments(parser, LENGTHS)
    parser.add_argument("--widths", default="64,128", help="head widths (default: 64,128)")
    parser.add_argument("--kernels", default="forward,dq,past,window", help="(default: all)")


def run(args: argparse.Namespace) -> int:
    """Measure all candidates, print the fastest, write --json. Returns the exit status."""
    import torch

    device = common.set_up(args.device, args.threads)
    if device.type != "cuda":
        raise common.ConfigError(f"--device={device}: tuning needs CUDA")
    lengths = common.parse_lengths(args.lengths)
    record: dict[str, Any] = {
        "benchmark": "tune",
        "settings": {"tokens": TOKENS, "lengths": lengths, "chunk_size": args.chunk_size},
        "environment": common.environment(device),
        "rows": [],
    }
    for width in map(int, args.widths.split(",")):
        jobs = [
            (kernel, tile, width, args.dim)
            for kernel in args.kernels.split(",")
            for tile in candidates(kernel, width)
        ]
        with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
            usable = [job for job, good in zip(jobs, pool.map(_compiles, jobs, 1)) if good]
        shapes = [
            Shape(t, max(1, TOKENS // t), args.dim // width, width, args.chunk_size)
            for t in lengths
        ]
        for shape in shapes:
            steps = launches(shape, device)
            for kernel, tile, *_ in usable:
                ms = graph_ms(functools.partial(steps[kernel], tile), 20)
                record["rows"].append(
                    {"kernel": kernel, "width": width, "length": shape.length, "ms": ms}
                    | vars(tile)
                )
        torch.cuda.empty_cache()
    record["best"] = best(record["rows"])
    for line in record["best"]:
        print(line)
    common.save(args.json, record)
    return 0


def candidates(kernel: str, width: int) -> list[Tiles]:
    """Tiles worth a try."""
    from attamba.ops.chunk_attention.tiles import Tiles

    if kernel in ("forward", "dq"):
        grid = itertools.product((64, 128), (32, 64, 128), (32, 64), (4, 8), (2, 3))
    else:  # window_n is of no use to the kernels of keys
        grid = itertools.product((32, 64, 128), (64, 128), (64,), (4, 8), (1, 2, 3))
    return [Tiles(*tile) for tile in grid if _fits(Tiles(*tile), kernel, width)]


def _fits(tile: Tiles, kernel: str, width: int) -> bool:
    """Leaves out accumulators that would not fit into registers, and idle warps."""
    if kernel in ("forward", "dq"):
        numbers = tile.block_m * max(width, tile.block_n)
    else:
        numbers = tile.block_n * max(2 * width, tile.block_m)
    return tile.warps * 2048 <= 2 * numbers <= tile.warps * 16384


def launches(shape: Shape, device: Any) -> dict[str, Callable[[Tiles], None]]:
    """For each kernel a function that launches it with given tiles."""
    import torch

    from attamba.ops.chunk_attention import triton
    from attamba.ops.chunk_attention.tiles import override

    size = (shape.batch, shape.length, shape.heads, shape.width)
    q, k, v, d_out = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(4))
    ends = layer_ends(shape, "cyclic", device)
    scale = shape.width**-0.5
    out, lse, before, index = triton._forward(q, k, v, ends, None, None, shape.lead, scale)
    launch = triton.Launch(q, k, v, before, None, None, shape.lead, scale)
    delta = (d_out.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    calls: dict[str, Callable[[], None]] = {
        "forward": lambda: launch.forward(out, lse, index),
        "dq": lambda: launch.dq(out, d_out, lse, delta, index, grads[0]),
        "past": lambda: launch.past_keys(d_out, lse, delta, index, *grads[1:]),
        "window": lambda: launch.window_keys(d_out, lse, delta, *grads[1:]),
    }

    def with_tiles(name: str) -> Callable[[Tiles], None]:
        def step(tile: Tiles) -> None:
            with override(name, tile):
                calls[name]()

        return step

    return {name: with_tiles(name) for name in calls}


def best(rows: list[dict[str, Any]]) -> list[str]:
    """The fastest tiles of each kernel and width over all lengths, with their times."""
    lines = []
    for kernel, width, mine in _by_kernel(rows):
        fastest = {r["length"]: r["ms"] for r in _fastest(mine)}
        loss: dict[tuple[int, ...], float] = {}
        for r in mine:
            loss[_tile(r)] = loss.get(_tile(r), 0.0) + math.log(r["ms"] / fastest[r["length"]])
        ranked = sorted(loss, key=loss.__getitem__)[:3]
        for tile in ranked:
            times = ", ".join(
                f"{r['length']}: {r['ms']:.3f} (best {fastest[r['length']]:.3f})"
                for r in mine
                if _tile(r) == tile
            )
            lines.append(f"{kernel} width {width}: Tiles{tile}  # ms at {times}")
    return lines


def tables(record: dict[str, Any]) -> list[common.Table]:
    """The fastest tiles of each kernel at each length, of a record that run() made."""
    cells = [
        [
            f"{kernel}, heads of {width}",
            *(f"{', '.join(map(str, _tile(r)))}: {r['ms']:.3f} ms" for r in _fastest(mine)),
        ]
        for kernel, width, mine in _by_kernel(record["rows"])
    ]
    head = ["kernel", *(f"{length:,} tokens" for length in sorted(record["settings"]["lengths"]))]
    return [common.Table("fastest tiles (block_m, block_n, window_n, warps, stages)", head, cells)]


def _by_kernel(rows: list[dict[str, Any]]) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """Each kernel and width of heads, and its rows."""
    for kernel, width in dict.fromkeys((r["kernel"], r["width"]) for r in rows):
        yield kernel, width, [r for r in rows if (r["kernel"], r["width"]) == (kernel, width)]


def _fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One kernel's fastest row of each length, in order of lengths."""
    lengths = sorted({r["length"] for r in rows})
    return [min((r for r in rows if r["length"] == t), key=lambda r: r["ms"]) for t in lengths]


def _tile(row: dict[str, Any]) -> tuple[int, ...]:
    """A row's tile, in the order of Tiles."""
    names = ("block_m", "block_n", "window_n", "warps", "stages")
    return tuple(row[name] for name in names)


def _compiles(job: tuple[str, Tiles, int, int]) -> bool:
    """Compile one candidate into the cache on disk; does it fit the chip?"""
    import torch

    kernel, tile, width, dim = job
    try:
        launches(Shape(1024, 1, dim // width, width), torch.device("cuda"))[kernel](tile)
        torch.cuda.synchronize()
    except Exception as error:  # out of shared memory or registers: not a candidate
        print(f"{kernel} {tile}: {str(error).splitlines()[0][:120]}")
        return False
    return True
