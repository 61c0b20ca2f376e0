"""Training steps that must not wait for a CUDA device."""

from __future__ import annotations

import torch

from attamba.config import RunConfig
from attamba.train.loop import open_loop


def assert_steps_do_not_wait(config: RunConfig) -> None:
    """After three steps, which compile and make the optimizer's state, three that wait for nothing;
    none of them is left out."""
    with open_loop(config) as loop:
        for _ in range(3):
            loop.run.take_step()
        loop.run.read()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                loop.run.take_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loop.run.read()["skipped"] == 0
