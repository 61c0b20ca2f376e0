"""The transformer's decode step with PyTorch's own attention: what Attamba must be faster than.

Keys and values lie in one contiguous tensor a layer, of exactly the length that is measured, which
is the best case for a library kernel. Shapes: B rows, H query heads, G key/value heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attamba.models import Decoder
from attamba.models.decoder import Block
from attamba.modules.attention import Attention
from attamba.ops.chunking import Span, make_span
from attamba.ops.rotary import rotate

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class LibraryStep:
    """One step of a transformer after `length` random tokens, over and over at one position."""

    def __init__(self, model: Decoder, length: int, batch_size: int, backend: SDPBackend) -> None:
        weight = model.embed.weight
        self.model, self.length, self.backend = model, length, backend
        self.lengths = torch.full((batch_size,), length, device=weight.device)
        self.ids = torch.zeros(batch_size, 1, dtype=torch.long, device=weight.device)
        self.blocks = [layer for layer in model.layers if isinstance(layer, Block)]
        self.held = []
        for block in self.blocks:
            mixer = _attention(block)
            shape = (batch_size, mixer.n_kv_heads, length + 1, mixer.head_dim)
            empty = torch.empty(shape, dtype=weight.dtype, device=weight.device)
            self.held.append((empty.normal_(), torch.empty_like(empty).normal_()))

    def __call__(self) -> Tensor:
        span = make_span(1, self.ids.device, tokens=self.ids, offsets=self.lengths)
        x = self.model.embed(self.ids)
        with sdpa_kernel(self.backend):
            for block, (keys, values) in zip(self.blocks, self.held):
                x = x + self._mix(_attention(block), block.mixer_norm(x), span, keys, values)
                x = x + block.ffn(block.ffn_norm(x))
        return self.model.head(self.model.norm(x))

    def _mix(self, mixer: Attention, x: Tensor, span: Span, keys: Tensor, values: Tensor) -> Tensor:
        q = mixer.wq(x).unflatten(-1, (mixer.n_heads, mixer.head_dim))
        k, v = mixer.wkv(x).unflatten(-1, (2, mixer.n_kv_heads, mixer.head_dim)).unbind(2)
        rotary = mixer.rotary(span)
        keys[:, :, self.length] = rotate(k, rotary)[:, 0]
        values[:, :, self.length] = v[:, 0]
        # The query heads of one key/value head stand where a sequence of queries would.
        q = rotate(q, rotary).view(x.shape[0], mixer.n_kv_heads, -1, mixer.head_dim)
        return mixer.wo(F.scaled_dot_product_attention(q, keys, values).reshape(x.shape[0], 1, -1))


def _attention(block: Block) -> Attention:
    assert isinstance(block.mixer, Attention)
    return block.mixer


def captured(step: Callable[[], Tensor]) -> Callable[[], object]:
    """The step as a CUDA graph."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
