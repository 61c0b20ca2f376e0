"""A decoder-only language model, the same for every mixer.

    x = x + mixer(RMSNorm(x)) ;  x = x + SwiGLU(RMSNorm(x))

Shapes: B batch, T tokens, d model width, V vocabulary, n layers, G key/value heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attamba.config import ModelConfig
from attamba.models.registry import build_mixer
from attamba.modules.cache import DecodeCache, LayerCache
from attamba.modules.layers import RMSNorm, SwiGLU, linear, trunc_normal_
from attamba.ops.chunking import Span, make_span, part_of
from attamba.ops.row_ranks import RowRanks


class Block(nn.Module):
    """One layer: mixer over time, then feed-forward."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer = build_mixer(config.layer_mixers()[layer_idx], config, layer_idx)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = SwiGLU(config.dim, config.ffn_dim or 3 * config.dim)

    def forward(
        self, x: Tensor, span: Span, cache: LayerCache | None, given: Tensor | None
    ) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), span, cache, given)
        return x + self.ffn(self.ffn_norm(x))

    def step(self, x: Tensor, span: Span, cache: LayerCache, given: Tensor | None) -> Tensor:
        """The same for one token per row, [B, 1, d], in few kernels; see TimeMixer.step."""
        x = self.mixer.step(x, self.mixer_norm, span, cache, given)
        return self.ffn.step(x, self.ffn_norm)


