"""A linear map of few rows, with what stands around it in a decode step.

With one token per row a product is bound by reading its weights, and a step is a chain of a
hundred small kernels, each of which waits for the one before. So norm, gate and residual sum go
into the product's kernel, which reads its weights while its predecessor ends.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, rms_norm

from attamba.ops.backends import choose

__all__ = ["Norm", "normed_linear", "thin_linear"]


class Norm(NamedTuple):
    """An RMSNorm: its gain, [K] or [P, K], and eps."""

    gain: Tensor
    eps: float


def normed_linear(
    x: Tensor, weight: Tensor, norm: Norm, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """thin_linear with a norm, and the normed x as well, [R, N] and [R, K].

    x: [R, K]. weight: [N, K]. Raises ValueError where shapes disagree.
    """
    _check(x, weight, norm, False, None)
    if x.dim() != 2:
        raise ValueError(f"x has shape {list(x.shape)}; it must be [R, K]")
    if choose(backend, x.device, x.dtype) == "triton":
        from attamba.ops.thin_linear.triton import normed_linear_triton

        return normed_linear_triton(x, weight, norm)
    normed = rms_norm(x, x.shape[-1:], eps=norm.eps) * norm.gain.to(x.dtype)
    return thin_linear(normed, weight, backend=backend), normed


def thin_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Norm | None = None,
    gate: bool = False,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + act(RMSNorm(x) W^T), for inference.

    Args:
        x: [R, K], or [R, P, K] for P products side by side.
        weight: [N, K], or [P, N, K].
        norm: what x goes through first. Default: nothing.
        gate: the first half of the outputs, through SiLU, multiplies the second (SwiGLU,
            arXiv 2002.05202); N is then even and what is returned N/2 wide.
        residual: what is added, of the result's shape and in x's dtype. Default: nothing.
        backend: see attamba.ops. Sums are float32 in all of them; "triton" computes no gradients.

    Returns [R, N] or [R, P, N] in x's dtype. Raises ValueError where shapes disagree.
    """
    _check(x, weight, norm, gate, residual)
    chosen = choose(backend, x.device, x.dtype)
    if chosen == "triton":
        from attamba.ops.thin_linear.triton import thin_linear_triton

        return thin_linear_triton(x, weight, norm, gate, residual)
    if chosen == "reference":
        from attamba.ops.thin_linear.reference import thin_linear_reference

        return thin_linear_reference(x, weight, norm, gate, residual)
    from attamba.ops.thin_linear.torch import thin_linear_torch

    return thin_linear_torch(x, weight, norm, gate, residual)


def _check(
    x: Tensor, weight: Tensor, norm: Norm | None, gate: bool, residual: Tensor | None
) -> None:
    if x.dim() not in (2, 3) or weight.dim() != x.dim() or weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)} must be [R, K] and [N, K], "
            f"or [R, P, K] and [P, N, K]"
        )
    if x.dim() == 3 and weight.shape[0] != x.shape[1]:
        raise ValueError(f"x has {x.shape[1]} parts and weight {weight.shape[0]}")
    if norm is not None and norm.gain.shape != x.shape[1:]:
        raise ValueError(f"norm.gain is {list(norm.gain.shape)}, expected {list(x.shape[1:])}")
    width = weight.shape[-2]
    if gate and width % 2:
        raise ValueError(f"gate=True halves the outputs, but weight has {width} rows")
    wanted = (*x.shape[:-1], width // 2 if gate else width)
    if residual is not None and residual.shape != wanted:
        raise ValueError(f"residual is {list(residual.shape)}, expected {list(wanted)}")
