"""The decode step as plain loops in float32. Shares with the others the storage alone."""

from __future__ import annotations

import torch
from torch import Tensor

from attamba.ops.chunk_decode.compress import CompressorWeights
from attamba.ops.chunk_decode.held import Held


def attend_step_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    lengths: Tensor,
    ends: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """See attend_step; rotary positions are applied and `more` is added."""
    batch, groups, width = k.shape
    out = torch.zeros_like(q)
    for b in range(batch):
        length = int(lengths[b])
        takes = mask is None or bool(mask[b])
        for g in range(groups):
            is_end = ends is not None and bool(ends.expand(batch, groups)[b, g])
            entries = _entries(held, b, g, length)
            if takes:
                entries.append((k[b, g].to(held.blocks.dtype), v[b, g].to(held.blocks.dtype)))
                _store(held, b, g, length, entries[-1], is_end)
                if held.window is not None and length >= held.window:
                    entries = _entries(held, b, g, length + 1)
            if not entries:
                continue
            keys = torch.stack([key for key, _ in entries]).float()
            values = torch.stack([value for _, value in entries]).float()
            per_group = q.shape[1] // groups
            for head in range(g * per_group, (g + 1) * per_group):
                weights = torch.softmax(keys @ q[b, head].float() * width**-0.5, 0)
                out[b, head] = (weights @ values).to(out.dtype)
        if takes and ends is not None:
            held.last_end[b] = ends.expand(batch, groups)[b, 0]
    held.known_past = None
    return out


def _entries(held: Held, b: int, g: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of one row and head after `length` tokens, copied."""
    ring = length if held.window is None else min(length, held.window)
    found = []
    for entry in range(ring + int(held.n_past[b, g])):
        block, at = held.blocks.locate(entry)
        found.append(
            (held.blocks.k[block][b, g, at].clone(), held.blocks.v[block][b, g, at].clone())
        )
    return found


def _store(
    held: Held, b: int, g: int, length: int, new: tuple[Tensor, Tensor], is_end: bool
) -> None:
    """Write one entry of one row and head; the one in its place moves or is forgotten."""

    def write(entry: int, pair: tuple[Tensor, Tensor]) -> None:
        held.reserve(entry + 1)
        block, at = held.blocks.locate(entry)
        held.blocks.k[block][b, g, at] = pair[0]
        held.blocks.v[block][b, g, at] = pair[1]

    if held.window is None:
        write(length, new)
        return
    slot = length % held.window
    if length >= held.window and held.ring_ends[b, g, slot]:
        old = held.blocks.k[0][b, g, slot].clone(), held.blocks.v[0][b, g, slot].clone()
        write(held.window + int(held.n_past[b, g]), old)
        held.n_past[b, g] += 1
    write(slot, new)
    held.ring_ends[b, g, slot] = is_end


def compress_step_reference(
    projected: Tensor,
    h: Tensor,
    conv: Tensor,
    weights: CompressorWeights,
    starts: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See compress_step; row by row, compressor by compressor, head by head."""
    batch, heads, state, width = h.shape
    inner, half = heads * width // 2, heads // 2
    channels = conv.shape[2]
    y, h, conv = projected.new_zeros(batch, 2, inner), h.clone(), conv.clone()
    for b in range(batch):
        goes_on = mask is None or bool(mask[b])
        if goes_on and starts is not None and starts[b]:
            h[b], conv[b] = 0, 0
        row = projected[b].float()
        new = row[2 * inner : 2 * inner + channels]
        inputs = torch.cat([conv[b].float(), new[None]])
        mixed = (inputs * weights.conv.float().t()).sum(0)
        mixed = mixed * torch.sigmoid(mixed)
        for part in range(2):
            at = 2 * inner + part * state
            B, C = mixed[at : at + state], mixed[at + 2 * state : at + 3 * state]
            out = torch.zeros(inner)
            for s in range(half):
                head = part * half + s
                x = mixed[part * inner + s * width : part * inner + (s + 1) * width]
                raw = row[2 * inner + channels + head] + weights.dt_bias.flatten()[head].float()
                dt = torch.log1p(torch.exp(raw))
                decay = torch.exp(-torch.exp(weights.A_log.flatten()[head].float()) * dt)
                now = decay * h[b, head] + dt * torch.outer(B, x)
                if goes_on:
                    h[b, head] = now
                out[s * width : (s + 1) * width] = (
                    C @ now + weights.D_skip.flatten()[head].float() * x
                )
            z = row[part * inner : (part + 1) * inner]
            y[b, part] = (out * z * torch.sigmoid(z)).to(y.dtype)
        if goes_on:
            conv[b] = inputs[1:].to(conv.dtype)
    return y, h, conv
