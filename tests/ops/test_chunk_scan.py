"""Chunk scan: the vectorised backend against the plain recurrence, outputs and every gradient."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attamba.ops import chunk_scan
from attamba.ops.backends import interpreted

BATCH, S, W, N = 2, 4, 3, 5
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


@pytest.fixture(autouse=True)
def _poison():
    """Memory that is not written to is NaN, so what is forgotten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _inputs(seq, groups=None, state=True, skip=True, dtype=torch.float32) -> dict[str, Tensor]:
    """groups: None for B and C shared by all heads."""
    shared = () if groups is None else (groups,)
    inputs = {
        "x": torch.randn(BATCH, seq, S, W).to(dtype),
        "dt": torch.rand(BATCH, seq, S) * 0.5,
        "A": -torch.rand(S) * 2 - 0.01,
        "B": torch.randn(BATCH, seq, *shared, N).to(dtype),
        "C": torch.randn(BATCH, seq, *shared, N).to(dtype),
        "starts": torch.rand(BATCH, seq) < 0.1,
    }
    if skip:
        inputs["D"] = torch.randn(S)
    if state:
        inputs["initial_state"] = torch.randn(BATCH, S, N, W)
    return inputs


def _run(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input for fixed random cotangents."""
    leaves = {
        n: t.detach().clone().requires_grad_() if n in NAMES else t for n, t in inputs.items()
    }
    y, state = chunk_scan(**leaves, return_final_state=True, backend=backend)
    rng = torch.Generator().manual_seed(1)
    loss = (y.float() * torch.randn(y.shape, generator=rng)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=rng)).sum()
    wanted = [n for n in leaves if n in NAMES]
    gradients = torch.autograd.grad(loss, [leaves[n] for n in wanted], materialize_grads=True)
    results = {"y": y, "state": state, **{f"d{n}": g for n, g in zip(wanted, gradients)}}
    return {n: t.detach() for n, t in results.items()}


def _check(inputs: dict[str, Tensor], bound: float = 1e-5, absolute: float = 1e-6) -> None:
    got = _run(inputs, "torch")
    plain = {n: t.float() if n in NAMES else t for n, t in inputs.items()}
    want = _run(plain, "reference")
    assert got["y"].dtype == inputs["x"].dtype and got["state"].dtype == torch.float32
    for name, b in want.items():
        a = got[name].float()
        assert a.shape == b.shape and a.isfinite().all(), name
        error = (a - b).norm()
        assert error <= bound * b.norm() or error < absolute, f"{name}: {error / b.norm():.2e}"


# 1100 tokens are 35 tiles, so two levels of states pass over each other.
@pytest.mark.parametrize("seq", [1, 2, 31, 32, 33, 63, 64, 65, 1100])
@pytest.mark.parametrize("groups", [None, 2])
def test_equals_the_recurrence(seq, groups):
    _check(_inputs(seq, groups))


@pytest.mark.parametrize("seq", [1, 65])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_optional_inputs(seq, state, skip):
    _check(_inputs(seq, S, state, skip))


@pytest.mark.parametrize("seq", [1, 33, 130])
@pytest.mark.parametrize(
    "starts",
    [
        lambda seq: torch.zeros(seq),
        lambda seq: torch.ones(seq),
        lambda seq: torch.arange(seq) % 8 == 0,
        lambda seq: torch.arange(seq) % 32 == 31,
        lambda seq: torch.arange(seq) == seq - 1,
        lambda seq: torch.arange(2)[:, None] == torch.arange(seq) % 2,
    ],
    ids=["none", "all", "P=8", "P=32", "last", "[B, T]"],
)
def test_starts(seq, starts):
    _check({**_inputs(seq), "starts": starts(seq).bool()})


def test_every_token_a_start_keeps_nothing():
    inputs = {**_inputs(70), "starts": torch.ones(70, dtype=torch.bool)}
    y, state = chunk_scan(**inputs, return_final_state=True)
    inner = (inputs["B"] * inputs["C"]).sum(-1)[..., None, None]
    own = (inner * inputs["dt"][..., None] + inputs["D"][:, None]) * inputs["x"]
    assert torch.allclose(y, own, atol=1e-5)
    last = inputs["dt"][:, -1, :, None, None] * inputs["B"][:, -1, None, :, None]
    assert torch.allclose(state, last * inputs["x"][:, -1, :, None], atol=1e-5)


@pytest.mark.parametrize("seq", [1, 40])
def test_a_step_of_zero_freezes_the_state(seq):
    inputs = _inputs(seq)
    inputs["dt"].zero_()
    inputs["starts"].zero_()
    y, state = chunk_scan(**inputs, return_final_state=True)
    assert torch.allclose(state, inputs["initial_state"])
    read = torch.einsum("btn,bsnw->btsw", inputs["C"], inputs["initial_state"])
    assert torch.allclose(y, read + inputs["D"][:, None] * inputs["x"], atol=1e-5)


@pytest.mark.parametrize("seq", [1, 65, 300])
def test_bfloat16(seq):
    _check(_inputs(seq, 2, dtype=torch.bfloat16), bound=2e-2)


@pytest.mark.parametrize("rate", [-50.0, -1e4, -1e-4, 0.0])
def test_extreme_decays_have_finite_and_right_gradients(rate):
    inputs = _inputs(200)
    inputs["dt"].fill_(1.0)
    inputs["A"].fill_(rate)
    # The gradient of a decay that forgets everything is zero but for rounding.
    _check(inputs, bound=1e-3, absolute=1e-4)


def test_decays_that_differ_by_orders_of_magnitude_within_a_tile():
    inputs = _inputs(100)
    inputs["dt"] = 10.0 ** (torch.rand(BATCH, 100, S) * 6 - 4)
    _check(inputs, bound=1e-4)


@pytest.mark.parametrize("cut", [1, 32, 50, 64])
def test_halves_chained_by_the_state_are_the_whole(cut):
    inputs = _inputs(65)
    y, state = chunk_scan(**inputs, return_final_state=True)
    timed = {"x", "dt", "B", "C", "starts"}
    first = {n: t[:, :cut] if n in timed else t for n, t in inputs.items()}
    second = {n: t[:, cut:] if n in timed else t for n, t in inputs.items()}
    y1, between = chunk_scan(**first, return_final_state=True)
    second["initial_state"] = between
    y2, last = chunk_scan(**second, return_final_state=True)
    assert torch.allclose(torch.cat([y1, y2], 1), y, atol=1e-5)
    assert torch.allclose(last, state, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_input_returns_the_initial_state(backend):
    inputs = _inputs(0)
    y, state = chunk_scan(**inputs, return_final_state=True, backend=backend)
    assert y.shape == (BATCH, 0, S, W) and torch.equal(state, inputs["initial_state"])
    assert isinstance(chunk_scan(**inputs, backend=backend), Tensor)


def test_strided_inputs():
    inputs = _inputs(65, 2)
    wide = torch.randn(BATCH, 65, S * W + 2 * 2 * N)
    x, b, c = wide.split([S * W, 2 * N, 2 * N], -1)
    inputs |= {
        "x": x.unflatten(-1, (S, W)),
        "B": b.unflatten(-1, (2, N)),
        "C": c.unflatten(-1, (2, N)),
        "dt": torch.rand(BATCH, S, 65).transpose(1, 2),
    }
    assert not inputs["x"].is_contiguous()
    results = chunk_scan(**inputs, return_final_state=True)
    dense = {n: t.contiguous() for n, t in inputs.items()}
    want = chunk_scan(**dense, return_final_state=True, backend="reference")
    for a, b in zip(results, want):
        assert torch.allclose(a, b, atol=1e-4)


def test_autocast_leaves_the_state_in_float32():
    inputs = _inputs(65)
    want = chunk_scan(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chunk_scan(**inputs), want)


def test_compiled_equals_eager():
    torch._dynamo.reset()
    inputs = _inputs(70, 2)
    results = []
    for function in (chunk_scan, torch.compile(chunk_scan, fullgraph=True, backend="aot_eager")):
        x = inputs["x"].clone().requires_grad_()
        y, state = function(**{**inputs, "x": x}, return_final_state=True)
        results.append((y, state, torch.autograd.grad(y.square().sum(), x)[0]))
    for got, want in zip(results[1], results[0]):
        assert torch.allclose(got, want, atol=1e-4)
    torch._dynamo.reset()


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_no_loop_over_tokens():
    def calls(seq: int) -> int:
        inputs = _inputs(seq, state=False)
        inputs["x"].requires_grad_()
        with _Count() as count:
            chunk_scan(**inputs).sum().backward()
        return count.calls

    # The depth is the logarithm of T, in base 32.
    assert calls(1024) == calls(256)
    assert calls(20_000) < 2 * calls(256)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"backend": "torhc"}, "backend='torhc' must be one of: auto, torch, triton, reference"),
        ({"dt": torch.zeros(2, 9, 4)}, r"dt has shape \[2, 9, 4\], expected \[2, 10, 4\]"),
        ({"A": torch.zeros(3)}, r"A has shape \[3\], expected \[4\] for x of shape"),
        ({"B": torch.zeros(2, 9, 5)}, r"B has shape \[2, 9, 1, 5\], expected \[2, 10, 1, 5\]"),
        ({"C": torch.zeros(2, 10, 6)}, r"C has shape \[2, 10, 1, 6\], expected \[2, 10, 1, 5\]"),
        ({"D": torch.zeros(1)}, r"D has shape \[1\], expected \[4\]"),
        ({"starts": torch.zeros(9).bool()}, r"starts has shape \[1, 9\], expected \[2, 10\]"),
        (
            {"initial_state": torch.zeros(2, 4, 3, 5)},
            r"initial_state has shape \[2, 4, 3, 5\], expected \[2, 4, 5, 3\]",
        ),
        (
            {"B": torch.zeros(2, 10, 3, 5), "C": torch.zeros(2, 10, 3, 5)},
            "B has 3 groups, which do not divide the 4 heads of x",
        ),
    ],
)
def test_errors(change, text):
    with pytest.raises(ValueError, match=text):
        chunk_scan(**{**_inputs(10), **change})


def test_a_token_that_lies_apart():
    inputs = _inputs(1)
    inputs["x"] = inputs["x"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    got, want = (chunk_scan(**inputs, backend=backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(not interpreted(), reason="asks for Triton")
@pytest.mark.parametrize("memory, tile", [(1 << 18, 32), (20_000, 16), (5000, None)])
def test_states_and_shared_memory(memory, tile, monkeypatch):
    """With little of it tiles have fewer tokens; with less it is PyTorch, or refused."""
    package, triton = (
        importlib.import_module(f"attamba.ops.chunk_scan{part}") for part in ("", ".triton")
    )
    for module in (package, triton):
        monkeypatch.setattr(module, "shared_memory", lambda device: memory)
    assert triton.tile_tokens(torch.float32, N, W, memory) == tile
    tensors = _inputs(70)
    if tile is None:
        with pytest.raises(ValueError, match="cannot scan states of 5 x 3 here, which need more"):
            chunk_scan(**tensors, backend="triton")
        monkeypatch.setattr(
            package, "choose", lambda name, *_: "triton" if name == "auto" else name
        )  # as "auto" on a GPU
        assert torch.equal(chunk_scan(**tensors), chunk_scan(**tensors, backend="torch"))
        return
    got, want = (_run(tensors, backend) for backend in ("triton", "reference"))
    for name, tensor in want.items():
        assert (got[name] - tensor).norm() < 1e-4 * tensor.norm(), name
