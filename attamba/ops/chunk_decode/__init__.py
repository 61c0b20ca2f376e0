"""One decoding step: attention over what a layer holds, and the compressors' recurrence.

Both update what they are given in place of the caller, which is how a step on a GPU needs no word
from the host. They are for inference: backend "triton" computes no gradients.
"""

from __future__ import annotations

from torch import Tensor, cat  # `torch` here is the submodule of that name, once imported

from attamba.ops.backends import choose
from attamba.ops.chunk_decode.blocks import PAGE, Blocks
from attamba.ops.chunk_decode.compress import CompressorWeights, compress_step
from attamba.ops.chunk_decode.held import Held
from attamba.ops.rotary import rotate

__all__ = [
    "PAGE",
    "Blocks",
    "CompressorWeights",
    "Held",
    "attend_step",
    "compress_step",
]


def attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    lengths: Tensor,
    *,
    ends: Tensor | None = None,
    mask: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    more: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Hold one more token per row, then attend from it to all that is held.

    The entry that leaves the ring moves to the past if it ends a chunk for its head and is
    forgotten otherwise; the new token takes its place (arXiv 2411.17685, section 3).

    Args:
        q: [B, H, D], k, v: [B, G, D], H a multiple of G; before rotary positions.
        held: updated in place. Backend "triton" needs room for one more entry of the ring and of
            the past, see Held.reserve; "torch" makes room itself.
        lengths: int64 [B], tokens that each row held before; the caller counts on.
        ends: bool [B or 1, G or 1], does the new token end a chunk? None: no chunks at all, and
            none of the ring's entries ends one.
        mask: bool [B], False for rows that take no token: they stay as they are, and what is
            returned for them is finite and means nothing. Default: all rows take one.
        rotary: cosine and sine, float32 [B or 1, 1, D/2], applied to q and k. Default: none.
        more: two tensors [B, G, D] to add to k and v first. Default: none. "triton" then reads q, k
            and v while the kernel before it may still run: that one may make `more`, not them.
        backend: see attamba.ops. Scores and softmax are float32 in all of them.

    Returns [B, H, D] in q's dtype. Raises ValueError where shapes disagree.
    """
    backend = choose(backend, q.device, held.blocks.dtype)
    _check(q, k, v, held, lengths, ends, mask)
    _check_added(k, rotary, more)
    if backend == "triton":
        from attamba.ops.chunk_decode.triton import attend_step_triton

        return attend_step_triton(q, k, v, held, lengths, ends, mask, rotary, more)
    if more is not None:
        k, v = k + more[0], v + more[1]
    if rotary is not None:
        both = rotate(cat([q, k.to(q.dtype)], 1), rotary)
        q, k = both.split([q.shape[1], k.shape[1]], 1)
    if backend == "reference":
        from attamba.ops.chunk_decode.reference import attend_step_reference

        return attend_step_reference(q, k, v, held, lengths, ends, mask)
    from attamba.ops.chunk_decode.torch import attend_step_torch

    return attend_step_torch(q, k, v, held, lengths, ends, mask)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    lengths: Tensor,
    ends: Tensor | None,
    mask: Tensor | None,
) -> None:
    batch, heads, width = held.blocks.shape
    if k.shape != (batch, heads, width) or v.shape != k.shape:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must both be [B, G, D] = "
            f"{[batch, heads, width]}, as what is held"
        )
    if q.dim() != 3 or q.shape[0] != batch or q.shape[2] != width or q.shape[1] % heads:
        raise ValueError(
            f"q has shape {list(q.shape)}; it must be [{batch}, H, {width}] with H a multiple of "
            f"the {heads} heads of k"
        )
    for name, tensor in (("lengths", lengths), ("mask", mask)):
        if tensor is not None and tensor.shape != (batch,):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {[batch]}")
    if ends is not None and (
        ends.dim() != 2 or ends.shape[0] not in (1, batch) or ends.shape[1] not in (1, heads)
    ):
        raise ValueError(
            f"ends has shape {list(ends.shape)}; it must be [B or 1, G or 1] "
            f"with B={batch}, G={heads}"
        )


def _check_added(
    k: Tensor, rotary: tuple[Tensor, Tensor] | None, more: tuple[Tensor, Tensor] | None
) -> None:
    batch, _, width = k.shape
    for tensor in more or ():
        if tensor.shape != k.shape:
            raise ValueError(f"more has {list(tensor.shape)}, expected {list(k.shape)} as k")
    for tensor in rotary or ():
        if tensor.shape not in ((1, 1, width // 2), (batch, 1, width // 2)):
            raise ValueError(
                f"rotary has {list(tensor.shape)}, expected [B or 1, 1, D/2] with B={batch}, "
                f"D={width}"
            )
