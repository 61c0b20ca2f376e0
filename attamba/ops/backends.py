"""Which implementation of an operator runs: chosen openly, never by catching an error.

"auto" is Triton where it runs fast (CUDA) and vectorised PyTorch elsewhere. Whoever asks for
"triton" gets it or an error that says why not. Triton's interpreter (TRITON_INTERPRET=1 before
the first import) runs the same kernels on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

import torch

_INSTALLED = importlib.util.find_spec("triton") is not None  # found, not yet imported

NAMES = ("auto", "torch", "triton", "reference")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of what kernels are made for."""


@torch.compiler.assume_constant_result
def choose(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The implementation for such tensors on `device`: "torch", "triton" or "reference".

    Raises ValueError for an unknown name, and for "triton" where it cannot run.
    """
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} must be one of: {', '.join(NAMES)}")
    if backend == "auto":
        is_fast = device.type == "cuda" and why_not_triton(device, dtype) is None
        return "triton" if is_fast else "torch"
    if backend == "triton":
        reason = why_not_triton(device, dtype)
        if reason is not None:
            raise ValueError(f"backend='triton' cannot run: {reason}; use backend='auto'")
    return backend


def why_not_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why Triton kernels cannot run on `device`, or None where they can."""
    if dtype not in DTYPES:
        return f"there are no kernels for {dtype}, but for {', '.join(map(str, DTYPES))}"
    if not _INSTALLED:
        return "the package triton is not installed (pip install triton, Linux only)"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        return None
    if device.type == "cpu" and interpreted():
        return None
    return f"the tensors are on {device.type}, and Triton needs a CUDA device"


def interpreted() -> bool:
    """Do kernels run in Triton's interpreter?"""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch.compiler.assume_constant_result
def shared_memory(device: torch.device) -> int:
    """Bytes that a program's shared memory may have; the interpreter's has no bound."""
    if device.type != "cuda":
        return sys.maxsize
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", 1 << 16)  # an AMD GPU's


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Can a kernel begin while the one before it ends (programmatic dependent launch)?"""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def starts_early(rows: int) -> bool:
    """Do a decode step's kernels let the next ones start before they wait themselves?

    With few rows that hides launches. With many, those that wait take room from attention over
    the cache, whose programs then begin, and end, at different times: at 64k tokens it saved
    nothing for 8 rows on an H200, and 32 took 5% longer.
    """
    return rows <= 16
