"""The device that a run computes on, and torch's random state."""

from __future__ import annotations

import base64

import torch

from attamba.config import ConfigError


def resolve_device(name: str | torch.device, field: str = "device") -> torch.device:
    """The torch device of "auto" (CUDA if there is one, else CPU), "cpu", "cuda", "cuda:1", ...

    field: what the user gave the name to, for messages. Raises ConfigError for a name that is no
    device, or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"{field}={name!r} is not a device; give auto, cpu, cuda, cuda:1, ..."
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{field}={str(name)!r} is not supported; give auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{field}={str(name)!r}: torch sees {torch.cuda.device_count()} CUDA devices; "
            f"set {field}=auto or cpu"
        )
    return device


def rng_state(device: torch.device) -> dict[str, str]:
    """Torch's random states, the CPU's and that of a CUDA `device`, as text for JSON."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(s.numpy().tobytes()).decode() for name, s in states.items()}


def set_rng_state(states: dict[str, str], device: torch.device) -> None:
    """Undo rng_state; a state of a device that this run does not use is left out."""
    tensors = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in states.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
