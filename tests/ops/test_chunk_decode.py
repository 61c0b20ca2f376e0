"""One decode step: torch and the kernels against the plain loops, many steps in a row."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from attamba.ops import chunk_attention
from attamba.ops.backends import interpreted
from attamba.ops.chunk_decode import CompressorWeights, Held, attend_step, compress_step

CPU = torch.device("cpu")
# The interpreter must be on before triton's first import, so it is the whole run's choice.
BACKENDS = ["torch", "triton"] if interpreted() else ["torch"]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / (want.float().norm() + 1e-9))


def _held(
    batch: int, groups: int, width: int, window: int | None, dtype: torch.dtype, poison: float
) -> Held:
    """With poison wherever nobody has written. Masked products need it to be finite."""
    held = Held(batch, groups, width, window, dtype, CPU)
    held.reserve(600)
    for block in (*held.blocks.k, *held.blocks.v):
        block.fill_(poison)
    return held


def _contents(held: Held, lengths: torch.Tensor) -> list[torch.Tensor]:
    k, v = held.blocks.joined(held.blocks.capacity)
    count = held.ring_used(lengths)[:, None] + held.n_past
    out = [held.n_past, held.last_end, held.arrivals]
    for b in range(held.batch):
        for g in range(held.heads):
            out += [k[b, g, : count[b, g]], v[b, g, : count[b, g]]]
    return out


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"heads": 6, "groups": 2},
    "wide group": {"heads": 8, "groups": 1, "width": 16},
    "no window": {"window": None},
    "no window, no ends": {"window": None, "ends": None},
    "ring alone": {"ends": None},
    "window of one": {"window": 1},
    "ends of heads": {"ends": "heads"},
    "long": {"begin": 300, "steps": 4, "window": 9},
    "odd width": {"width": 6, "rotary": False, "more": False},
    "frozen rows": {"mask": True, "ends": "heads"},
    "half precision": {"dtype": torch.float16},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_attend_step_is_its_reference(backend, name):
    case = {"heads": 2, "groups": 2, "width": 8, "window": 5, "ends": "rows", "steps": 7}
    case |= {"begin": 0, "rotary": True, "more": True, "mask": False, "dtype": torch.float32}
    case |= CASES[name]
    batch, heads, groups, width = 2, case["heads"], case["groups"], case["width"]
    dtype, tolerance = case["dtype"], 1e-5 if case["dtype"] == torch.float32 else 2e-3
    # the first tokens of "long" come through torch
    poison = float("nan") if backend == "triton" and not case["begin"] else 1e4
    got, want = (_held(batch, groups, width, case["window"], dtype, poison) for _ in range(2))
    lengths = torch.tensor([0, 3] if case["mask"] or name == "no window" else [0, 0])
    for held in (got, want):
        for step in range(3):  # rows that start with tokens
            k = torch.full((batch, groups, width), float(step + 1), dtype=dtype)
            mask = lengths > step
            if mask.any():
                attend_step(
                    k.repeat_interleave(heads // groups, 1),
                    k,
                    k,
                    held,
                    torch.full_like(lengths, step),
                    mask=mask,
                    backend="reference",
                )
    for step in range(case["begin"] + case["steps"]):
        q = torch.randn(batch, heads, width, dtype=dtype)
        k, v = torch.randn(2, batch, groups, width, dtype=dtype).unbind(0)
        options: dict[str, Any] = {}
        if case["ends"] is not None:
            shape = (batch, groups) if case["ends"] == "heads" else (batch, 1)
            options["ends"] = torch.rand(shape) < (0.9 if case["begin"] else 0.4)
        if case["rotary"]:
            angle = torch.rand(batch, 1, width // 2)
            options["rotary"] = (angle.cos(), angle.sin())
        if case["more"]:
            options["more"] = tuple(torch.randn(2, batch, groups, width, dtype=dtype))
        if case["mask"]:
            options["mask"] = torch.rand(batch) < 0.6
        ours = backend if step >= case["begin"] else "torch"  # long before: another page
        y = attend_step(q, k, v, got, lengths, backend=ours, **options)
        theirs = "reference" if step >= case["begin"] else "torch"
        ref = attend_step(q, k, v, want, lengths, backend=theirs, **options)
        takes = options.get("mask", torch.ones(batch, dtype=torch.bool))
        assert y.isfinite().all()
        assert relative(y[takes], ref[takes]) < tolerance, step
        lengths = lengths + takes
    for a, b in zip(_contents(got, lengths), _contents(want, lengths)):
        assert torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not interpreted(), reason="looks at the kernels in Triton's interpreter")
@pytest.mark.parametrize("past", [252, 508])
def test_the_entry_that_gives_one_program_more_a_share(past):
    """From 257 entries on two programs share them, from 513 on three. One that begins when the
    others are done, as the interpreter's do, must not take the new count for the old."""
    got, want = (_held(2, 1, 8, 4, torch.float32, 1e4) for _ in range(2))
    for held in (got, want):
        held.n_past.copy_(torch.tensor([[past], [past - 2]]))
        held.ring_ends.fill_(True)
        held.known_past = None
        draw = torch.Generator().manual_seed(0)
        for block in (*held.blocks.k, *held.blocks.v):
            block.normal_(generator=draw)
    lengths = torch.tensor([2000, 2001])
    for step in range(5):
        q, k, v = torch.randn(3, 2, 1, 8).unbind(0)
        ends = torch.tensor([[True], [step != 2]])
        y = attend_step(q, k, v, got, lengths, ends=ends, backend="triton")
        ref = attend_step(q, k, v, want, lengths, ends=ends, backend="reference")
        assert relative(y, ref) < 1e-5, step
        assert not got.arrivals.any() and torch.equal(got.n_past, want.n_past)
        lengths = lengths + 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps, inner, heads, state", [(4, 8, 2, 4), (4, 12, 3, 7), (1, 16, 1, 16)])
