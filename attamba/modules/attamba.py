"""Mixer "attamba": attention over chunk states plus the last tokens (arXiv 2411.17685).

    q = Wq u,   k = r_k(u) + SSM_k(u),   v = r_v(u) + SSM_v(u)
    y = softmax(RoPE(q) RoPE(k)^T / sqrt(D) + M) v

Rivals in the place of SSM, see pooling: gated pooling; the mean, k = r_k(mean(u)) and v likewise.

Shapes: B batch, T tokens, d model width, H query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attamba.config import AttambaMixer
from attamba.modules.cache import LayerCache, ScanState, State
from attamba.modules.compressor import Compressors
from attamba.modules.kv_cache import KVCache, attend_token
from attamba.modules.layers import RMSNorm, Rotary, linear, plain, product
from attamba.modules.mixer import AttentionInputs, TimeMixer
from attamba.modules.pooling import GatedPooling, MeanPooling
from attamba.modules.strided import StridedCompressors
from attamba.ops.chunking import (
    FIRST_SCORES,
    Span,
    cannot_decode,
    chunk_starts,
    make_boundary,
    normalize_ends,
    row_starts,
)
from attamba.ops.first_scores import last_key_scores
from attamba.ops.rotary import with_direct, with_positions
from attamba.ops.shared_rows import shared_attention, with_open_chunk
from attamba.ops.thin_linear import Norm, normed_linear, thin_linear


class _Projected(NamedTuple):
    """A step's normed input [B, 1, d] and what is made of it: Wq u, the compressors' input
    projection, Wkv u; None where a mixer has none or makes it later."""

    u: Tensor
    q: Tensor
    for_state: Tensor | None
    kv: Tensor | None

    @classmethod
    def of(cls, u: Tensor, outputs: Sequence[Tensor]) -> _Projected:
        q, for_state, kv = (*outputs, None, None)[:3]
        assert q is not None
        return cls(u, q, for_state, kv)


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
        self.own_heads = self.own_columns = slice(None)
        """The key/value heads that are computed here, and their part of a token's G * D numbers."""
        self.lead, self.backend = config.leading_tokens, config.backend
        self.scope, self.resets = config.ssm_scope, config.ssm_scope != "sequence"
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
        self.compressors = _compressors(config, dim, kv_width, norm_eps)
        self.has_step = type(self.compressors) is Compressors
        if self.scope == "strided" and self.boundary.longest is None:
            raise ValueError(
                f"ssm_scope='strided' has a state for each place in a chunk, but chunks of "
                f"boundary={self.boundary.name!r} may have any length; use mixer.boundary=cyclic"
            )
        self.wo = linear(self.n_heads * self.head_dim, dim)
        self.rotary = Rotary(self.head_dim, rope_theta)

    def forward(
        self, x: Tensor, span: Span, cache: LayerCache | None = None, given: Tensor | None = None
    ) -> Tensor:
        """x: [B, T, d] -> [B, T, d]. given: bool [B or 1, G or 1, T] for boundary "given"."""
        given = self._taken(given, x.shape[0], span.rows.positions.shape[1])
        ends, carry = self.boundary(span.rows, None if cache is None else cache.carry, given)
        if ends.shape[1] > 1:
            ends = ends[:, self.own_heads]
        if cache is not None and x.shape[1] == 1:
            y = self._attend_token(self._products(x, cache.stacked), ends, span, cache)
            cache.keep(carry)
            return self.wo(y)
        q, k, v = self.project(x, ends, span, cache)
        if self.boundary.by_scores and self.boundary.layer_idx == 0:
            span.memo[FIRST_SCORES] = last_key_scores(q, k, row_starts(span, x.shape[0]))
        if cache is None:
            y = shared_attention(q, k, v, ends, span, self.lead, self.backend)
        else:
            assert cache.kv is not None
            cache.keep(carry)
            y = cache.kv.attend(q, k, v, ends, span, self.lead)
        return self.wo(y.flatten(2))

    def step(
        self, x: Tensor, norm: nn.Module, span: Span, cache: LayerCache, given: Tensor | None
    ) -> Tensor:
        if not self.has_step or not plain(norm, *self._into(), self.wo):
            return super().step(x, norm, span, cache, given)
        assert isinstance(norm, RMSNorm)
        ends, carry = self.boundary(span, cache.carry, self._taken(given, x.shape[0], 1))
        made = self._normed_products(x, norm.before(), cache.stacked)
        y = self._attend_token(made, ends, span, cache)
        cache.keep(carry)
        return thin_linear(y[:, 0], self.wo.weight, residual=x[:, 0], backend="triton")[:, None]

    def _taken(self, given: Tensor | None, batch: int, seq: int) -> Tensor | None:
        """The caller's ends, where this layer takes them: others choose their own."""
        if given is None or not self.boundary.takes_ends:
            return None
        normalize_ends(given, batch, self.boundary.n_kv_heads, seq)
        return given

    def _attend_token(
        self, made: _Projected, ends: Tensor, span: Span, cache: LayerCache
    ) -> Tensor:
        """One token after those in the cache, [B, 1, H * D]."""
        assert cache.kv is not None
        if self.has_step:
            assert isinstance(self.compressors, Compressors) and made.for_state is not None
            assert isinstance(cache.state, ScanState)
            starts = None  # a state of whole sequences starts from its zeros
            if self.resets:
                self._check_shared(ends)
                starts = cache.kv.last_end
            more = self._heads(
                *self.compressors.step(made.for_state[:, 0], starts, span, cache.state)
            )
            k, v = (made.u, made.u) if made.kv is None else made.kv.chunk(2, -1)
        else:
            k, v = self._keys_and_values(made.u, ends, span, cache)
            more = None
        q = made.q.unflatten(-1, (self.n_heads, self.head_dim))
        k, v = self._heads(k.to(q.dtype), v.to(q.dtype))
        return attend_token(q, k, v, ends, self.rotary(span), span, cache.kv, more)

    def _heads(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[..., G * D] -> [..., G, D]."""
        shape = (self.n_kv_heads, self.head_dim)
        return k.unflatten(-1, shape), v.unflatten(-1, shape)

    def _into(self) -> list[nn.Linear]:
        """What a step multiplies its normed input with."""
        layers = [self.wq]
        if self.has_step:
            assert isinstance(self.compressors, Compressors)
            layers += [self.compressors.in_proj] + ([] if self.wkv is None else [self.wkv])
        return layers

    def _products(self, u: Tensor, stacked: Tensor | None) -> _Projected:
        """u: [B, 1, d], normed."""
        if stacked is None:
            return _Projected.of(u, [layer(u) for layer in self._into()])
        widths = [layer.out_features for layer in self._into()]
        return _Projected.of(u, product(u, stacked).split(widths, -1))

    def _normed_products(self, x: Tensor, norm: Norm, stacked: Tensor | None) -> _Projected:
        """x: [B, 1, d], before the norm; in kernels."""
        layers = self._into()
        first, *others = [layer.weight for layer in layers] if stacked is None else [stacked]
        made, u = normed_linear(x[:, 0], first, norm, backend="triton")
        outputs = [made, *(thin_linear(x[:, 0], w, norm=norm, backend="triton") for w in others)]
        if stacked is not None:
            outputs = list(made.split([layer.out_features for layer in layers], -1))
        return _Projected.of(u[:, None], [output[:, None] for output in outputs])

    def stacked_projections(self) -> Tensor | None:
        if not self.has_step or not plain(*self._into()):
            return None
        return torch.cat([layer.weight for layer in self._into()]).detach()

    def project(
        self, x: Tensor, ends: Tensor, span: Span, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, D], keys and values [B, T, G, D], positions applied."""
        q = self.wq(x).unflatten(-1, (self.n_heads, self.head_dim))
        k, v, direct = self._parts(x, ends, span, cache)
        direct = None if direct is None else direct.to(q.dtype)
        return with_positions(
            q, k.to(q.dtype), v.to(q.dtype), self.rotary(span), direct, self.backend
        )

    def attention_inputs(
        self, x: Tensor, span: Span, given: Tensor | None = None
    ) -> AttentionInputs:
        given = self._taken(given, x.shape[0], span.rows.positions.shape[1])
        ends, _ = self.boundary(span.rows, None, given)
        if ends.shape[1] > 1:
            ends = ends[:, self.own_heads]
        q, k, _ = self.project(x, ends, span)
        if span.ranks is not None:
            ends = ends[..., span.ranks.span(ends.shape[-1])]
        return AttentionInputs(q, k, ends, self.lead)

    def _keys_and_values(
        self, x: Tensor, ends: Tensor, span: Span, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """Before positions, [B, T, G * D]."""
        k, v, direct = self._parts(x, ends, span, cache)
        if direct is not None:
            k, v = with_direct(k, v, direct)
        return k.flatten(2), v.flatten(2)

    def _parts(
        self, x: Tensor, ends: Tensor, span: Span, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is summed to keys and values, see with_positions; k and v [B, T, G, D]."""
        state = None if cache is None else cache.state
        starts = self._starts(ends, span, cache)
        longest = self.boundary.longest if self.resets else None
        u = x
        if self.resets:
            u, starts, span = with_open_chunk(x, starts, span, longest)
        own = slice(u.shape[1] - x.shape[1], None)
        if isinstance(self.compressors, MeanPooling):
            direct = self._direct(self.compressors(u, starts, span, state)[:, own])
            k, v = (direct, direct) if direct.dim() == 4 else direct.unbind(2)
            return k, v, None
        k, v = self.compressors(u, starts, span, state, longest)
        # Under autocast as the products' inputs are, so that one u is read, not a float32 one too.
        return *self._heads(k[:, own], v[:, own]), self._direct(x.to(k.dtype))

    def _direct(self, u: Tensor) -> Tensor:
        """The path around the compressors: r_k(u) and r_v(u), [B, T, 2, G, D], or, where both are
        the same, [B, T, G, D]."""
        if self.wkv is None:
            return u[..., self.own_columns].unflatten(-1, (self.n_kv_heads, self.head_dim))
        return self.wkv(u).unflatten(-1, (2, self.n_kv_heads, self.head_dim))

    def _starts(self, ends: Tensor, span: Span, cache: LayerCache | None) -> Tensor:
        """Where the compressors' state starts afresh, bool [B or 1, T]; by chunk in whole rows."""
        if not self.resets:
            return span.positions == 0
        self._check_shared(ends)
        held = None if cache is None else cache.kv
        return chunk_starts(ends, span.rows, None if held is None else held.last_end)

    def _check_shared(self, ends: Tensor) -> None:
        if ends.shape[1] != 1:
            raise ValueError(
                f"ends differ between heads (shape {list(ends.shape)}), but the one state of "
                f"ssm_scope={self.scope!r} follows the ends; set mixer.ssm_scope=sequence"
            )

    def new_cache(self, batch: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        if not self.boundary.causal:
            raise ValueError(cannot_decode(self.boundary.name))
        window = None if self.lead is None else self.lead + 1
        per_head = self.boundary.per_head and not self.resets
        kv = KVCache(
            batch, self.n_kv_heads, self.head_dim, window, per_head, dtype, device, self.backend
        )
        state: State = self.compressors.new_state(batch, dtype, device)
        if isinstance(self.compressors, StridedCompressors):
            assert self.boundary.longest is not None
            state = self.compressors.new_places(batch, self.boundary.longest, device)
        return LayerCache(kv, state, self.boundary)


def _compressors(
    config: AttambaMixer, dim: int, kv_width: int, norm_eps: float
) -> Compressors | GatedPooling | MeanPooling:
    if config.compressor == "mean":
        return MeanPooling(dim, config.backend)
    if config.compressor == "gated":
        return GatedPooling(dim, kv_width, config.gate_positions, norm_eps, config.backend)
    compressors = StridedCompressors if config.ssm_scope == "strided" else Compressors
    return compressors(
        dim,
        kv_width,
        config.ssm_dim or dim // 2,
        config.state_dim,
        config.ssm_heads,
        config.conv_width,
        norm_eps,
        config.backend,
        config.ssm_init,
    )
