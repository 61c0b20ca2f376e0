"""Mixer "attamba": attention over chunk states plus the last tokens (arXiv 2411.17685).

    q = Wq u,   k = r_k(u) + SSM_k(u),   v = r_v(u) + SSM_v(u)
    y = softmax(RoPE(q) RoPE(k)^T / sqrt(D) + M) v

Shapes: B batch, T tokens, d model width, H query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attamba.config import AttambaMixer
from attamba.modules.cache import KVCache, LayerCache
from attamba.modules.compressor import Compressors
from attamba.modules.layers import Rotary, linear, rotate
from attamba.modules.mixer import TimeMixer
from attamba.ops import chunk_attention
from attamba.ops.chunking import Span, chunk_starts, make_boundary, normalize_ends


class ChunkAttention(TimeMixer):
    """One Attamba mixer. Its chunk ends follow from the config and the layer's place."""

    def __init__(
        self,
        config: AttambaMixer,
        dim: int,
        rope_theta: float,
        norm_eps: float,
        layer_idx: int,
        n_layers: int,
    ) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.head_dim = config.head_dim or dim // config.n_heads
        self.lead, self.backend = config.leading_tokens, config.backend
        self.resets = config.ssm_scope == "chunk"
        self.boundary = make_boundary(
            config.boundary,
            chunk_size=config.chunk_size,
            layer_idx=layer_idx,
            n_layers=n_layers,
            n_kv_heads=self.n_kv_heads,
            sink=config.sink,
        )
        kv_width = self.n_kv_heads * self.head_dim
        self.wq = linear(dim, self.n_heads * self.head_dim)
        self.wkv = linear(dim, 2 * kv_width) if config.kv_proj else None
        self.compressors = Compressors(
            dim,
            kv_width,
            config.ssm_dim or dim // 2,
            config.state_dim,
            config.ssm_heads,
            config.conv_width,
            norm_eps,
            config.backend,
        )
        self.wo = linear(self.n_heads * self.head_dim, dim)
        self.rotary = Rotary(self.head_dim, rope_theta)

    def forward(
        self, x: Tensor, span: Span, cache: LayerCache | None = None, given: Tensor | None = None
    ) -> Tensor:
        """x: [B, T, d] -> [B, T, d]. given: bool [B or 1, G or 1, T] for boundary "given"."""
        if given is not None:
            normalize_ends(given, x.shape[0], self.n_kv_heads, x.shape[1])
        ends, carry = self.boundary(span, None if cache is None else cache.carry, given)
        q, k, v = self.project(x, ends, span, cache)
        if cache is None:
            y = chunk_attention(q, k, v, ends, self.lead, span.doc_ids, backend=self.backend)
        else:
            cache.carry = carry
            y = cache.kv.attend(q, k, v, ends, span, self.lead, self.backend)
        return self.wo(y.flatten(2))

    def project(
        self, x: Tensor, ends: Tensor, span: Span, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, G, D], positions applied."""
        q = self.wq(x).unflatten(-1, (self.n_heads, self.head_dim))
        state = None if cache is None else cache.state
        k, v = self.compressors(x, self._starts(ends, span, cache), span, state)
        if self.wkv is None:
            k, v = x + k, x + v
        else:
            k_direct, v_direct = self.wkv(x).chunk(2, -1)
            k, v = k_direct + k, v_direct + v
        k, v = (t.to(q.dtype).unflatten(-1, (self.n_kv_heads, self.head_dim)) for t in (k, v))
        rotary = self.rotary(span)
        return rotate(q, rotary), rotate(k, rotary), v

    def _starts(self, ends: Tensor, span: Span, cache: LayerCache | None) -> Tensor:
        """Where the compressors' state starts afresh, bool [B or 1, T]."""
        if not self.resets:
            return span.positions == 0
        if ends.shape[1] != 1:
            raise ValueError(
                f"ends differ between heads (shape {list(ends.shape)}), but ssm_scope='chunk' "
                f"resets one state for all heads; set mixer.ssm_scope=sequence"
            )
        return chunk_starts(ends, span, None if cache is None else cache.kv.last_end)

    def new_cache(self, batch: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        if not self.boundary.causal:
            raise ValueError(
                f"boundary={self.boundary.name!r} chooses chunk ends from later tokens, so it "
                f"cannot decode; load the model with a causal policy, e.g. mixer.boundary=cyclic"
            )
        window = None if self.lead is None else self.lead + 1
        per_head = self.boundary.per_head and not self.resets
        kv = KVCache(batch, self.n_kv_heads, self.head_dim, window, per_head, dtype, device)
        return LayerCache(kv, self.compressors.new_state(batch, dtype, device), self.boundary)
