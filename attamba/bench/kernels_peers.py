"""Layers of flash-linear-attention beside ours, on a GPU, where that library is installed.

Its sparse attention (NSA, arXiv 2502.11089, compressed and selected keys) wants 16 or more query
heads to a key/value head, so ours runs at that shape too: P=8, L=64. Its Mamba-2 layer stands
beside our mixer "mamba2" of the same sizes.

Shapes: B rows, T tokens, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from attamba.bench.kernels import Shape, graph_ms, layer_ends

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TOKENS = 65536
NSA_LENGTHS, MAMBA_LENGTHS = (8192, 65536), (1024, 8192)
QUERIES, WIDTH = 16, 64
"""Query heads to the one key/value head, and the width of each."""


def measure_peer(peer: str, device: torch.device, dim: int) -> Iterator[dict[str, Any]]:
    """Rows of milliseconds, forward and forward+backward. Needs the library fla.

    peer: nsa, beside our attention, or mamba2.
    """
    if peer == "nsa":
        for length in NSA_LENGTHS:
            yield _row("attention", length, _attentions(length, device))
        return
    for length in MAMBA_LENGTHS:
        yield _row("mamba2", length, _mamba2(length, dim, device))


def _row(
    operator: str,
    length: int,
    contenders: Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]],
) -> dict[str, Any]:
    """Times of functions of the tensors that stand beside them, each by itself."""
    import torch

    row: dict[str, Any] = {"operator": operator, "length": length, "batch": TOKENS // length}
    row |= {"ms": {}, "failed": {}}
    for name, function, leaves in contenders:
        try:
            row["ms"][name] = _times(function, leaves)
        except (RuntimeError, torch.OutOfMemoryError, ImportError) as error:
            row["failed"][name] = str(error).splitlines()[0][:200]
    return row


def _times(function: Callable[..., Tensor], leaves: list[Tensor]) -> dict[str, float]:
    import torch

    weight = torch.randn_like(function(*leaves))

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*leaves)

    def both() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(function(*leaves), leaves, weight, allow_unused=True)

    return {"forward": graph_ms(forward), "both": graph_ms(both)}


def _attentions(
    length: int, device: torch.device
) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    import torch
    import torch.nn.functional as F
    from fla.ops.nsa import parallel_nsa

    from attamba.ops import chunk_attention

    batch = TOKENS // length
    sizes = [(batch, length, heads, WIDTH) for heads in (QUERIES, 1, 1)]
    leaves = [
        torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for size in sizes
    ]
    shape = Shape(length, batch, 1, WIDTH)
    ends = layer_ends(shape, "cyclic", device)
    gate = torch.rand(batch, length, QUERIES, device=device, dtype=torch.bfloat16)

    def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    yield (
        "attamba",
        lambda q, k, v: chunk_attention(q, k, v, ends, shape.lead, backend="triton"),
        leaves,
    )
    yield "flash-linear-attention", lambda q, k, v: parallel_nsa(q, k, v, gate, gate), leaves
    yield "scaled_dot_product_attention", library, leaves


def _mamba2(
    length: int, dim: int, device: torch.device
) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    import torch
    from fla.layers.mamba2 import Mamba2 as LibraryMamba2

    from attamba.mixers import Mamba2Mixer
    from attamba.modules.mamba2 import Mamba2
    from attamba.ops.chunking import make_span

    sizes = Mamba2Mixer()
    span = make_span(length, device)
    x = torch.randn(TOKENS // length, length, dim, device=device, dtype=torch.bfloat16)
    x.requires_grad_()
    ours: nn.Module = Mamba2(sizes, dim, 1e-5).to(device)
    theirs: nn.Module = LibraryMamba2(
        num_heads=sizes.inner(dim) // sizes.head_dim,
        head_dim=sizes.head_dim,
        hidden_size=dim,
        state_size=sizes.state_dim,
    ).to(device, torch.bfloat16)

    def call(module: nn.Module, run: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
        def function(x: Tensor, *_: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                out = run(x)
            return out[0] if isinstance(out, tuple) else out

        return function

    compiled = torch.compile(lambda x: ours(x, span))
    yield "attamba", call(ours, compiled), [x, *ours.parameters()]
    used = [p for p in theirs.parameters() if p.requires_grad]
    yield "flash-linear-attention", call(theirs, theirs), [x, *used]
