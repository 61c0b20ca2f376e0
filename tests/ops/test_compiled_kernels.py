"""The kernels as compute capability 9.0 gets them: they compile, and read what they wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import SHARED_MEMORY, compiled
from sass import unwritten_registers

pytest.importorskip("triton")

from attamba.ops.chunk_scan.triton import gradient_warps, tile_tokens
from attamba.ops.compress.scan.triton import segment_warps

BASE: dict[str, Any] = {"type": "attamba", "backend": "triton"}
SEQUENCE = {**BASE, "ssm_scope": "sequence", "boundary": "head_cyclic"}


def model(name: str, dim: int, mixer: dict[str, Any], whole: bool = False) -> dict[str, Any]:
    return {"name": name, "dim": dim, "mixer": mixer, "dtype": "bfloat16", "whole": whole}


def scan(state_dim: int, width: int, dtype: str = "bfloat16") -> dict[str, Any]:
    sizes = {"heads": 4, "groups": 2, "state_dim": state_dim, "width": width}
    return {"name": f"scan {state_dim} x {width} {dtype}", "scan": sizes, "dtype": dtype}


CASES = [
    model("chunk", 512, {**BASE, "n_heads": 8}),
    # States of 32 x 8: deeper than wide.
    model("sequence", 512, {**SEQUENCE, "n_heads": 8}, whole=True),
    model("one head", 128, {**BASE, "n_heads": 2, "ssm_dim": 32, "ssm_heads": 1}),
    # The least and the most of each side for which ptxas 12.8 went wrong, see below, and the most.
    *(scan(*sides) for sides in [(64, 16), (128, 32), (128, 64)]),
    scan(32, 256),  # of a model of 4096: tiles of fewer tokens, so that they fit
    scan(32, 128, "float32"),
]
NAMES = {
    *("forward_kernel", "dq_kernel", "past_kernel", "window_kernel", "index_kernel"),
    *("compress_forward_kernel", "compress_backward_kernel"),
    *("compress_step_kernel", "attend_step_kernel", "thin_linear_kernel"),
    *("shared_inputs", "segment_outputs", "scan_gradients", "conv_gradients", "rotate_kernel"),
    *("tile_states", "tile_outputs", "tile_gradients", "tile_shared_gradients"),
}


def test_no_address_is_used_before_it_is_known_and_all_fit_shared_memory():
    kernels = compiled(CASES)
    assert {kernel["name"] for kernel in kernels} >= NAMES
    read = {kernel["name"] for kernel in kernels if kernel["read"]}
    assert read >= {"forward_kernel", "segment_outputs", "scan_gradients", "tile_states"}
    wrong = [kernel for kernel in kernels if kernel["unwritten"]]
    assert not wrong, wrong
    large = [kernel for kernel in kernels if kernel["shared"] > SHARED_MEMORY]
    assert not large, large
    for kernel in kernels:
        if kernel["name"].startswith("tile_"):
            sides = kernel["constants"]["N"], kernel["constants"]["W"]
            dtype = torch.float32 if kernel["case"].endswith("float32") else torch.bfloat16
            tile = kernel["constants"]["Q"]
            # In a byte less than it needs there must not be room for so many tokens.
            fits = tile_tokens(dtype, *sides, kernel["shared"] - 1)
            assert fits is None or fits < tile, kernel


@pytest.mark.parametrize("sides", [(64, 16), (64, 32), (128, 16), (128, 32)])
def test_what_ptxas_12_8_compiles_wrongly_is_not_launched(sides):
    """Which the installed one may compile rightly."""
    assert gradient_warps(torch.bfloat16, *sides) == 2
    assert segment_warps("segment_outputs", *sides) == 8
    assert segment_warps("segment_outputs", 32, 16) == 8


def test_what_reads_too_early_is_found():
    early = """
        /*0050*/                   ULDC.64 UR4, c[0x0][0x220] ;
        /*0060*/              @!P1 BRA 0x80 ;
        /*0070*/                   LDG.E R2, desc[UR38][R2.64] ;
        /*0080*/                   UIADD3 UR26, UP0, UR26, 0x20, URZ ;
        /*0090*/                   UIADD3.X UR27, UR5, -0x3ffffff0, URZ, UP0, !UPT ;
        /*00a0*/                   HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR24].tnspB, R24 ;
    """
    assert unwritten_registers(early) == ["UIADD3 UR26, UP0, UR26, 0x20, URZ"]
    assert unwritten_registers(early.replace("UP0, UR26", "UP0, UR4")) == []
