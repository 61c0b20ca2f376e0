"""Mixer "attamba": attention over chunk states plus the last tokens (arXiv 2411.17685).

    q = Wq u,   k = r_k(u) + SSM_k(u),   v = r_v(u) + SSM_v(u)
    y = softmax(RoPE(q) RoPE(k)^T / sqrt(D) + M) v

Shapes: B batch, T tokens, d model width, H query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.config import AttambaMixer
from attamba.modules.cache import LayerCache
from attamba.modules.compressor import Compressors
from attamba.modules.kv_cache import KVCache, attend_token
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
        if cache is not None and x.shape[1] == 1:
            y = self._step(x, ends, span, cache)
            cache.keep(carry)
            return self.wo(y)
        q, k, v = self.project(x, ends, span, cache)
        if cache is None:
            y = chunk_attention(q, k, v, ends, self.lead, span.doc_ids, backend=self.backend)
        else:
            cache.keep(carry)
            y = cache.kv.attend(q, k, v, ends, span, self.lead)
        return self.wo(y.flatten(2))

    def _step(self, x: Tensor, ends: Tensor, span: Span, cache: LayerCache) -> Tensor:
        """One token after those in the cache, [B, 1, d] -> [B, 1, H * D]."""
        assert cache.state is not None
        starts = None  # a state of whole sequences starts from its zeros
        if self.resets:
            self._check_shared(ends)
            starts = cache.kv.last_end
        q, for_state, kv = self._projected(x, cache.stacked)
        more = self.compressors.step(for_state[:, 0], starts, span, cache.state)
        k, v = (x, x) if kv is None else kv.chunk(2, -1)
        q = q.unflatten(-1, (self.n_heads, self.head_dim))
        shape = (self.n_kv_heads, self.head_dim)
        k, v = k.to(q.dtype).unflatten(-1, shape), v.to(q.dtype).unflatten(-1, shape)
        added = (more[0].unflatten(-1, shape), more[1].unflatten(-1, shape))
        return attend_token(q, k, v, ends, self.rotary(span), span, cache.kv, added)

    def _projected(self, x: Tensor, stacked: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Wq x, the compressors' input projection of x, and Wkv x where there is one."""
        if stacked is None:
            kv = None if self.wkv is None else self.wkv(x)
            return self.wq(x), self.compressors.in_proj(x), kv
        widths = [self.wq.out_features, self.compressors.in_proj.out_features]
        y = F.linear(x, stacked)
        q, for_state, kv = y.split([*widths, y.shape[-1] - sum(widths)], -1)
        return q, for_state, None if self.wkv is None else kv

    def stacked_projections(self) -> Tensor:
        weights = [self.wq.weight, self.compressors.in_proj.weight]
        return torch.cat(weights if self.wkv is None else [*weights, self.wkv.weight]).detach()

    def project(
        self, x: Tensor, ends: Tensor, span: Span, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, G, D], positions applied."""
        q = self.wq(x).unflatten(-1, (self.n_heads, self.head_dim))
        state = None if cache is None else cache.state
        longest = self.boundary.longest if self.resets else None
        k, v = self.compressors(x, self._starts(ends, span, cache), span, state, longest)
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
        self._check_shared(ends)
        return chunk_starts(ends, span, None if cache is None else cache.kv.last_end)

    def _check_shared(self, ends: Tensor) -> None:
        if ends.shape[1] != 1:
            raise ValueError(
                f"ends differ between heads (shape {list(ends.shape)}), but ssm_scope='chunk' "
                f"resets one state for all heads; set mixer.ssm_scope=sequence"
            )

    def new_cache(self, batch: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        if not self.boundary.causal:
            raise ValueError(
                f"boundary={self.boundary.name!r} chooses chunk ends from later tokens, so it "
                f"cannot decode; load the model with a causal policy, e.g. mixer.boundary=cyclic"
            )
        window = None if self.lead is None else self.lead + 1
        per_head = self.boundary.per_head and not self.resets
        kv = KVCache(
            batch, self.n_kv_heads, self.head_dim, window, per_head, dtype, device, self.backend
        )
        return LayerCache(kv, self.compressors.new_state(batch, dtype, device), self.boundary)
