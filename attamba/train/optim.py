"""AdamW, its parameter groups, its schedule; a run's tensors under their names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attamba.config import OptimConfig, RunConfig

STATE = ("step", "exp_avg", "exp_avg_sq")
NO_DECAY = "_no_weight_decay"
"""Attribute of parameters that are sets of vectors, whatever their shape."""


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
        vector = parameter.ndim < 2 or getattr(parameter, NO_DECAY, False)
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


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; one that has two names (tied) by its first."""
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def is_spread(tensor: Tensor) -> bool:
    """Is it a DTensor, spread over ranks? (Told without importing those, which takes long.)"""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; another tensor itself."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all elements together; of DTensors that of the whole tensors, on every rank.

    DTensors lie on all ranks together, which call this at once, whatever their placements.
    """
    tensors = list(tensors)
    norms = torch._foreach_norm([local(tensor).float() for tensor in tensors])
    if not any(map(is_spread, tensors)):
        return torch.stack(norms).square().sum().sqrt()
    # Numbers of the host, which go with the kernel: a tensor of them would wait for the device.
    shares = torch._foreach_mul(norms, [_copies(tensor) ** -0.5 for tensor in tensors])
    total = torch.stack(shares).square().sum()
    torch.distributed.all_reduce(total)
    return total.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most `limit`, in place; the norm before, over all of them.

    Of DTensors that lie on all ranks together, it is called by all of them and is the same on all.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(map(is_spread, parameters)):
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(grads)
    torch._foreach_mul_(list(map(local, grads)), (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _copies(tensor: Any) -> int:
    """Ranks that hold the same part of a DTensor."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def placed_as(like: Tensor, whole: Tensor) -> Tensor:
    """`whole` itself, or spread as `like` is, without communication: every rank has it whole."""
    if not is_spread(like) or is_spread(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "<parameter name>.<exp_avg, exp_avg_sq or step>".

    The tensors themselves, not copies. A parameter that never had a gradient has none.
    """
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for key in STATE
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put what optimizer_tensors gave into a fresh optimizer of the same model.

    Raises ValueError if a tensor is missing, is left over or has the wrong shape.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    left = dict(tensors)
    for index, name in enumerate(ordered):
        if f"{name}.{STATE[0]}" not in left:
            continue
        try:
            entry = {key: left.pop(f"{name}.{key}") for key in STATE}
        except KeyError as error:
            raise ValueError(f"the optimizer state lacks {error.args[0]}") from error
        for key in STATE[1:]:
            if entry[key].shape != parameters[name].shape:
                raise ValueError(
                    f"{name}.{key} has shape {list(entry[key].shape)}, the parameter "
                    f"{list(parameters[name].shape)}"
                )
            entry[key] = placed_as(parameters[name], entry[key])
        state[index] = entry
    if left:
        raise ValueError(f"the model has no parameter for {min(left)}")
    # Through load_state_dict, which puts each tensor on its parameter's device.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
