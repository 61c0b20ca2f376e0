"""A first-order linear recurrence for each channel, which starts afresh where documents do."""

from __future__ import annotations

from torch import Tensor

from attamba.ops.backends import choose
from attamba.ops.linear_scan.reference import linear_scan_reference
from attamba.ops.linear_scan.torch import linear_scan_torch


def linear_scan(
    a: Tensor,
    b: Tensor,
    starts: Tensor,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = a_t h_(t-1) + b_t, where h_(t-1) is taken as zero if t starts a document.

    The recurrence of minGRU and minLSTM (arXiv 2410.01201) and of the RG-LRU (arXiv 2402.19427).

    Args:
        a: [B, T, C], decays of C channels, in [0, 1]; any float dtype (near 1 it wants float32).
        b: [B, T, C], inputs, any float dtype.
        starts: bool [T] or [B, T].
        initial_state: float32 [B, C]; None for zeros.
        return_final_state: also return h after the last token, float32 [B, C].
        backend: see attamba.ops. States are float32 in all of them. A single token is one product
            and never goes to Triton.

    Returns h, like b, and the final state if asked for. Raises ValueError where shapes disagree.
    """
    chosen = choose(backend, b.device, b.dtype)
    starts = starts[None] if starts.dim() == 1 else starts
    if b.dim() != 3:
        raise ValueError(f"b has shape {list(b.shape)}, expected [B, T, C]")
    batch, seq, channels = b.shape
    shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "a": (a, [(batch, seq, channels)]),
        "starts": (starts, [(1, seq), (batch, seq)]),
        "initial_state": (initial_state, [(batch, channels)]),
    }
    for name, (tensor, allowed) in shapes.items():
        if tensor is not None and tuple(tensor.shape) not in allowed:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {list(allowed[-1])} "
                f"for b of shape {list(b.shape)}"
            )
    if initial_state is None:
        initial_state = b.new_zeros(batch, channels).float()
    inputs = (a, b, starts, initial_state.float())
    if chosen == "reference":
        h, state = linear_scan_reference(*inputs)
    elif chosen == "triton" and seq > 1 and batch * channels > 0:
        from attamba.ops.linear_scan.triton import linear_scan_triton

        h, state = linear_scan_triton(*inputs)
    else:
        h, state = linear_scan_torch(*inputs)
    return (h, state) if return_final_state else h
