"""The compressors alone, on a GPU: bytes per second, beside compiled PyTorch and a library.

Bytes are counted as if each input were read once and each output written once, so a share of the
card's copy rate below one is traffic that is repeated, or time that is not spent on traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from attamba.bench.kernels import graph_ms
from attamba.ops import compress
from attamba.ops.chunking import chunk_starts, make_boundary, make_span

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIZES = ((64, 1024), (8, 8192), (1, 65536))
"""Rows and tokens of a row."""


@dataclass(frozen=True)
class Sizes:
    """Of one compressor: E, S, N, the convolution's taps; and P, tokens per chunk."""

    inner: int = 256
    heads: int = 8
    state_dim: int = 32
    taps: int = 4
    chunk_size: int = 8


def measure_scan(
    device: torch.device, copy_bytes: float, sizes: Sizes | None = None, *, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """One row for each scope and size: milliseconds, bytes per second, share of `copy_bytes`.

    copy_bytes: bytes that the card copies in a second, read and written ones added. compiled: the
    reference in compiled PyTorch as well, at each scope's first size, on which it depends little.
    """
    sizes = sizes or Sizes()
    for scope in ("chunk", "sequence"):
        for batch, seq in SIZES:
            beside = compiled and (batch, seq) == SIZES[0]
            yield measure(device, copy_bytes, sizes, scope, batch, seq, compiled=beside)


def measure(
    device: torch.device,
    copy_bytes: float,
    sizes: Sizes,
    scope: str,
    batch: int,
    seq: int,
    *,
    compiled: bool = False,
) -> dict[str, Any]:
    """Ours and its peers, forward and forward+backward, in one setting."""
    import torch

    torch.manual_seed(0)
    leaves = _inputs(device, sizes, batch, seq)
    gradients = [
        torch.randn(batch, seq, sizes.inner, device=device, dtype=torch.bfloat16) for _ in range(2)
    ]
    counted = count_bytes(leaves["proj"], gradients)
    row: dict[str, Any] = {
        "operator": "compress", "scope": scope, "batch": batch, "length": seq, **asdict(sizes),
        "bytes": counted, "ms": {}, "failed": {},
    }  # fmt: skip
    for name, operator in _contenders(device, sizes, scope, batch, seq, compiled):

        def forward(operator=operator):
            with torch.no_grad():
                return operator(**leaves)

        def both(operator=operator):
            used = [t for t in leaves.values() if t.requires_grad]
            return torch.autograd.grad(operator(**leaves), used, gradients, allow_unused=True)

        try:
            row["ms"][name] = {"forward": graph_ms(forward), "both": graph_ms(both)}
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row["failed"][name] = str(error).splitlines()[0][:200]
    ours = row["ms"].get("triton", {})
    row["bytes_per_second"] = {part: counted[part] / (ms * 1e-3) for part, ms in ours.items()}
    row["copy_share"] = {part: rate / copy_bytes for part, rate in row["bytes_per_second"].items()}
    return row


def count_bytes(proj: Tensor, y: Sequence[Tensor]) -> dict[str, int]:
    """Read and written: forward proj and y; backward both, y's gradient, and proj's."""
    outputs = sum(half.nbytes for half in y)
    factors = y[0].numel() // y[0].shape[-1] * 2 * 4  # of the norm, written and then read
    forward = proj.nbytes + outputs + factors
    return {"forward": forward, "both": forward + 2 * proj.nbytes + 2 * outputs + factors}


def _inputs(device: torch.device, sizes: Sizes, batch: int, seq: int) -> dict[str, Tensor]:
    import torch

    inner, heads, state_dim = sizes.inner, sizes.heads, sizes.state_dim
    columns = 4 * inner + 4 * state_dim + 2 * heads
    inputs = {
        "proj": torch.randn(batch, seq, columns, device=device, dtype=torch.bfloat16),
        "conv_weight": torch.randn(2 * inner + 4 * state_dim, sizes.taps, device=device) / 2,
        "A": -torch.rand(2, heads, device=device),
        "dt_bias": torch.zeros(2, heads, device=device),
        "D": torch.ones(2, heads, device=device),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def _contenders(
    device: torch.device, sizes: Sizes, scope: str, batch: int, seq: int, compiled: bool
) -> Iterator[tuple[str, Callable[..., tuple[Tensor, Tensor]]]]:
    import torch

    policy = make_boundary(
        "cyclic", chunk_size=sizes.chunk_size, layer_idx=1, n_layers=2, n_kv_heads=1, sink=True
    )
    span = make_span(seq, device)
    starts, longest = chunk_starts(policy(span)[0], span), policy.longest
    if scope == "sequence":
        starts, longest = span.positions == 0, None

    def ours(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def operator(**leaves: Any) -> tuple[Tensor, Tensor]:
            return compress(
                **leaves,
                starts=starts,
                state_dim=sizes.state_dim,
                longest=longest,
                backend=backend,
            )

        return operator

    yield "triton", ours("triton")
    if compiled:
        yield "torch, compiled", torch.compile(ours("torch"))
    if find_spec("fla") is not None and scope == "sequence":
        yield "flash-linear-attention, scan alone", _library_scan(device, sizes, batch, seq)


def _library_scan(
    device: torch.device, sizes: Sizes, batch: int, seq: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    """simple_gla is Mamba-2's scan: queries C, keys dt B, values x, log decay A dt per head."""
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    heads, width = 2 * sizes.heads, sizes.inner // sizes.heads
    rates = -torch.rand(batch, seq, heads, device=device)

    def operator(proj: Tensor, **_: Tensor) -> tuple[Tensor, Tensor]:
        x = proj[..., : 2 * sizes.inner].unflatten(-1, (heads, width)).contiguous()
        keys = proj[..., 2 * sizes.inner :][..., : heads * sizes.state_dim]
        keys = keys.unflatten(-1, (heads, sizes.state_dim)).contiguous()
        y_k, y_v = chunk_simple_gla(keys, keys, x, rates)[0].flatten(2).chunk(2, -1)
        return y_k, y_v

    return operator
