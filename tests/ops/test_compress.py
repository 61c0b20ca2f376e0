"""The compressors: the vectorised backend against the plain loop, outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from scanning import assert_near, chunk_starts, compress_inputs, exact, run_compress

from attamba.ops import compress
from attamba.ops.compress.stages import causal_conv, gate_and_norm, split_projection

OPTIONS = {"state_dim": 8, "eps": 1e-5}


def check(inputs, starts, bound=1e-5, **options) -> None:
    options = {**OPTIONS, **options}
    got = run_compress(inputs, starts, "torch", **options)
    assert got["y"].dtype == inputs["proj"].dtype
    assert_near(got, run_compress(exact(inputs), starts, "reference", **options), bound)


@pytest.mark.parametrize("seq", [1, 2, 33, 65])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_recurrence(seq, chunk_size, packed):
    check(compress_inputs(seq), chunk_starts(seq, chunk_size, 2, packed))


@pytest.mark.parametrize("heads, width, state_dim, taps", [(1, 1, 1, 1), (3, 5, 3, 2)])
def test_odd_sizes(heads, width, state_dim, taps):
    inputs = compress_inputs(40, 2, heads, width, state_dim, taps)
    check(inputs, chunk_starts(40, 7), state_dim=state_dim)


def test_bfloat16():
    check(compress_inputs(65, dtype=torch.bfloat16), chunk_starts(65, 8), bound=2e-2)


def test_padding_changes_nothing_of_what_follows_it():
    inputs, mask = compress_inputs(30), torch.ones(2, 30, dtype=torch.bool)
    mask[1, :11] = False
    starts = chunk_starts(30, 6, 2) & mask
    starts[1, 11] = True
    check(inputs, starts, mask=mask)
    alone = {**inputs, "proj": inputs["proj"][1:, 11:]}
    whole = compress(**inputs, starts=starts, mask=mask, **OPTIONS)
    part = compress(**alone, starts=starts[1:, 11:], **OPTIONS)
    assert all(torch.allclose(a[1:, 11:], b, atol=1e-5) for a, b in zip(whole, part))


def test_locality_of_chunks():
    """A changed token changes its own chunk from that token on, and nothing else."""
    inputs, starts = compress_inputs(24), chunk_starts(24, 8)
    before = torch.cat(compress(**inputs, starts=starts, **OPTIONS), -1)
    inputs["proj"] = inputs["proj"].clone()
    inputs["proj"][:, 10] += 1
    after = torch.cat(compress(**inputs, starts=starts, **OPTIONS), -1)
    changed = (after - before).abs().amax((0, 2)) > 1e-4
    assert changed.nonzero().flatten().tolist() == list(range(10, 15))


def test_the_convolution_sees_nothing_before_a_start():
    inputs, weight = torch.randn(1, 8, 3), torch.randn(3, 4)
    starts = torch.tensor([[False, False, True, False, False]])
    out = causal_conv(inputs, weight, starts)
    before = (inputs[0, 1:5] * weight.t()).sum(0)
    after = (inputs[0, 5:7] * weight.t()[2:]).sum(0)
    assert torch.allclose(out[0, 1], before) and torch.allclose(out[0, 3], after)


def test_each_half_has_a_mean_square_of_one():
    proj = compress_inputs(10)["proj"]
    z, xbc, dt = split_projection(proj, 8, 2)
    assert (z.shape[-1], xbc.shape[-1], dt.shape[-1]) == (64, 96, 4)
    y = gate_and_norm(torch.randn(2, 10, 64), z, 1e-6).unflatten(-1, (2, -1))
    assert torch.allclose(y.square().mean(-1), torch.ones(2, 10, 2), atol=1e-2)


def test_empty_input():
    for backend in ("torch", "reference"):
        inputs = compress_inputs(0)
        halves = compress(**inputs, starts=chunk_starts(0, 8), backend=backend, **OPTIONS)
        assert all(y.shape == (2, 0, 32) for y in halves)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"state_dim": 9}, r"proj has 164 columns, which are not 4E \+ 4N \+ 2S with N=9, S=2"),
        ({"A": torch.zeros(3, 2)}, r"A has shape \[3, 2\], expected \[2, 2\]"),
        ({"dt_bias": torch.zeros(2)}, r"dt_bias has shape \[2\], expected \[2, 2\]"),
        ({"D": torch.zeros(2, 1)}, r"D has shape \[2, 1\], expected \[2, 2\]"),
        ({"conv_weight": torch.zeros(5, 4)}, r"conv_weight has shape \[5, 4\], expected \[96, 4\]"),
        ({"starts": torch.zeros(9).bool()}, r"starts has shape \[1, 9\], expected \[2, 10\]"),
        ({"mask": torch.ones(1, 10).bool()}, r"mask has shape \[1, 10\], expected \[2, 10\]"),
        ({"longest": 0}, "longest=0 must be at least 1, or None"),
        ({"backend": "cuda"}, "backend='cuda' must be one of: auto, torch, triton, reference"),
    ],
)
def test_errors(change, text):
    call = {**compress_inputs(10), "starts": chunk_starts(10, 8), **OPTIONS, **change}
    with pytest.raises(ValueError, match=text):
        compress(**call)
