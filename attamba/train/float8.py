"""Linear maps in float8 while training, by torchao.

A linear map is three products: its output, and the gradients of its input and of its weight. Their
factors are float8, sums are not. A factor is scaled into float8's range by its own largest entry,
in the moment it is used (dynamic scaling), so there is no state. Weights, their gradients, what
enters a map and what leaves it have the types that they have without it.

    tensorwise    one scale per tensor; e4m3, and e5m2 for gradients of outputs (arXiv 2209.05433)
    rowwise       one scale per row of a factor, a power of two; e4m3 everywhere

Only maps inside layers are meant. The rounding of embedding and head would be in every logit and
every gradient; the compressors' last products belong to no module of their own.

Only training is: validation, scoring and decoding of the same model use its weights as a
checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from attamba.config import ConfigError, RunConfig
from attamba.data.errors import require
from attamba.models import Decoder
from attamba.models.splits import splits
from attamba.modules.layers import product

MULTIPLE = 16
"""Of which the card's float8 products need both widths of a weight to be; torchao pads tokens."""

CAPABILITY = (8, 9)
"""CUDA compute capability from which on there are float8 products: Ada, Hopper, Blackwell."""


def check_float8(config: RunConfig, device: torch.device) -> None:
    """Can train.float8 be used on this device?

    Raises ConfigError where the device has no float8 products; MissingPackageError (an ImportError)
    without torchao.
    """
    name = config.train.float8
    if name == "none":
        return
    found = None if device.type != "cuda" else torch.cuda.get_device_capability(device)
    if found is None or found < CAPABILITY:
        told = device.type
        if found is not None:
            told = f"{torch.cuda.get_device_name(device)} ({found[0]}.{found[1]})"
        raise ConfigError(
            f"train.float8={name} needs a CUDA device of compute capability "
            f"{CAPABILITY[0]}.{CAPABILITY[1]} or higher (Ada, Hopper, Blackwell), and this run is "
            f"on {told}; set train.float8=none"
        )
    require("torchao.float8", "float8")


def use_float8(model: Decoder, recipe: str, tensor: int = 1) -> list[str]:
    """Let linear maps of `model`'s layers train in float8, in place; return the maps' names.

    Parameters stay the same objects under the same names.

    recipe: tensorwise or rowwise.
    tensor: ranks that are to share each layer, by parallel.tensor.

    Raises ConfigError where no linear map has widths that float8 products take.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = _fitting(model, tensor)
    if not names:
        shared = f" on each of parallel.tensor={tensor} ranks" if tensor > 1 else ""
        raise ConfigError(
            f"train.float8={recipe}: no linear map of the layers has an input and an output width"
            f"{shared} that {MULTIPLE} divides; make model.dim a multiple of "
            f"{MULTIPLE * tensor}, or set train.float8=none"
        )
    config = replace(Float8LinearConfig.from_recipe_name(recipe), pad_inner_dim=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.forward = partial(_forward, linear, linear.forward)  # type: ignore[method-assign]
    return names


def _forward(linear: nn.Linear, in_float8: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return in_float8(x) if linear.training else product(x, linear.weight)


def _fitting(model: Decoder, tensor: int) -> list[str]:
    """Names of the linear maps whose parts on a rank MULTIPLE divides both ways."""
    uses = splits(model)
    found = []
    for name, module in model.layers.named_modules(prefix="layers"):
        if not isinstance(module, nn.Linear):
            continue
        sizes, split = list(module.weight.shape), uses[f"{name}.weight"]
        if split.dim is not None:
            sizes[split.dim] = sum(end - begin for begin, end in split.used(0, tensor))
        if all(size % MULTIPLE == 0 for size in sizes):
            found.append(name)
    return found
