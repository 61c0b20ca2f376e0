"""`attamba bench kernels`: the operators alone, on a GPU, beside the best that libraries offer.

Every figure is the median of replays of a CUDA graph, so that no launch gap is in it; all that
are compared run in one process, one after the other. Rates are held against what the same card
does in a large matrix product and in a large copy, measured first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from attamba.bench import common

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LENGTHS = "1k,8k,64k"
TOKENS = 65536
PEERS = ("nsa", "mamba2")
"""Layers of flash-linear-attention, whose kernels are tuned for minutes when first run."""
PARTS = ("attention", "compressors", *PEERS)


@dataclass(frozen=True)
class Shape:
    """One setting: `batch` rows of `length` tokens, `heads` heads of `width`, P and L."""

    length: int
    batch: int
    heads: int
    width: int
    chunk_size: int = 8
    lead: int = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `attamba bench kernels`."""
    common.add_common_arguments(parser, LENGTHS)
    parser.add_argument("--flex", action="store_true", help="FlexAttention as well (compiles)")
    parser.add_argument(
        "--compiled", action="store_true",
        help="the compressors in compiled PyTorch as well (compiles for a minute or two)",
    )  # fmt: skip
    parser.add_argument(
        "--parts", default=",".join(PARTS), metavar="PART,...",
        help=f"what to measure: {', '.join(PARTS)} (default: all; the last two need fla)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, print tables, and write --json. Returns the exit status."""
    device = common.set_up(args.device, args.threads)
    if device.type != "cuda":
        raise common.ConfigError(f"--device={device}: the kernels' benchmark needs CUDA")
    shapes = [
        Shape(length, max(1, TOKENS // length), args.dim // width, width, args.chunk_size)
        for width in (64, 128)
        for length in common.parse_lengths(args.lengths)
    ]
    record: dict[str, Any] = {
        "benchmark": "kernels",
        "settings": {"tokens": TOKENS, "dim": args.dim, "chunk_size": args.chunk_size, "lead": 64},
        "environment": common.environment(device),
        "ceilings": ceilings(device),
    }
    for part, rows in _rows(args, shapes, device, record["ceilings"]):
        record.setdefault(part, []).append(rows)
        common.save(args.json, record)
    for table in tables(record):
        print(f"\n{table}")
    return 0


def _rows(
    args: argparse.Namespace, shapes: list[Shape], device: torch.device, ceiling: dict[str, float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each measured row and the part of the record that it belongs to."""
    from attamba.bench.kernels_peers import measure_peer
    from attamba.bench.kernels_scan import measure_scan

    parts = common.parse_choices("--parts", args.parts, PARTS)
    if "attention" in parts:
        for shape in shapes:
            print(f"attention: {shape} ...", flush=True)
            yield "rows", measure_attention(shape, device, ceiling, args.flex)
    if "compressors" in parts:
        print("compressors ...", flush=True)
        for row in measure_scan(device, ceiling["copy_bytes"], compiled=args.compiled):
            yield "compressors", row
    for peer in PEERS:
        if peer in parts and find_spec("fla") is None:
            print(f"{peer}: left out, flash-linear-attention (fla) is not installed")
        elif peer in parts:
            print(f"{peer} ...", flush=True)
            for row in measure_peer(peer, device, args.dim):
                yield "peers", row


def ceilings(device: torch.device) -> dict[str, float]:
    """What the card does: bf16 matrix product in FLOP/s, copy in bytes/s, see copy_rate."""
    import torch

    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in "ab")
    return {
        "matrix_flops": 2 * 8192**3 / (graph_ms(lambda: a @ b) * 1e-3),
        "copy_bytes": copy_rate(device),
    }


def copy_rate(device: torch.device) -> float:
    """Bytes that the card copies in a second, read and written ones added, from 2 GiB to 2 GiB.

    The faster of its own copy and an elementwise kernel, which on some cards beats it by half.
    """
    import torch

    source = torch.randn(2**29, device=device)
    target = torch.empty_like(source)
    copies = (lambda: target.copy_(source), lambda: torch.mul(source, 1.0, out=target))
    return 2 * source.nbytes / (min(graph_ms(copy) for copy in copies) * 1e-3)


def graph_ms(step: Callable[[], object], milliseconds: int = 100) -> float:
    """Median milliseconds of a step, replayed as a CUDA graph, the L2 cache emptied between."""
    import torch
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return do_bench(graph.replay, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")


def measure_attention(
    shape: Shape, device: torch.device, ceiling: dict[str, float], flex: bool = False
) -> dict[str, Any]:
    """Milliseconds forward and forward+backward of each contender, and what follows from them."""
    import torch

    from attamba.bench.library import BACKENDS

    torch.manual_seed(0)
    size = (shape.batch, shape.length, shape.heads, shape.width)
    q, k, v, weight = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(4))
    row: dict[str, Any] = {"operator": "attention", **vars(shape), "ms": {}, "failed": {}}
    contenders = [*_ours(shape, device), *_library(), *_dense(shape, device)]
    if flex:
        contenders += _flex(shape, device)
    for name, attention in contenders:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]

        def forward(attention=attention, leaves=leaves):
            with torch.no_grad():
                return attention(*leaves)

        def both(attention=attention, leaves=leaves):
            return torch.autograd.grad(attention(*leaves), leaves, weight)

        try:
            row["ms"][name] = {"forward": graph_ms(forward), "both": graph_ms(both)}
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row["failed"][name] = str(error).splitlines()[0][:200]
    best = {
        part: min(row["ms"][n][part] for n in BACKENDS if n in row["ms"])
        for part in ("forward", "both")
    }
    row["library_ms"] = best
    for name in ("cyclic", "head_cyclic"):
        ours = row["ms"][name]
        row[f"{name}_speedup"] = {part: best[part] / ours[part] for part in best}
        useful = 4 * shape.width * shape.heads * shape.batch * visible_pairs(shape, name)
        row[f"{name}_matrix_share"] = useful / (ours["forward"] * 1e-3) / ceiling["matrix_flops"]
    return row


def tables(record: dict[str, Any]) -> list[common.Table]:
    """A record that run() made, as tables."""
    blocks = _attention(record["rows"]) if "rows" in record else []
    if "compressors" in record:
        blocks.append(_compressors(record["compressors"]))
    if "peers" in record:
        blocks.append(_peers(record["peers"]))
    return blocks


def _attention(measured: list[dict[str, Any]]) -> list[common.Table]:
    """Attention forward, and forward and backward."""
    names = list(dict.fromkeys(name for row in measured for name in row["ms"]))
    blocks = []
    for part, title in (("forward", "forward"), ("both", "forward and backward")):
        rows = []
        for row in measured:
            cells = [f"{row['length']:,} x {row['heads']} heads of {row['width']}"]
            cells += [f"{row['ms'][n][part]:.3f} ms" if n in row["ms"] else "-" for n in names]
            cells += [f"{row[f'{n}_speedup'][part]:.2f}" for n in ("cyclic", "head_cyclic")]
            if part == "forward":
                cells.append(f"{row['cyclic_matrix_share']:.0%}")
            rows.append(cells)
        last = ["of matrix rate"] if part == "forward" else []
        headers = ["tokens", *names, "cyclic: times faster", "head_cyclic", *last]
        blocks.append(common.Table(f"attention, {title}", headers, rows))
    return blocks


def _peers(rows: list[dict[str, Any]]) -> common.Table:
    """Layers of flash-linear-attention beside ours."""
    names = _contenders(rows)
    cells = [
        [f"{row['operator']}, {row['batch']} x {row['length']:,}", *_cells(row, names)]
        for row in rows
    ]
    headers = ["operator, tokens", *(f"{n}: forward / both" for n in names)]
    return common.Table("layers of flash-linear-attention, forward / both", headers, cells)


def _contenders(rows: list[dict[str, Any]]) -> list[str]:
    """Who was measured, and who failed, in the order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in (*row["ms"], *row["failed"])))


def _cells(row: dict[str, Any], names: list[str]) -> list[str]:
    """Forward / both of each contender, or that it failed, or "-" where it did not take part."""
    return [_cell(row["ms"].get(name), row["failed"].get(name)) for name in names]


def _cell(ms: dict[str, float] | None, error: str | None) -> str:
    if ms is not None:
        return f"{ms['forward']:.3f} / {ms['both']:.3f} ms"
    if error is None:
        return "-"
    return "out of memory" if "out of memory" in error else "failed"


def _compressors(rows: list[dict[str, Any]]) -> common.Table:
    """Forward and backward of both compressors, and their share of the copy rate."""
    names = _contenders(rows)
    cells = []
    for row in rows:
        share = row["copy_share"]
        cells.append(
            [f"{row['scope']}, {row['batch']} x {row['length']:,}", *_cells(row, names)]
            + [f"{share[part]:.0%}" if part in share else "-" for part in ("forward", "both")]
        )
    headers = ["scope, tokens", *(f"{n}: forward / both" for n in names)]
    title = "compressors, forward / forward and backward"
    return common.Table(title, [*headers, "copy rate: forward", "both"], cells)


def layer_ends(shape: Shape, boundary: str, device: torch.device) -> Tensor:
    """Chunk ends of a layer in the middle of eight, bool [1, G or 1, T]."""
    from attamba.ops.chunking import make_boundary, make_span

    policy = make_boundary(
        boundary, chunk_size=shape.chunk_size, layer_idx=3, n_layers=8,
        n_kv_heads=shape.heads, sink=True,
    )  # fmt: skip
    return policy(make_span(shape.length, device))[0]


def visible_pairs(shape: Shape, boundary: str) -> float:
    """Visible (query, key) pairs of one row, a head's mean."""
    import torch

    ends = layer_ends(shape, boundary, torch.device("cpu"))[0].double()
    past = shape.length - shape.lead - 1
    full = min(shape.lead + 1, shape.length)
    window = full * (full + 1) / 2 + (shape.length - full) * full
    later = (past - torch.arange(past)).double()
    return window + float((ends[:, :past] * later).sum()) / ends.shape[0]


def _ours(shape: Shape, device: torch.device) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    from attamba.ops import chunk_attention

    for boundary in ("cyclic", "head_cyclic"):
        ends = layer_ends(shape, boundary, device)
        yield (
            boundary,
            lambda q, k, v, ends=ends: chunk_attention(q, k, v, ends, shape.lead, backend="triton"),
        )


def _library() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    import torch.nn.functional as F
    from torch.nn.attention import sdpa_kernel

    from attamba.bench.library import BACKENDS

    for name, kernel in BACKENDS.items():

        def attention(q: Tensor, k: Tensor, v: Tensor, kernel: Any = kernel) -> Tensor:
            with sdpa_kernel(kernel):
                qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
                return F.scaled_dot_product_attention(qh, kh, vh, is_causal=True).transpose(1, 2)

        yield name, attention


DENSE_UP_TO = 8192


def _dense(shape: Shape, device: torch.device) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Every key and a mask [T, T], as the paper's code has it, where the mask is not too large."""
    import torch.nn.functional as F
    from torch.nn.attention import sdpa_kernel

    from attamba.bench.library import BACKENDS
    from attamba.ops.chunking import visible

    if shape.length > DENSE_UP_TO:
        return
    mask = visible(layer_ends(shape, "cyclic", device), shape.lead, shape.length)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS["efficient"]):  # the one that takes a mask
            qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask).transpose(1, 2)

    yield "dense mask", attention


def _flex(shape: Shape, device: torch.device) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """FlexAttention over [chunk ends | all keys], its block mask made beforehand."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    index = layer_ends(shape, "cyclic", device)[0, 0].nonzero()[:, 0]
    n_past = -(-index.numel() // 128) * 128
    position = torch.full((n_past,), shape.length, device=device)
    position[: index.numel()] = index

    def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        past = (s < n_past) & (position[s.clamp(max=n_past - 1)] < t - shape.lead)
        own = s - n_past
        return past | ((s >= n_past) & (own <= t) & (own >= t - shape.lead))

    mask = create_block_mask(
        seen, None, None, shape.length, n_past + shape.length, device=device, _compile=True
    )
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    gathered = torch.nn.functional.pad(index, (0, n_past - index.numel()))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([t[:, gathered], t], 1) for t in (k, v))
        qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(qh, kh, vh, block_mask=mask).transpose(1, 2)

    yield "flex", attention
