"""The two compressors between their projections: convolution, scan, gate and norm."""

from __future__ import annotations

from torch import Tensor

from attamba.ops.backends import choose
from attamba.ops.compress.reference import compress_reference
from attamba.ops.compress.torch import compress_torch


def compress(
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    *,
    state_dim: int,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    longest: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Two Mamba-2 mixers (arXiv 2405.21060), for K and for V, side by side, without projections.

        z, x, B, C, dt = split(proj);   x, B, C = SiLU(causal_conv(x, B, C))
        h_t = exp(A dt_t) h_(t-1) + dt_t B_t x_t^T,   dt_t = softplus(dt_t + dt_bias)
        g_t = (C_t h_t + D x_t) * SiLU(z_t),   y_t = g_t / sqrt(mean(g_t^2) + eps)

    where a token starts a chunk, h_(t-1) is zero and the convolution sees nothing before it.

    Args:
        proj: [B, T, 4E + 4N + 2S], columns z | x | B | C | dt, each for K then for V.
        conv_weight: [2E + 4N, taps], of the columns x | B | C; the last tap is the token itself.
        A: [2, S], negative rates. dt_bias, D: [2, S]. E is S heads of width E/S.
        starts: bool [T] or [B, T].
        state_dim: N.
        eps: added to the mean square.
        mask: bool [B, T], False on padding, which leaves the state as it is; None for none.
        longest: no chunk is longer than this (see Boundary.longest), which lets whole chunks be
            computed on their own. A promise that is not checked. None where nothing is known.
        backend: see attamba.ops. State and decays are float32 in all of them. Triton is one kernel
            each way where chunks of 16-bit numbers fit a tile, and a few kernels that pass states
            between tiles where they do not; in float32, with a mask, or with states too large for
            a program it is chunk_scan in Triton, and PyTorch for the rest.

    Returns y of K and y of V, each [B, T, E] in proj's dtype. Raises ValueError where shapes
    disagree.
    """
    starts = starts[None] if starts.dim() == 1 else starts
    _check(proj, conv_weight, A, dt_bias, D, starts, state_dim, mask, longest)
    chosen = choose(backend, proj.device, proj.dtype)
    inputs = (proj, conv_weight, A, dt_bias, D, starts, state_dim, eps)
    if chosen == "reference":
        y_k, y_v = compress_reference(*inputs, mask).chunk(2, -1)
        return y_k, y_v
    if chosen == "triton" and mask is None and proj.numel() > 0:
        from attamba.ops.compress.scan.triton import compress_scan, passes_states
        from attamba.ops.compress.triton import compress_triton, fits_a_tile

        if longest is not None and fits_a_tile(longest, proj.dtype):
            return compress_triton(*inputs)
        if passes_states(proj.dtype, state_dim, _inner(proj, A, state_dim) // A.shape[1]):
            return compress_scan(*inputs)
    y_k, y_v = compress_torch(*inputs, mask, scan=backend).chunk(2, -1)
    return y_k, y_v


def _inner(proj: Tensor, A: Tensor, state_dim: int) -> int:
    """E, of the columns 4E + 4N + 2S."""
    return (proj.shape[-1] - 4 * state_dim - 2 * A.shape[-1]) // 4


def _check(
    proj: Tensor,
    conv_weight: Tensor,
    A: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    starts: Tensor,
    state_dim: int,
    mask: Tensor | None,
    longest: int | None,
) -> None:
    batch, seq, width = proj.shape
    heads, inner = A.shape[-1], _inner(proj, A, state_dim)
    if 4 * inner + 4 * state_dim + 2 * heads != width or inner < heads or inner % heads:
        raise ValueError(
            f"proj has {width} columns, which are not 4E + 4N + 2S with N={state_dim}, S={heads} "
            f"and E a multiple of S"
        )
    shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "A": (A, [(2, heads)]),
        "dt_bias": (dt_bias, [(2, heads)]),
        "D": (D, [(2, heads)]),
        "conv_weight": (conv_weight, [(2 * inner + 4 * state_dim, conv_weight.shape[-1])]),
        "starts": (starts, [(1, seq), (batch, seq)]),
        "mask": (mask, [(batch, seq)]),
    }
    for name, (tensor, allowed) in shapes.items():
        if tensor is not None and tuple(tensor.shape) not in allowed:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {list(allowed[-1])} "
                f"for proj of shape {list(proj.shape)}"
            )
    if longest is not None and longest < 1:
        raise ValueError(f"longest={longest} must be at least 1, or None where nothing is known")
