"""Rotary position embedding (arXiv 2104.09864), first half against second half."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attamba.ops.backends import choose

__all__ = ["rotary_table", "rotate", "step_table", "with_direct", "with_positions"]


def frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/D), float64 [D/2]."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64)
    return theta ** (-exponent / head_dim)


@torch.library.custom_op("attamba::rotary_table", mutates_args=())
def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [B or 1, T, 1, D/2], of integer positions [B or 1, T].

    Angles are float64: at position 200,000 float32 would be a hundredth of a radian off. An
    operator of its own, since a compiler would else compute the float64 cosines anew inside every
    kernel that rotates, each time for all heads: a third of a training step on a GPU.
    """
    angle = positions[..., None, None] * frequencies(head_dim, theta, positions.device)
    return angle.cos().float(), angle.sin().float()


@rotary_table.register_fake
def _tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, 1, head_dim // 2)
    return tuple(positions.new_empty(shape, dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]


def step_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """The same for a decode step, positions [B or 1, 1], which is made of small operations.

    On a CPU an operator's entry takes as long as three of them; on a GPU it is one kernel.
    """
    frequency = _kept_frequencies(head_dim, theta, positions.device)
    if choose("auto", positions.device) == "triton" and not torch.compiler.is_compiling():
        from attamba.ops.rotary.triton import step_table_triton

        return step_table_triton(positions, frequency)
    angle = positions[..., None, None] * frequency
    return angle.cos().float(), angle.sin().float()


@functools.lru_cache(maxsize=64)
def _kept_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return frequencies(head_dim, theta, device)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x by its position. Computed in float32, returned in x's dtype.

    x: [..., H, D]; rotary: cosine and sine, float32 [..., 1, D/2].
    """
    cos, sin = rotary
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def with_positions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor],
    direct: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned by their positions; `direct` is added to keys and values before.

    q: [B, T, H, D]; k, v: [B, T, G, D]; direct: [B, T, G, D], for keys and values alike, or
    [B, T, 2, G, D], all of one dtype. rotary: cosine and sine, float32 [B or 1, T, 1, D/2].
    Raises ValueError where shapes disagree, and for backend "triton" where it cannot run.
    """
    _check(q, k, v, rotary, direct)
    if choose(backend, q.device, q.dtype) == "triton":
        from attamba.ops.rotary.triton import rotate_pair, rotate_sums

        if direct is None:
            return *rotate_pair(q, k, *rotary, False), v
        return rotate_sums(q, k, v, direct, *rotary)
    if direct is not None:
        k, v = with_direct(k, v, direct)
    return rotate(q, rotary), rotate(k, rotary), v


def _check(
    q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], direct: Tensor | None
) -> None:
    """The kernel takes all sizes from q and k, and would read beyond tensors that are shorter."""
    if q.dim() != 4 or q.shape[3] % 2:
        raise ValueError(f"q has shape {list(q.shape)}; it must be [B, T, H, D] with D even")
    batch, seq, _, width = q.shape
    if k.dim() != 4 or k.shape != (batch, seq, k.shape[2], width) or v.shape != k.shape:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must both be [B, T, G, D] "
            f"with B={batch}, T={seq}, D={width}, as q is"
        )
    for tensor in rotary:
        if tensor.shape not in ((1, seq, 1, width // 2), (batch, seq, 1, width // 2)):
            raise ValueError(
                f"rotary has {list(tensor.shape)}, expected [B or 1, T, 1, D/2] with B={batch}, "
                f"T={seq}, D={width}"
            )
    if rotary[0].shape != rotary[1].shape:  # the kernel reads both with one index
        raise ValueError(
            f"rotary has a cosine of {list(rotary[0].shape)} and a sine of "
            f"{list(rotary[1].shape)}; they must have one shape"
        )
    pair = (batch, seq, 2, k.shape[2], width)
    if direct is not None and direct.shape not in (k.shape, pair):
        raise ValueError(
            f"direct has {list(direct.shape)}, expected {list(k.shape)} as k, or {list(pair)}"
        )


def with_direct(k: Tensor, v: Tensor, direct: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with `direct`, see with_positions."""
    direct_k, direct_v = (direct, direct) if direct.dim() == k.dim() else direct.unbind(2)
    return k + direct_k, v + direct_v
