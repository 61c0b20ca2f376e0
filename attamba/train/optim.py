"""AdamW, its parameter groups, its schedule, and its state under parameter names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attamba.config import OptimConfig, RunConfig

_STATE = ("step", "exp_avg", "exp_avg_sq")


def lr_at(step: int, config: RunConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0: a pure function.

    Linear from lr / warmup_steps at step 0 to lr at step warmup_steps - 1; then half a cosine
    from lr at step warmup_steps to lr * min_lr_ratio at the last step. A run that is shorter than
    its warm-up never reaches lr.
    """
    optim, steps = config.optim, config.train.steps
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = min(1.0, (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps))
    cosine = (1 + math.cos(math.pi * done)) / 2
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, "params" with "weight_decay" each: matrices decay, vectors do not.

    A parameter of two dimensions or more that stands for a set of vectors says so by an attribute
    `_no_weight_decay = True`. Parameters that need no gradient are in neither.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        vector = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        (plain if vector else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over parameter_groups; one fused kernel per step on CPU and CUDA."""
    device = next(model.parameters()).device
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=device.type in ("cpu", "cuda"),
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "<parameter name>.<exp_avg, exp_avg_sq or step>".

    The tensors themselves, not copies. A parameter that never had a gradient has none.
    """
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in _STATE
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put what optimizer_tensors gave into a fresh optimizer of the same model.

    Raises ValueError if a tensor is missing, is left over or has the wrong shape.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
    shapes = {name: parameter.shape for parameter, name in names.items()}
    state: dict[int, dict[str, Tensor]] = {}
    left = dict(tensors)
    for index, name in enumerate(ordered):
        if f"{name}.{_STATE[0]}" not in left:
            continue
        try:
            entry = {key: left.pop(f"{name}.{key}") for key in _STATE}
        except KeyError as error:
            raise ValueError(f"the optimizer state lacks {error.args[0]}") from error
        for key in _STATE[1:]:
            if entry[key].shape != shapes[name]:
                raise ValueError(
                    f"{name}.{key} has shape {list(entry[key].shape)}, the parameter "
                    f"{list(shapes[name])}"
                )
        state[index] = entry
    if left:
        raise ValueError(f"the model has no parameter for {min(left)}")
    # Through load_state_dict, which puts each tensor on its parameter's device.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
