"""Sizes of the decode kernel's tiles, from the shapes alone: nothing is tuned at run time."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepTile:
    """splits: programs that share the entries of a row and head. entries: of one tile, a divisor
    of a page. queries: rows of the tensor cores' product, 1 for plain sums. warps, stages: of a
    program. share: entries below which another program is not worth its reduction."""

    splits: int
    entries: int
    queries: int
    warps: int = 4
    stages: int = 1
    share: int = 256


PROGRAMS = 6
"""Programs for each processor, where the entries are many enough."""


@functools.lru_cache(maxsize=256)
def step_tile(
    heads: int, per_group: int, width: int, dtype: torch.dtype, device: torch.device
) -> StepTile:
    """For `heads` = rows x key/value heads, each read by `per_group` queries of `width`."""
    queries = max(16, 1 << (per_group - 1).bit_length())
    if dtype == torch.float32:  # products without the tensor cores: short tiles, or plain sums
        queries = 1 if per_group == 1 else queries
        tile = StepTile(1, 64 if width <= 64 else 32, queries, warps=4, stages=1)
    else:
        tile = StepTile(1, 64, queries, warps=4, stages=3)
    processors = 2
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    # Several programs to a processor hide each other's waits; the longest context decides.
    return dataclasses.replace(tile, splits=min(128, max(1, PROGRAMS * processors // heads)))
