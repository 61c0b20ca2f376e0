"""The scan as matrix products over tiles of tokens; no loop over tokens.

Within a tile the recurrence is a masked product, as in Mamba-2's "state-space duality"
(arXiv 2405.21060, section 6). States pass between tiles by the same rule, applied to tiles of
tiles, so the depth is the logarithm of T. Decays are differences of short cumulative sums inside
one tile, in fp32, which keeps them exact at any T.

Shapes: B batch, T tokens, n tiles of Q tokens, S heads, K groups of R heads, N state, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 32


def chunk_scan_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See chunk_scan; B and C are [B, T, K, N], starts is [B or 1, T]."""
    batch, seq, heads, width = x.shape
    state_dim = B.shape[3]
    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, state_dim, width, dtype=torch.float32)
    if seq == 0:
        return x, initial_state.float()
    with torch.autocast(x.device.type, enabled=False):
        dt = dt.float()
        if seq == 1:
            y, state = _step(x, dt, A, B, C, starts, initial_state)
        else:
            y, state = _tiles(x, dt, A, B, C, starts, initial_state)
        if D is not None:
            y = y + D.float()[:, None] * x.float()
        return y.to(x.dtype), state


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself."""
    batch, _, heads, width = x.shape
    groups, state_dim = B.shape[2:]
    decay = torch.exp(A.float() * dt[:, 0]).masked_fill(starts, 0.0)
    xdt = (x.float() * dt[..., None]).reshape(batch, groups, 1, -1)
    update = B.float().view(batch, groups, state_dim, 1) * xdt  # [B, K, N, R*W]
    update = update.view(batch, groups, state_dim, -1, width).transpose(2, 3)
    state = torch.addcmul(
        update.reshape(batch, heads, state_dim, width), decay[..., None, None], state
    )
    per_head = state.view(batch, groups, -1, state_dim, width)
    y = C.float().view(batch, groups, 1, 1, state_dim) @ per_head
    return y.view(batch, 1, heads, width), state


def _tiles(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    batch, seq, heads, width = x.shape
    groups, state_dim = B.shape[2:]
    tile = min(TILE, seq)
    xdt = _tile(x.float() * dt[..., None], tile)  # [B, n, Q, S, W]
    B, C = (_tile(t.float(), tile).transpose(2, 3) for t in (B, C))  # [B, n, K, Q, N]
    decay = _Decay(_tile(dt * A.float(), tile), _tile(starts, tile))
    n = xdt.shape[1]

    scores = (C @ B.transpose(-1, -2)).unsqueeze(3)  # [B, n, K, 1, Q, Q]
    mixing = decay.within().view(batch, n, groups, -1, tile, tile) * scores
    xdt = xdt.view(batch, n, tile, groups, -1, width).permute(0, 1, 3, 4, 2, 5)
    y = mixing @ xdt  # [B, n, K, R, Q, W]

    to_end = decay.to_end().view(batch, n, groups, -1, tile, 1)
    ending = B.transpose(-1, -2).unsqueeze(3) @ (to_end * xdt)  # [B, n, K, R, N, W]
    states = _carry(
        decay.total(),
        decay.resets(),
        ending.reshape(batch, n, heads, -1),
        initial_state.float().reshape(batch, heads, -1),
    )
    entering = torch.cat([initial_state.float().reshape(batch, 1, heads, -1), states[:, :-1]], 1)
    from_start = decay.from_start().view(batch, n, groups, -1, tile, 1)
    entering = entering.view(batch, n, groups, -1, state_dim, width)
    y = y + from_start * (C.unsqueeze(3) @ entering)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, n * tile, heads, width)
    return y[:, :seq], states[:, -1].reshape(batch, heads, state_dim, width)


def _carry(log_a: Tensor, starts: Tensor, update: Tensor, initial: Tensor) -> Tensor:
    """h_i = exp(log_a_i) h_(i-1) + update_i, h_(i-1) zero where starts_i.

    log_a: [B, n, S], starts: bool [B or 1, n], update: [B, n, S, F], initial: [B, S, F].
    Returns h: [B, n, S, F].
    """
    batch, seq, heads, _ = update.shape
    tile = min(TILE, seq)
    decay = _Decay(_tile(log_a, tile), _tile(starts, tile))
    local = decay.within() @ _tile(update, tile).transpose(2, 3)  # [B, n/Q, S, Q, F]
    n = local.shape[1]
    if n == 1:
        entering = initial[:, None]
    else:
        after = _carry(decay.total(), decay.resets(), local[..., -1, :], initial)
        entering = torch.cat([initial[:, None], after[:, :-1]], 1)
    states = local + decay.from_start()[..., None] * entering[..., None, :]
    return states.transpose(2, 3).reshape(batch, n * tile, heads, -1)[:, :seq]


class _Decay:
    """Products of decays inside tiles, zero across a start.

    log_a: float32 [B, n, Q, S], starts: bool [B or 1, n, Q].
    """

    def __init__(self, log_a: Tensor, starts: Tensor) -> None:
        self.cum = log_a.cumsum(2).transpose(2, 3)  # [B, n, S, Q]
        self.segment = starts.long().cumsum(2)[:, :, None]  # [B or 1, n, 1, Q]

    def within(self) -> Tensor:
        """From token s to token t >= s of one tile, [B, n, S, Q, Q]."""
        difference = self.cum[..., :, None] - self.cum[..., None, :]
        same = self.segment[..., :, None] == self.segment[..., None, :]
        return difference.masked_fill(~same.tril(), float("-inf")).exp()

    def from_start(self) -> Tensor:
        """From the state that enters the tile to token t, [B, n, S, Q]."""
        return self.cum.masked_fill(self.segment > 0, float("-inf")).exp()

    def to_end(self) -> Tensor:
        """From token s to the end of its tile, [B, n, S, Q]."""
        last = self.segment == self.segment[..., -1:]
        return (self.cum[..., -1:] - self.cum).masked_fill(~last, float("-inf")).exp()

    def total(self) -> Tensor:
        """Logarithm of the decay over the whole tile, [B, n, S]; see resets."""
        return self.cum[..., -1]

    def resets(self) -> Tensor:
        """Does a chunk start in the tile? bool [B or 1, n]."""
        return self.segment[:, :, 0, -1] > 0


def _tile(t: Tensor, tile: int) -> Tensor:
    """[B, T, ...] -> [B, n, Q, ...], filled up with zeros (which neither decay nor update)."""
    missing = -t.shape[1] % tile
    if missing:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    return t.unflatten(1, (-1, tile))
