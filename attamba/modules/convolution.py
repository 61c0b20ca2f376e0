"""A causal depthwise convolution that sees nothing of earlier documents and goes on from a state.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attamba.modules.cache import ScanState
from attamba.ops.chunking import Span
from attamba.ops.compress.stages import causal_conv, segments
from attamba.ops.shared_rows import padded


class CausalConv(nn.Module):
    """out_t = bias + sum over i of weight_i x_(t-i), drawn as torch.nn.Conv1d does.

    width: taps, the current token's included.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, starts: Tensor, span: Span, state: ScanState | None) -> Tensor:
        """x: [B, T, channels], starts: bool [B or 1, T] -> [B, T, channels]."""
        if state is None:
            inputs = padded(x, span, self.weight.shape[1] - 1)
            out = causal_conv(inputs, self.weight, starts)
        else:
            out = convolve(x, self.weight, starts, span, state)
        return out + self.bias.to(out.dtype)

    def new_state(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The inputs before the first token: zeros [B, width-1, channels]."""
        channels, width = self.weight.shape
        return torch.zeros(batch, width - 1, channels, dtype=dtype, device=device)


def convolve(x: Tensor, weight: Tensor, starts: Tensor, span: Span, state: ScanState) -> Tensor:
    """The convolution of inputs that follow a state's; updates it. x: [B, T, channels].

    weight: [channels, width]. Padded tokens leave the state as it is.
    """
    reach, seq = weight.shape[1] - 1, x.shape[1]
    inputs = _join(state.conv, x, span)
    segment = segments(starts, reach)
    alive = segment[:, seq:] == segment[:, -1:]
    out = causal_conv(inputs, weight, starts)
    state.update(conv=inputs[:, seq:] * alive[..., None])
    return out


def _join(carried: Tensor, x: Tensor, span: Span) -> Tensor:
    """[carried | x] along time, each row's padding moved to its left so that the two touch."""
    joined = torch.cat([carried.to(x.dtype), x], 1)
    if span.n_pad is None:
        return joined
    column = torch.arange(joined.shape[1], device=x.device)
    n_pad = span.n_pad[:, None]
    source = torch.where(column < n_pad + carried.shape[1], column - n_pad, column).clamp(min=0)
    return joined.gather(1, source[..., None].expand(-1, -1, x.shape[2]))
