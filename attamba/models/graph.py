"""A decode step as a CUDA graph: one launch by the host instead of one for each kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from attamba.models.decoder import Block, Decoder
from attamba.modules.cache import DecodeCache


class CapturedStep:
    """``model(ids, cache=cache)`` for one token per row, replayed from a CUDA graph.

    The first call runs the model as it is, which also compiles and warms up whatever it needs; the
    next one captures. The graph stays valid while the cache grows, because kernels find keys and
    values through a table; it is captured anew where the cache's other tensors have moved (after
    a prompt, reorder or reset). Rows that are frozen by a mask have a graph of their own.

    The weights must stay as they are: some are copied, projections that become one product.
    Needs a model on CUDA all of whose mixers step without the host, see `can_capture`.
    """

    def __init__(self, model: Decoder, cache: DecodeCache) -> None:
        device = cache.lengths.device
        self.model, self.cache = model, cache
        self.ids = torch.zeros(cache.batch_size, 1, dtype=torch.long, device=device)
        self.mask = torch.ones(cache.batch_size, 1, dtype=torch.bool, device=device)
        for layer, held in zip(model.layers, cache.layers):
            if isinstance(layer, Block):
                held.stacked = layer.mixer.stacked_projections()
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._warm: set[bool] = set()
        self._addresses: list[int] = []

    @torch.inference_mode()
    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids: int64 [B, 1], mask: bool [B, 1] or None -> logits [B, V], valid until the next call.

        Rows where the mask is False take no token and stay as they are.
        """
        masked = mask is not None
        if masked not in self._warm:
            self._warm.add(masked)
            return self._logits(ids, mask)
        self.cache.before(1)
        addresses = [tensor.data_ptr() for tensor in self.cache.steady()]
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
        self.ids.copy_(ids)
        if mask is not None:
            self.mask.copy_(mask)
        if masked not in self._graphs:
            self._graphs[masked] = self._capture(masked)
        graph, logits = self._graphs[masked]
        graph.replay()
        return logits

    def _capture(self, masked: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with self.cache.room_is_made(), torch.cuda.graph(graph):
            logits = self._logits(self.ids, self.mask if masked else None)
        return graph, logits

    def _logits(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.model(ids, attention_mask=mask, cache=self.cache, return_hidden=True)
        return self.model.head(hidden[:, -1])


def can_capture(cache: DecodeCache) -> bool:
    """Can steps of one token on this cache be captured: on CUDA, every layer without the host?"""
    return cache.lengths.is_cuda and all(
        layer.by_kernel and (layer.boundary is None or layer.boundary.name != "given")
        for layer in cache.layers
    )
