"""Which steps are left out: losses and gradients that are not finite, and losses that jump.

All of it stays on the device, so that training does not wait for it: the optimizer is told by a
tensor, as a gradient scaler would tell it, and counts are read when other figures are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attamba.config import SpikesConfig

NORMAL = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""

_NONFINITE, _SPIKES, _IN_A_ROW, _LONGEST, _TAKEN = range(5)


class Guard:
    """Judges every step by its loss and gradient norm, which are those of all ranks on each.

    Once one of the limits is reached every further step is left out, uncounted; `reached` tells.
    """

    def __init__(self, config: SpikesConfig, device: torch.device) -> None:
        self.config = config
        self.losses = torch.full((config.window,), math.nan, device=device)
        """Of the last steps that were taken, float32, the newest last; nan where there is none."""
        self.counts = torch.zeros(5, dtype=torch.long, device=device)
        """Steps left out as not finite, and as spikes; in a row, now and at most; taken."""

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Is the step to be left out? A float32 scalar on the device, 1 if so and 0 if not.

        loss, norm: float32 scalars on the device.
        """
        wrong = ~(loss.isfinite() & norm.isfinite())
        jumps = ~wrong & self._jumps(loss)
        over = self._over()
        out = wrong | jumps | over
        counted = ~over
        nonfinite, spikes = wrong & counted, jumps & counted
        in_a_row = torch.where(over, self.counts[_IN_A_ROW], (self.counts[_IN_A_ROW] + 1) * out)
        self.counts = torch.stack(
            [
                self.counts[_NONFINITE] + nonfinite,
                self.counts[_SPIKES] + spikes,
                in_a_row,
                torch.maximum(self.counts[_LONGEST], in_a_row),
                self.counts[_TAKEN] + ~out,
            ]
        )
        self.losses = torch.where(out, self.losses, torch.cat([self.losses[1:], loss[None]]))
        return out.float()

    def _jumps(self, loss: Tensor) -> Tensor:
        if self.config.threshold is None:
            return torch.zeros_like(loss, dtype=torch.bool)
        median = _median(self.losses)
        spread = NORMAL * _median((self.losses - median).abs())
        full = self.counts[_TAKEN] >= self.config.window
        return full & (loss > median + self.config.threshold * spread)

    def _over(self) -> Tensor:
        skipped = self.counts[_NONFINITE] + self.counts[_SPIKES]
        return (self.counts[_LONGEST] >= self.config.max_in_a_row) | (
            skipped >= self.config.max_skipped
        )

    def reached(self, counts: list[int]) -> str | None:
        """Which limit was reached, in words, if one was.

        counts: what `counts` holds.
        """
        skipped, longest = counts[_NONFINITE] + counts[_SPIKES], counts[_LONGEST]
        for name, n, where in (
            ("max_in_a_row", longest, " in a row"),
            ("max_skipped", skipped, " in all"),
        ):
            limit = getattr(self.config, name)
            if n >= limit:
                told = "a step was" if n == 1 else f"{n} steps{where} were"
                return f"{told} left out (spikes.{name}={limit})"
        return None

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON: `restore` goes on exactly."""
        known = [loss for loss in self.losses.tolist() if not math.isnan(loss)]
        return {"counts": self.counts.tolist(), "losses": known}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo `state`; another spikes.window keeps the newest losses."""
        known = state["losses"][-self.config.window :]
        self.losses.fill_(math.nan)
        if known:
            self.losses[-len(known) :] = torch.tensor(known)
        self.counts.copy_(torch.tensor(state["counts"]))


def n_skipped(counts: list[int]) -> int:
    """Steps that were left out, of Guard.counts."""
    return counts[_NONFINITE] + counts[_SPIKES]


def step_unless(optimizer: torch.optim.Optimizer, out: Tensor) -> None:
    """The optimizer's step; where `out` is 1 it changes nothing, not even the count of its steps.

    Fused optimizers take such a tensor from gradient scalers.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = out  # type: ignore[attr-defined]
        optimizer.step()
    elif not out.item():
        optimizer.step()


def _median(values: Tensor) -> Tensor:
    """The lower median, without waiting for the device; nan counts as large."""
    return values.sort().values[(len(values) - 1) // 2]
