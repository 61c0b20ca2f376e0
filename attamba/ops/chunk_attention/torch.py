"""Chunk attention in PyTorch on gathered chunk ends plus a band; any device, with gradients.

Queries are taken in blocks. A block sees [the chunk ends before its window | its band of recent
keys], all that it attends to, so scores are never larger than block x (T/P + L + block); the
backward pass computes them again. It is one custom operator, opaque to torch.compile, and so free
to ask how many chunk ends there are.

Shapes: B batch, G key/value heads, R query heads per key/value head, D width, W queries of a
block, M chunk ends, n those of them that a block sees, w keys of its band.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.ops.chunking import document_starts

BLOCK = {"cpu": 128, "cuda": 512}
"""Queries of a block: a CPU wants scores that stay in its cache, a GPU few and large launches."""

MASKED = 1024
"""Queries that plain attention takes at once where it needs a mask."""

UNBOUNDED = -1  # leading_tokens=None inside the operator, which takes plain integers


def chunk_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    leading_tokens: int | None,
    doc_ids: Tensor | None,
    scale: float,
) -> Tensor:
    """See chunk_attention; ends is [B or 1, G or 1, Tk]."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if leading_tokens is None and doc_ids is None:
        qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
        return _causal(qh, kh, vh, scale).transpose(1, 2)
    lead = UNBOUNDED if leading_tokens is None else leading_tokens
    return _forward(q, k, v, ends, doc_ids, lead, scale)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """All earlier keys, by PyTorch's own attention; heads before tokens.

    The library has no kernel for queries at the end of more keys that takes no mask.
    """
    grouped = q.shape[1] != k.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=grouped)
    seen = k.shape[2] - q.shape[2]
    if seen == 0:
        return attend(q, k, v, is_causal=True)
    outputs = []
    for block in q.split(MASKED, 2):
        earlier, seen = seen, seen + block.shape[2]
        mask = q.new_ones(block.shape[2], seen, dtype=torch.bool).tril(earlier)
        outputs.append(attend(block, k[:, :, :seen], v[:, :, :seen], attn_mask=mask))
    return torch.cat(outputs, 2)


@torch.library.custom_op("attamba::chunk_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, doc_ids: Tensor | None, lead: int, scale: float
) -> Tensor:
    heads = _Heads(q, k, v)
    past = _Past(ends, k.shape[1])
    k_past, v_past = past.gather(heads.k), past.gather(heads.v)
    out = torch.empty_like(heads.q)
    for block in _blocks(q, past, doc_ids, lead):
        weights = heads.weights(block, block.keys(heads.k, k_past), scale)
        out[..., block.queries, :] = heads.join(_mm(weights, block.keys(heads.v, v_past)))
    return out.flatten(1, 2).transpose(1, 2).contiguous()


@torch.library.custom_op("attamba::chunk_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    doc_ids: Tensor | None,
    out: Tensor,
    lead: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _Heads(q, k, v)
    past = _Past(ends, k.shape[1])
    k_past, v_past = past.gather(heads.k), past.gather(heads.v)
    d_out, out = (t.transpose(1, 2).reshape(heads.q.shape) for t in (d_out, out))
    dq = torch.empty_like(heads.q)
    dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (heads.k, heads.v))
    dk_past, dv_past = (torch.zeros_like(t, dtype=torch.float32) for t in (k_past, v_past))
    for block in _blocks(q, past, doc_ids, lead):
        keys, values = block.keys(heads.k, k_past), block.keys(heads.v, v_past)
        weights = heads.weights(block, keys, scale)
        dy, y = (heads.split(t[..., block.queries, :]) for t in (d_out, out))
        block.add(dv, dv_past, _mm(weights.transpose(-1, -2), dy))
        slope = _mm(dy, values.transpose(-1, -2))
        slope = slope.sub_((dy.float() * y.float()).sum(-1, keepdim=True)).mul_(weights)
        dq[..., block.queries, :] = heads.join(_mm(slope, keys) * scale)
        queries = heads.split(heads.q[..., block.queries, :])
        block.add(dk, dk_past, _mm(slope.transpose(-1, -2), queries) * scale)
    past.scatter_add(dk, dk_past)
    past.scatter_add(dv, dv_past)
    dq = dq.flatten(1, 2).transpose(1, 2).contiguous()
    dk, dv = (t.transpose(1, 2).to(k.dtype).contiguous() for t in (dk, dv))
    return dq, dk, dv


@_forward.register_fake
def _(q, k, v, ends, doc_ids, lead, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(d_out, q, k, v, ends, doc_ids, out, lead, scale):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, ends, doc_ids, ctx.lead, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, ends, doc_ids, output)


def _grad(ctx, d_out):
    q, k, v, ends, doc_ids, out = ctx.saved_tensors
    dq, dk, dv = _backward(d_out, q, k, v, ends, doc_ids, out, ctx.lead, ctx.scale)
    return dq, dk, dv, None, None, None, None


_forward.register_autograd(_grad, setup_context=_save)


