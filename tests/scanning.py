"""Inputs for the scans and the compressors, and their comparison with the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from attamba.ops import chunk_scan, compress, linear_scan

SCAN_NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
COMPRESS_NAMES = ("proj", "conv_weight", "A", "dt_bias", "D")


def chunk_starts(seq: int, chunk_size: int, rows: int = 1, packed: bool = False, device="cpu"):
    """bool [rows, T]: every chunk_size tokens, the first chunk one shorter; documents cut in."""
    starts = ((torch.arange(seq, device=device) + 1) % chunk_size == 0).expand(rows, -1)
    return starts | (torch.rand(rows, seq, device=device) < 0.05) if packed else starts.clone()


def compress_inputs(
    seq, batch=2, heads=2, width=16, state_dim=8, taps=4, dtype=torch.float32, device="cpu"
) -> dict[str, Tensor]:
    inner = heads * width
    columns = 4 * inner + 4 * state_dim + 2 * heads
    return {
        "proj": torch.randn(batch, seq, columns, device=device).to(dtype),
        "conv_weight": torch.randn(2 * inner + 4 * state_dim, taps, device=device) / 2,
        "A": -torch.rand(2, heads, device=device) * 2 - 0.01,
        "dt_bias": torch.randn(2, heads, device=device) - 1,
        # away from zero, where a vanishing output would be normed and its rounding blown up
        "D": torch.rand(2, heads, device=device) + 0.5,
    }


def scan_inputs(
    seq, batch=2, heads=4, groups=2, width=16, state_dim=8, dtype=torch.float32, device="cpu"
) -> dict[str, Tensor]:
    """All inputs but the starts."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    return {
        "x": draw(batch, seq, heads, width).to(dtype),
        "dt": torch.rand(batch, seq, heads, device=device) / 2,
        "A": -torch.rand(heads, device=device) * 2 - 0.01,
        "B": draw(batch, seq, groups, state_dim).to(dtype),
        "C": draw(batch, seq, groups, state_dim).to(dtype),
        "D": draw(heads),
        "initial_state": draw(batch, heads, state_dim, width),
    }


def run_compress(inputs: dict[str, Tensor], starts: Tensor, backend: str, **options):
    """Output, and the gradient of every input for a fixed random cotangent."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    y = torch.cat(compress(**leaves, starts=starts, backend=backend, **options), -1)
    rng = torch.Generator(y.device).manual_seed(1)
    loss = (y.float() * torch.randn(y.shape, generator=rng, device=y.device)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, gradients)}}


def run_scan(inputs: dict[str, Tensor], starts: Tensor, backend: str):
    """Output, last state, and the gradient of every input for fixed random cotangents."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    y, state = chunk_scan(**leaves, starts=starts, return_final_state=True, backend=backend)
    rng = torch.Generator(y.device).manual_seed(1)
    loss = sum(
        (t.float() * torch.randn(t.shape, generator=rng, device=y.device)).sum() for t in (y, state)
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    results = {"y": y, "state": state, **{f"d{n}": g for n, g in zip(leaves, gradients)}}
    return {n: t.detach() for n, t in results.items()}


def linear_inputs(seq, batch=2, channels=5, dtype=torch.float32, device="cpu") -> dict[str, Tensor]:
    """All inputs but the starts; of the decays a tenth are 0, a tenth 1 and a third almost 1."""
    a = torch.rand(batch, seq, channels, device=device)
    kind = torch.rand(batch, seq, channels, device=device)
    a = torch.where(kind < 0.4, 1 - a * 1e-3, a)
    a = a.masked_fill(kind < 0.2, 1.0).masked_fill(kind < 0.1, 0.0)
    return {
        "a": a,
        "b": torch.randn(batch, seq, channels, device=device).to(dtype),
        "initial_state": torch.randn(batch, channels, device=device),
    }


def run_linear(inputs: dict[str, Tensor], starts: Tensor, backend: str):
    """States, last state, and the gradient of every input for fixed random cotangents."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    h, state = linear_scan(**leaves, starts=starts, return_final_state=True, backend=backend)
    rng = torch.Generator(h.device).manual_seed(1)
    loss = sum(
        (t.float() * torch.randn(t.shape, generator=rng, device=t.device)).sum() for t in (h, state)
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    results = {"h": h, "state": state, **{f"d{n}": g for n, g in zip(leaves, gradients)}}
    return {n: t.detach() for n, t in results.items()}


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    """Relative error of each result; those of a head's numbers are sums in which terms cancel."""
    for name, b in want.items():
        a = got[name].float()
        assert a.shape == b.shape and a.isfinite().all(), name
        error, slack = (a - b).norm(), 5 if name in ("dA", "ddt_bias", "dD") else 1
        # Rates and steps share their terms; those of the rates vanish where every token starts.
        steps = want.get("ddt", want.get("ddt_bias"))
        scale = b.norm() if name != "dA" or steps is None else max(b.norm(), steps.norm())
        assert error <= slack * bound * scale or error < bound * 0.1 * b.numel() ** 0.5, (
            f"{name}: {float(error / b.norm()):.2e}"
        )


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.float() for n, t in inputs.items()}
