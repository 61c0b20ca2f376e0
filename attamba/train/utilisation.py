"""Model FLOPs utilisation: what a model computes over what its devices could.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from attamba.config import ModelConfig, RunConfig, override_model
from attamba.data import Batch
from attamba.models.accounting import attention_flops_by_length, countable, flops

BACKWARD = 3
"""Forward and backward over forward alone."""

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
}
"""Of NVIDIA's data sheets, dense bfloat16 (half of the figure "with sparsity"); the first name that
is a word or words of torch.cuda.get_device_name. H100 alone is the SXM one."""


def peak_flops(config: RunConfig, device: torch.device) -> float | None:
    """FLOPs per second of one device at best; None where that is not known.

    It stays that of bfloat16 with train.float8: attention and scans do, and what is gained shows.
    """
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops * 1e12
    if device.type != "cuda" or config.train.dtype != "bfloat16":
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """Of a device of this name, by PEAK_TFLOPS."""
    words = f" {name.replace('-', ' ')} "
    found = (tflops for key, tflops in PEAK_TFLOPS.items() if f" {key} " in words)
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12


class FlopCounter:
    """Model FLOPs of batches, forward and backward, by the formulas of models.accounting.

    Attention counts the entries that are visible in the rows' documents, as they are packed. What
    is computed anew for the sake of memory does not count. Chunks that follow the text are counted
    as if they had chunk_size tokens.
    """

    def __init__(self, config: RunConfig) -> None:
        self._model = countable(config.model)
        self._seq_len, self._packed = config.data.seq_len, config.data.doc_mask
        self._tables: dict[int | None, tuple[float, np.ndarray]] = {}

    def of(self, batch: Batch, chunk_size: int | None = None) -> float:
        """FLOPs of one pass over the rows.

        chunk_size: of this step, where train.chunk_sizes draws it.
        """
        if chunk_size not in self._tables:
            self._tables[chunk_size] = _costs(self._model, self._seq_len, chunk_size)
        per_token, attention = self._tables[chunk_size]
        rows, width = batch.inputs.shape
        lengths = document_lengths(batch.doc_ids) if self._packed else np.full(rows, width)
        return BACKWARD * (per_token * batch.inputs.size + float(attention[lengths].sum()))


def document_lengths(doc_ids: np.ndarray) -> np.ndarray:
    """Tokens of each document of each row, a document being cut at the row's ends. [B, T] -> [n]"""
    begins = np.ones(doc_ids.shape, dtype=bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    (places,) = np.nonzero(begins.ravel())
    return np.diff(np.append(places, doc_ids.size))


def _costs(model: ModelConfig, seq_len: int, chunk_size: int | None) -> tuple[float, np.ndarray]:
    """FLOPs of a token beside attention; of attention by a document's length, [T + 1]."""
    if chunk_size is not None:
        model = override_model(model, {"mixer.chunk_size": chunk_size})
    parts = flops(model, seq_len)
    return parts.projections + parts.scan, attention_flops_by_length(model, seq_len).numpy()
