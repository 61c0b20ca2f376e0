"""State-space scan whose state starts afresh where chunks or documents start."""

from __future__ import annotations

from torch import Tensor

from attamba.ops.backends import choose, shared_memory
from attamba.ops.chunk_scan.reference import chunk_scan_reference
from attamba.ops.chunk_scan.torch import chunk_scan_torch


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba-2 (arXiv 2405.21060, section 7) with resets.

        h_t = exp(A dt_t) h_(t-1) + dt_t B_t x_t^T,   y_t = C_t h_t + D x_t

    and h_(t-1) is taken as zero where t starts a chunk.

    Args:
        x: [B, T, S, W], input of S heads of width W, any float dtype.
        dt: [B, T, S], step sizes, not negative. Zero freezes the state (padding).
        A: [S], negative rates.
        B, C: [B, T, N] shared by all heads, or [B, T, K, N] for K groups of S/K heads.
        starts: bool [T] or [B, T].
        D: [S], skip; None for none.
        initial_state: float32 [B, S, N, W]; None for zeros.
        return_final_state: also return h after the last token, float32 [B, S, N, W].
        backend: see attamba.ops. State and decays are float32 in all of them. A single token
            is a handful of small products and never goes to Triton, nor do with "auto" states that
            are too large for the device's shared memory.

    Returns y, like x, and the final state if asked for. Raises ValueError where shapes disagree,
    and for backend "triton" and states that are too large.
    """
    chosen = choose(backend, x.device, x.dtype)
    batch, seq, heads, width = x.shape
    B, C = (t[:, :, None] if t.dim() == 3 else t for t in (B, C))
    groups, state_dim = B.shape[2:]
    starts = starts[None] if starts.dim() == 1 else starts
    shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "dt": (dt, [(batch, seq, heads)]),
        "A": (A, [(heads,)]),
        "B": (B, [(batch, seq, groups, state_dim)]),
        "C": (C, [(batch, seq, groups, state_dim)]),
        "starts": (starts, [(1, seq), (batch, seq)]),
        "D": (D, [(heads,)]),
        "initial_state": (initial_state, [(batch, heads, state_dim, width)]),
    }
    for name, (tensor, allowed) in shapes.items():
        if tensor is not None and tuple(tensor.shape) not in allowed:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {list(allowed[-1])} "
                f"for x of shape {list(x.shape)}"
            )
    if heads % groups:
        raise ValueError(f"B has {groups} groups, which do not divide the {heads} heads of x")
    inputs = (x, dt, A, B, C, starts, D, initial_state)
    if chosen == "reference":
        y, state = chunk_scan_reference(*inputs)
    elif chosen == "triton" and batch and seq > 1 and _fits(x, state_dim, backend):
        from attamba.ops.chunk_scan.triton import chunk_scan_triton

        y, state = chunk_scan_triton(*inputs)
    else:
        y, state = chunk_scan_torch(*inputs)
    return (y, state) if return_final_state else y


def _fits(x: Tensor, state_dim: int, backend: str) -> bool:
    """Do states of this size fit Triton's kernels? Raises ValueError where it must be Triton."""
    from attamba.ops.chunk_scan.triton import tile_tokens

    width = x.shape[-1]
    if tile_tokens(x.dtype, state_dim, width, shared_memory(x.device)) is not None:
        return True
    if backend == "triton":
        raise ValueError(
            f"backend='triton' cannot scan states of {state_dim} x {width} here, which need more "
            f"shared memory than {x.device} has; use backend='auto', more heads or a smaller state"
        )
    return False
