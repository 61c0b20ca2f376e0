"""Tile sizes of the Triton kernels, by chip and shape; `attamba bench tune` measures them anew.

Chosen before the launch, not while a program runs: the same shapes always run the same code.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attamba.ops.backends import shared_memory


@dataclass(frozen=True)
class Tiles:
    """One kernel's tiles.

    block_m: queries. block_n: chunk ends (in window_kernel: keys). window_n: keys of the window,
    for the kernels that walk over both. warps, stages: Triton's num_warps and num_stages.
    """

    block_m: int
    block_n: int
    window_n: int
    warps: int
    stages: int


KERNELS = ("forward", "dq", "past", "window")

LONG = 4096
"""From as many keys on, a row is long: most of the time goes into the past."""

# (compute capability, heads at most this wide): tiles for short rows, for long ones. 16-bit inputs.
TABLE: dict[tuple[int, int], dict[str, tuple[Tiles, Tiles]]] = {
    (9, 64): {
        "forward": (Tiles(64, 64, 64, 4, 2), Tiles(64, 64, 32, 4, 3)),
        "dq": (Tiles(64, 64, 64, 4, 2), Tiles(64, 64, 32, 4, 3)),
        "past": (Tiles(32, 64, 64, 4, 3), Tiles(128, 64, 64, 4, 2)),
        "window": (Tiles(32, 64, 64, 4, 2), Tiles(32, 64, 64, 4, 2)),
    },
    (9, 128): {
        "forward": (Tiles(64, 32, 32, 4, 3), Tiles(128, 64, 32, 4, 3)),
        "dq": (Tiles(64, 64, 32, 4, 3), Tiles(64, 64, 32, 4, 3)),
        "past": (Tiles(32, 64, 64, 4, 3), Tiles(64, 64, 64, 4, 2)),
        "window": (Tiles(32, 64, 64, 4, 3), Tiles(32, 64, 64, 4, 3)),
    },
}

SMALL = {  # fits every chip, with heads of at most 128 numbers of 16 bits, or 64 of 32
    "forward": Tiles(64, 32, 32, 4, 2),
    "dq": Tiles(64, 32, 32, 4, 2),
    "past": Tiles(32, 64, 32, 4, 2),
    "window": Tiles(32, 64, 32, 4, 2),
}
TINY = {name: Tiles(32, 32, 32, 4, 1) for name in KERNELS}  # for wide heads in float32
WIDE = {**TINY, "forward": SMALL["forward"], "dq": SMALL["dq"]}  # heads of 129 to 256, 16 bits
LITTLE = 160_000
"""Bytes of shared memory below which wide heads need smaller tiles still: those of compute
capability 8.6 and 8.9 have 101,376."""
LEAST = {name: Tiles(16, 16, 16, 4, 1) for name in KERNELS}


_OVERRIDE: dict[str, Tiles] = {}


def tiles(kernel: str, width: int, n_keys: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Tiles of `kernel` for rows of `n_keys` keys, heads of `width` numbers of `dtype`."""
    if kernel in _OVERRIDE:
        return _OVERRIDE[kernel]
    little = width > 128 and shared_memory(device) < LITTLE
    if dtype.itemsize > 2:
        return (SMALL if width <= 64 else LEAST if little else TINY)[kernel]
    if width > 128:
        return (TINY if little else WIDE)[kernel]
    chip = _chip(device) if device.type == "cuda" else 9
    measured = TABLE.get((chip, 64 if width <= 64 else 128))
    return SMALL[kernel] if measured is None else measured[kernel][n_keys >= LONG]


@contextlib.contextmanager
def override(kernel: str, tile: Tiles) -> Iterator[None]:
    """Launch `kernel` with these tiles inside the block: to measure and to test them."""
    _OVERRIDE[kernel] = tile
    try:
        yield
    finally:
        del _OVERRIDE[kernel]


@functools.cache
def _chip(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
