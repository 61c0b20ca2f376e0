"""The operators of the model. They import torch alone.

backend: "auto" (the fastest that runs where the tensors are), "triton" (kernels, imported when they
are asked for), "torch" (vectorised PyTorch, any device), "reference" (plain fp32 loops and dense
masks, for tests).
"""

from attamba.ops.chunk_attention import chunk_attention
from attamba.ops.chunk_scan import chunk_scan
from attamba.ops.compress import compress
from attamba.ops.linear_scan import linear_scan

__all__ = ["chunk_attention", "chunk_scan", "compress", "linear_scan"]