class Decoder(nn.Module):
    """A language model: embedding, layers, norm, head. Made by build_model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        trunc_normal_(self.embed.weight, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.row_ranks: RowRanks | None = None
        """Where several ranks share the tokens of a row: those ranks."""
        self.register_buffer("draw", torch.zeros((), dtype=torch.long), persistent=False)
        self.draw: Tensor

    def forward(
        self,
        ids: Tensor | None = None,
        *,
        doc_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ends: Tensor | None = None,
        cache: DecodeCache | None = None,
        inputs_embeds: Tensor | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            ids: int64 [B, T].
            doc_ids: int [B, T], packed documents; a change of id starts a new one, which sees
                nothing of the others. Not with a cache.
            attention_mask: bool or int [B, T], true on real tokens; padding stands on the LEFT.
                With a cache a row may be padding alone: it stays as it is.
            ends: bool [B, T] (all layers), [n, B, T] or [n, B, G, T]: the last tokens of chunks,
                for boundary "given".
            cache: made by new_cache; the tokens follow those that it has seen. Updated in place.
            inputs_embeds: [B, T, d] instead of ids.
            return_hidden: return the final norm's output [B, T, d]; `head` maps it to logits.

        Returns [B, T, V], of this rank's tokens where several share the rows. On padding the
        values mean nothing. Raises ValueError for shapes that disagree, ids out of range, padding
        on the right, ends that reach past the cache.
        """
        if (ids is None) == (inputs_embeds is None):
            raise ValueError("pass either ids or inputs_embeds")
        if ids is not None:
            self._check_ids(ids)
        x = self.embed(self._own(ids)) if ids is not None else self._own(inputs_embeds)
        if cache is not None and len(cache.layers) != self.config.n_layers:
            raise ValueError(
                f"the cache has {len(cache.layers)} layers, the model {self.config.n_layers}; "
                f"make one with this model's new_cache"
            )
        if x.dim() != 3 or x.shape[2] != self.config.dim:
            raise ValueError(
                f"inputs_embeds has shape {list(x.shape)}, expected [B, T, {self.config.dim}]"
            )
        if x.shape[1] == 0 and cache is not None:
            raise ValueError(f"ids has shape {list(x.shape[:2])}; a cached call needs a token")
        span = self._span(x, ids, doc_ids, attention_mask, cache)
        given = self._given(ends, span.rows.positions.shape[1], x.shape[0], cache)
        if cache is not None:
            cache.before(x.shape[1])
        in_kernels = cache is not None and x.shape[1] == 1 and cache.by_kernel and not self._hooked
        for i, layer in enumerate(self.layers):
            here = None if given is None else given[i]
            if cache is not None and in_kernels and isinstance(layer, Block):
                x = layer.step(x, span, cache.layers[i], here)
            else:
                x = layer(x, span, None if cache is None else cache.layers[i], here)
        x = self.norm(x)
        if cache is not None:
            cache.count(span.n_new)
        return x if return_hidden else self.head(x)

    @property
    def _hooked(self) -> bool:
        """Does a hook want to see what some module gives?"""
        return any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())

    def new_cache(self, batch_size: int = 1, dtype: torch.dtype | None = None) -> DecodeCache:
        """An empty decode cache on the model's device.

        dtype: of keys and values. Default: the model's. Raises ValueError for a batch_size below
        1 and where a boundary policy looks at later tokens.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        weight = self.embed.weight
        dtype = dtype or weight.dtype
        with torch.inference_mode(False):  # the cache may outlive a caller's inference mode
            layers = [
                layer.mixer.new_cache(batch_size, dtype, weight.device)
                for layer in self.layers
                if isinstance(layer, Block)
            ]
            lengths = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return DecodeCache(layers, lengths, self.config.vocab_size)

    def set_draw(self, draw: int) -> None:
        """Vary the random boundary policies: in training mode each draw gives other ends."""
        self.draw.fill_(draw)

    def _span(
        self,
        x: Tensor,
        ids: Tensor | None,
        doc_ids: Tensor | None,
        mask: Tensor | None,
        cache: DecodeCache | None,
    ) -> Span:
        batch, seq = x.shape[:2]
        if self.row_ranks is not None:
            seq *= self.row_ranks.size
            if cache is not None or mask is not None:
                raise ValueError("ranks that share rows take neither a cache nor attention_mask")
        for name, tensor in (("doc_ids", doc_ids), ("attention_mask", mask)):
            if tensor is not None and tuple(tensor.shape) != (batch, seq):
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {[batch, seq]}")
        if doc_ids is not None and (mask is not None or cache is not None):
            raise ValueError(
                "doc_ids goes neither with attention_mask nor with a cache; "
                "decode documents as rows of a batch"
            )
        if cache is not None and cache.batch_size != batch:
            raise ValueError(f"the cache has {cache.batch_size} rows, the input {batch}")
        if mask is not None:
            mask = mask.bool()
            checked = torch.compiler.is_compiling() or seq == 1  # a graph cannot look at values
            if not checked and bool((mask[:, 1:] < mask[:, :-1]).any()):
                raise ValueError(
                    "attention_mask has padding to the right of a token; pad prompts on the left"
                )
        offsets = None if cache is None else cache.lengths
        draw = self.draw if self.training else None
        span = make_span(
            seq, x.device, tokens=ids, doc_ids=doc_ids, mask=mask, offsets=offsets, draw=draw
        )
        return span if self.row_ranks is None else part_of(span, self.row_ranks)

    def _own(self, rows: Tensor | None) -> Tensor:
        """This rank's tokens of whole rows, [B, T, ...]."""
        assert rows is not None
        if self.row_ranks is None:
            return rows
        if rows.shape[1] % self.row_ranks.size:
            raise ValueError(
                f"rows of {rows.shape[1]} tokens cannot be divided among {self.row_ranks.size} "
                f"ranks (parallel.context); make it a multiple"
            )
        return self.row_ranks.own(rows)

    def _given(
        self, ends: Tensor | None, seq: int, batch: int, cache: DecodeCache | None
    ) -> Tensor | None:
        """Ends for each layer, [n, B or 1, G or 1, T]."""
        if ends is None:
            return None
        if not any(getattr(m, "policy", None) == "given" for m in self.config.layer_mixers()):
            raise ValueError(
                "ends was passed, but no layer has boundary='given'; set mixer.boundary=given"
            )
        n = self.config.n_layers
        if ends.dtype != torch.bool:
            raise ValueError(f"ends must be boolean, not {ends.dtype}; use ends.bool()")
        if ends.shape[-1] != seq:
            held = "" if cache is None else f", after {cache.lengths.tolist()} in the cache"
            raise ValueError(
                f"ends has {ends.shape[-1]} positions, but this call has {seq} tokens{held}; "
                f"pass the ends of this call's tokens alone"
            )
        if ends.dim() == 2:
            ends = ends[None, :, None].expand(n, -1, -1, -1)
        elif ends.dim() == 3:
            ends = ends[:, :, None]
        if ends.dim() != 4 or ends.shape[0] != n or ends.shape[1] not in (1, batch):
            raise ValueError(
                f"ends has shape {list(ends.shape)}; it must be [B, T], [n_layers, B, T] or "
                f"[n_layers, B, G, T] with n_layers={n}, B={batch}, T={seq}"
            )
        return ends

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids must be int64 [B, T], not {ids.dtype} {list(ids.shape)}")
        # On a GPU this would wait for the device; there the embedding itself asserts.
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary "
                    f"0..{self.config.vocab_size - 1}; is this the model's own tokenizer?"
                )


def build_model(config: ModelConfig) -> Decoder:
    """A freshly initialised model, weights drawn from torch's global random state.

    Truncated normals of standard deviation fan_in ** -0.5, as in the paper's set-up. Raises
    ConfigError (a ValueError) for a config that does not fit together.
    """
    config.validate()
    return Decoder(config)