class _Heads:
    """q as [B, G, R, Tq, D], k and v as [B, G, Tk, D]; a block's queries as [B, G, R*W, D]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.q = q.transpose(1, 2).unflatten(1, (k.shape[2], -1)).contiguous()
        self.k, self.v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        self.repeats = self.q.shape[2]

    def split(self, t: Tensor) -> Tensor:
        return t.flatten(2, 3)

    def join(self, t: Tensor) -> Tensor:
        return t.unflatten(2, (self.repeats, -1))

    def weights(self, block: _Block, keys: Tensor, scale: float) -> Tensor:
        """The softmax over all that a block's queries see, float32 [B, G, R*W, n + w]."""
        queries = self.split(self.q[..., block.queries, :])
        scores = _mm(queries, keys.transpose(-1, -2)).mul_(scale)
        self.join(scores).masked_fill_(block.hidden[:, :, None], float("-inf"))
        return scores.softmax(-1)


class _Past:
    """Chunk ends gathered in order of position. ends: bool [B or 1, G or 1, Tk]."""

    def __init__(self, ends: Tensor, n_keys: int) -> None:
        self.before = F.pad(ends.long().cumsum(-1), (1, 0))  # ends before here, [b, g, Tk + 1]
        self.most_before: list[int] = self.before.amax((0, 1)).tolist()  # waits for the device
        self.size = self.most_before[-1]
        slot = torch.where(ends, self.before[..., :-1], self.size)  # the rest: cut off below
        index = torch.zeros(*ends.shape[:2], self.size + 1, dtype=torch.long, device=ends.device)
        position = torch.arange(n_keys, device=ends.device).expand_as(ends)
        self.index = index.scatter_(-1, slot, position)[..., : self.size]
        self.valid = torch.arange(self.size, device=ends.device) < self.before[..., -1:]

    def gather(self, t: Tensor) -> Tensor:
        """[B, G, Tk, D] -> [B, G, M, D]; rows with fewer ends are filled up with position 0."""
        if self.index.shape[:2] == (1, 1):
            return t.index_select(2, self.index[0, 0])
        return t.gather(2, self.index[..., None].expand(*t.shape[:2], -1, t.shape[3]))

    def scatter_add(self, t: Tensor, update: Tensor) -> None:
        """Adds [B, G, M, D] onto [B, G, Tk, D] at the ends; each is met once."""
        update = update * self.valid[..., None]
        t.scatter_add_(2, self.index[..., None].expand_as(update), update)


@dataclass
class _Block:
    """One block of queries, the past and the band that it sees."""

    queries: slice
    band: slice
    n_past: int
    hidden: Tensor  # bool [b, g, W, n + w]

    def keys(self, t: Tensor, t_past: Tensor) -> Tensor:
        """[B, G, n + w, D]"""
        return torch.cat([t_past[:, :, : self.n_past], t[:, :, self.band]], 2)

    def add(self, t: Tensor, t_past: Tensor, update: Tensor) -> None:
        t_past[:, :, : self.n_past] += update[:, :, : self.n_past]
        t[:, :, self.band] += update[:, :, self.n_past :]


def _blocks(q: Tensor, past: _Past, doc_ids: Tensor | None, lead: int) -> Iterator[_Block]:
    n_queries, n_keys = q.shape[1], past.before.shape[-1] - 1
    size = BLOCK["cuda" if q.is_cuda else "cpu"]
    start = None if doc_ids is None else document_starts(doc_ids)
    for begin in range(0, n_queries, size):
        stop = min(begin + size, n_queries)
        t = torch.arange(begin, stop, device=q.device) + n_keys - n_queries  # [W]
        first, last = begin + n_keys - n_queries, stop + n_keys - n_queries
        if lead == UNBOUNDED:
            low, n_past = 0, 0
        else:
            low = max(0, first - lead)
            n_past = past.most_before[max(0, last - 1 - lead)]
        s = torch.arange(low, last, device=q.device)
        hidden = s > t[:, None]
        if lead != UNBOUNDED:
            hidden = hidden | (s < t[:, None] - lead)
        hidden = hidden[None, None]
        if start is not None:
            hidden = hidden | (s < start[:, None, first:last, None])
        if n_past:
            slot = torch.arange(n_past, device=q.device)
            unseen = slot >= past.before[..., (t - lead).clamp(min=0), None]
            if start is not None:
                own = start[:, first:last].expand(max(start.shape[0], past.before.shape[0]), -1)
                before = past.before.expand(own.shape[0], -1, -1)
                ended = before.gather(2, own[:, None].expand(-1, before.shape[1], -1))
                unseen = unseen | (slot < ended[..., None])
            shape = torch.broadcast_shapes(unseen.shape[:2], hidden.shape[:2])
            hidden = torch.cat([unseen.expand(*shape, -1, -1), hidden.expand(*shape, -1, -1)], -1)
        yield _Block(slice(begin, stop), slice(low, last), n_past, hidden)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with float32 result: [B, G, m, k] @ [B, G, k, n] -> [B, G, m, n]."""
    low = torch.bfloat16 if torch.bfloat16 in (a.dtype, b.dtype) else torch.float16
    if a.is_cuda and low in (a.dtype, b.dtype):
        a, b = a.to(low), b.to(low)
        product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, a.shape[:2])
    return a.float() @ b.float()
