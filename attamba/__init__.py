"""Attention over multi-token states (arXiv 2411.17685).

Names are imported where they are first used, so that `attamba --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attamba import ops
    from attamba.config import ModelConfig, RunConfig
    from attamba.generation import generate
    from attamba.models import Decoder, build_model
    from attamba.train.checkpoint import load

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "attamba.config",
    "RunConfig": "attamba.config",
    "Decoder": "attamba.models",
    "build_model": "attamba.models",
    "generate": "attamba.generation",
    "load": "attamba.train.checkpoint",
}

__all__ = ["Decoder", "ModelConfig", "RunConfig", "build_model", "generate", "load", "ops"]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("attamba.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'attamba' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
