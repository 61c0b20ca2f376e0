"""Mixer "transformer": softmax attention over per-token keys and values.

Shapes: B batch, T tokens, d model width, H query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attamba.config import TransformerMixer
from attamba.modules.cache import LayerCache
from attamba.modules.kv_cache import KVCache, attend_token
from attamba.modules.layers import RMSNorm, Rotary, linear, plain
from attamba.modules.mixer import AttentionInputs, TimeMixer
from attamba.ops.chunking import Span
from attamba.ops.rotary import with_positions
from attamba.ops.shared_rows import shared_attention
from attamba.ops.thin_linear import thin_linear


class Attention(TimeMixer):
    """Full or sliding-window attention; grouped-query heads; any head width.

    A sliding window is chunk attention in which no token ends a chunk.
    """

    def __init__(self, config: TransformerMixer, dim: int, rope_theta: float) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or dim // config.n_heads
        self.window, self.backend = config.window, config.backend
        # chunk attention counts the tokens before the query, `window` counts the query as well
        self.lead = None if config.window is None else config.window - 1
        self.wq = linear(dim, self.n_heads * self.head_dim)
        self.wkv = linear(dim, 2 * self.n_kv_heads * self.head_dim)
        self.wo = linear(self.n_heads * self.head_dim, dim)
        self.rotary = Rotary(self.head_dim, rope_theta)

    def forward(
        self, x: Tensor, span: Span, cache: LayerCache | None = None, given: Tensor | None = None
    ) -> Tensor:
        """x: [B, T, d] -> [B, T, d]. `given` ends do not concern this mixer."""
        q, k, v = self._project(x)
        rotary = self.rotary(span)
        kv = None if cache is None else cache.kv
        if kv is not None and x.shape[1] == 1:
            return self.wo(attend_token(q, k, v, None, rotary, span, kv))
        q, k, v = with_positions(q, k, v, rotary, backend=self.backend)
        if kv is None:
            y = shared_attention(q, k, v, None, span, self.lead, self.backend)
        else:
            y = kv.attend(q, k, v, None, span, self.lead)
        return self.wo(y.flatten(2))

    def step(
        self, x: Tensor, norm: nn.Module, span: Span, cache: LayerCache, given: Tensor | None
    ) -> Tensor:
        if not plain(norm, self.wq, self.wkv, self.wo):
            return super().step(x, norm, span, cache, given)
        assert isinstance(norm, RMSNorm) and cache.kv is not None
        rows, before = x[:, 0], norm.before()
        if cache.stacked is None:
            q = thin_linear(rows, self.wq.weight, norm=before, backend="triton")
            kv = thin_linear(rows, self.wkv.weight, norm=before, backend="triton")
        else:
            qkv = thin_linear(rows, cache.stacked, norm=before, backend="triton")
            q, kv = qkv.split([self.wq.out_features, self.wkv.out_features], -1)
        q = q[:, None].unflatten(-1, (self.n_heads, self.head_dim))
        k, v = kv[:, None].unflatten(-1, (2, self.n_kv_heads, self.head_dim)).unbind(2)
        y = attend_token(q, k, v, None, self.rotary(span), span, cache.kv)
        return thin_linear(y[:, 0], self.wo.weight, residual=rows, backend="triton")[:, None]

    def stacked_projections(self) -> Tensor | None:
        if not plain(self.wq, self.wkv):
            return None
        return torch.cat([self.wq.weight, self.wkv.weight]).detach()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, G, D], before positions."""
        q = self.wq(x).unflatten(-1, (self.n_heads, self.head_dim))
        k, v = self.wkv(x).unflatten(-1, (2, self.n_kv_heads, self.head_dim)).unbind(2)
        return q, k, v

    def attention_inputs(
        self, x: Tensor, span: Span, given: Tensor | None = None
    ) -> AttentionInputs:
        q, k, _ = with_positions(*self._project(x), self.rotary(span), backend=self.backend)
        return AttentionInputs(q, k, None, self.lead)

    def new_cache(self, batch: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        kv = KVCache(
            batch, self.n_kv_heads, self.head_dim, self.window, False, dtype, device, self.backend
        )
        return LayerCache(kv)