def test_compress_step_is_its_reference(backend, taps, inner, heads, state):
    batch, channels = 2, 2 * (inner + 2 * state)
    weights = CompressorWeights(
        torch.randn(channels, taps),
        torch.randn(2, heads),
        torch.randn(2, heads),
        torch.randn(2, heads),
    )
    h = torch.zeros(batch, 2 * heads, state, inner // heads)
    conv = torch.zeros(batch, taps - 1, channels)
    ours, theirs = (h.clone(), conv.clone()), (h.clone(), conv.clone())
    for step in range(8):
        projected = torch.randn(batch, 2 * inner + channels + 2 * heads + 3)[:, :-3]
        starts = torch.rand(batch) < 0.3 if step > 3 else None
        mask = torch.rand(batch) < 0.7 if step > 5 else None
        options: dict[str, Any] = {"starts": starts, "mask": mask}
        y, *ours = compress_step(projected, *ours, weights, backend=backend, **options)
        ref, *theirs = compress_step(projected, *theirs, weights, backend="reference", **options)
        takes = torch.ones(batch, dtype=torch.bool) if mask is None else mask
        assert relative(y[takes], ref[takes]) < 1e-5
        for a, b in zip(ours, theirs):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_lie_apart(backend):
    """Whatever is only read may be a part of something else."""

    def apart(t: torch.Tensor) -> torch.Tensor:
        return torch.stack([t, t + 3], -1)[..., 0]

    batch, groups, width = 3, 2, 8
    got, want = (_held(batch, groups, width, 4, torch.float32, 1e4) for _ in range(2))
    lengths = torch.zeros(batch, dtype=torch.long)
    for _ in range(7):
        q, k, v, *more = torch.randn(5, batch, groups, width).unbind(0)
        angle = torch.rand(batch, 1, width // 2)
        options = {"ends": torch.rand(batch, groups) < 0.5, "mask": torch.ones(batch).bool()}
        ref = attend_step(q, k, v, want, lengths, rotary=(angle.cos(), angle.sin()),
                          more=(more[0], more[1]), backend="reference", **options)  # fmt: skip
        spread = {name: tensor[:, None].repeat(1, 2, *[1] * (tensor.dim() - 1))[:, 0]
                  for name, tensor in options.items()}  # fmt: skip
        y = attend_step(apart(q), apart(k), apart(v), got, apart(lengths),
                        rotary=(apart(angle.cos()), angle.sin()),
                        more=(apart(more[0]), more[1]), backend=backend, **spread)  # fmt: skip
        assert relative(y, ref) < 1e-5
        lengths = lengths + 1

    taps, inner, heads, state = 4, 8, 2, 4
    channels = 2 * (inner + 2 * state)
    shapes = ((channels, taps), (2, heads), (2, heads), (2, heads))
    weights = CompressorWeights(*(torch.randn(shape) for shape in shapes))
    h = torch.randn(batch, 2 * heads, state, inner // heads)
    conv = torch.randn(batch, taps - 1, channels)
    projected = torch.randn(batch, 2 * inner + channels + 2 * heads)
    starts = torch.tensor([True, False, True])
    ref, *after = compress_step(projected, h, conv, weights, starts=starts, backend="reference")
    columns = starts[:, None].repeat(1, 2)[:, 0]
    parts = CompressorWeights(*map(apart, weights))
    y, *ours = compress_step(
        apart(projected), h.clone(), conv.clone(), parts, starts=columns, backend=backend
    )
    assert relative(y, ref) < 1e-5
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, after))
    if backend == "triton":
        with pytest.raises(ValueError, match=r"h of strides .* cannot be written over; make it"):
            compress_step(projected, apart(h), conv, weights, backend=backend)


@pytest.mark.skipif(not interpreted(), reason="asks for Triton")
def test_numbers_without_kernels():
    held = Held(1, 1, 4, 3, torch.float64, CPU)
    q = torch.zeros(1, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"there are no kernels for torch.float64, but for torch"):
        attend_step(q, q, q, held, torch.zeros(1, dtype=torch.long), backend="triton")
    q = q[None]
    with pytest.raises(ValueError, match=r"there are no kernels for torch.float64"):
        chunk_attention(q, q, q, None, None, backend="triton")


def test_shapes_that_disagree():
    held = Held(2, 2, 4, 3, torch.float32, CPU)
    q, k, lengths = torch.zeros(2, 4, 4), torch.zeros(2, 2, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"must both be \[B, G, D\] = \[2, 2, 4\]"):
        attend_step(q, k[:, :1], k, held, lengths)
    with pytest.raises(ValueError, match=r"q has shape \[2, 3, 4\]; it must be \[2, H, 4\]"):
        attend_step(q[:, :3], k, k, held, lengths)
    with pytest.raises(ValueError, match=r"lengths has shape \[1\], expected \[2\]"):
        attend_step(q, k, k, held, lengths[:1])
    with pytest.raises(ValueError, match=r"ends has shape \[2, 3\]; it must be \[B or 1, G or 1\]"):
        attend_step(q, k, k, held, lengths, ends=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"more has \[2, 1, 4\], expected \[2, 2, 4\] as k"):
        attend_step(q, k, k, held, lengths, more=(k, k[:, :1]))
    with pytest.raises(ValueError, match=r"rotary has \[2, 2\], expected \[B or 1, 1, D/2\]"):
        attend_step(q, k, k, held, lengths, rotary=(torch.zeros(2, 2), torch.zeros(2, 2)))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_shapes_of_a_state_that_disagree(backend):
    """Nothing is written then: the state is as it was."""
    batch, inner, heads, state, taps = 3, 8, 2, 4, 4
    channels = 2 * (inner + 2 * state)
    shapes = ((channels, taps), (2, heads), (2, heads), (2, heads))
    weights = CompressorWeights(*(torch.randn(shape) for shape in shapes))
    projected = torch.randn(batch, 2 * inner + channels + 2 * heads)
    h = torch.randn(batch, 2 * heads, state, inner // heads)
    conv = torch.randn(batch, taps - 1, channels)
    before = h.clone(), conv.clone()
    some = torch.ones(batch, dtype=torch.bool)

    def raises(match: str, **changed: Any) -> None:
        given = {"projected": projected, "h": h, "conv": conv, "weights": weights, **changed}
        with pytest.raises(ValueError, match=re.escape(match)):
            compress_step(**given, backend=backend)
        assert torch.equal(h, before[0]) and torch.equal(conv, before[1])

    sizes = "for h of shape [3, 4, 4, 4] and weights.conv of shape [32, 4]"
    raises(f"conv has shape [3, 2, 32], expected [3, 3, 32] {sizes}", conv=conv[:, 1:])
    raises(f"conv has shape [3, 3, 31], expected [3, 3, 32] {sizes}", conv=conv[..., 1:])
    raises(f"conv has shape [1, 3, 32], expected [3, 3, 32] {sizes}", conv=conv[:1])
    for wrong in (projected[:, :-1], projected[:2], projected[0]):
        shape = list(wrong.shape)
        raises(f"projected has shape {shape}, expected [3, 52] {sizes}", projected=wrong)
    for name in ("starts", "mask"):
        for wrong in (some[:1], some[:, None], some.repeat(2)):
            raises(f"{name} has shape {list(wrong.shape)}, expected [3] {sizes}", **{name: wrong})
    for name in ("A_log", "dt_bias", "D_skip"):
        narrow = weights._replace(**{name: getattr(weights, name)[:, :1]})
        raises(f"weights.{name} has shape [2, 1], expected [2, 2] {sizes}", weights=narrow)
    for wrong in (weights.conv[:31], weights.conv[0], weights.conv[:, :0]):
        match = f"weights.conv has shape {list(wrong.shape)}, expected [32, r+1] for h of shape"
        raises(f"{match} [3, 4, 4, 4]", weights=weights._replace(conv=wrong))
    for wrong in (h[:, :3], h[0]):
        raises(f"h has shape {list(wrong.shape)}; it must be [B, 2S, N, W]", h=wrong)
