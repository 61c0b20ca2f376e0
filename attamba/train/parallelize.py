"""A model made ready to train: float8, activations computed anew, compiled, sharded over ranks.

The model's own code knows of none of these, but that rows and heads may be shared by ranks (see
attamba.ops.row_ranks and Attamba.own_heads). Names of parameters and types of modules stay as they
are (but of linear maps in float8): a module's forward is replaced on the instance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from attamba.config import RunConfig
from attamba.models import Decoder
from attamba.models.splits import Placement, placements, splits
from attamba.ops.row_ranks import RowRanks
from attamba.train.optim import NO_DECAY

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from attamba.train.tensor import TensorRanks

Forward = Callable[..., Tensor]

_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""What activation_checkpointing=selective keeps, beside attention over chunks and the gated
product. Products in float8 are mm too, of torchao's tensors."""


def parallelize(model: Decoder, mesh: DeviceMesh | None, config: RunConfig) -> Forward:
    """Apply config.parallel, train.float8 and train.compile to `model`, in place; return what to
    call.

    Ranks that share rows or layers each get a part of the logits; see tensor_ranks.

    mesh: with the dimensions of distributed.DIMENSIONS; parameters become DTensors on it, on its
        devices. None: one process, on whose device the model is already.

    Gradients are averaged over the ranks of the mesh that work on different tokens.
    """
    if config.train.float8 != "none":
        from attamba.train.float8 import use_float8

        tensor = 1 if mesh is None else mesh["tensor"].size()
        use_float8(model, config.train.float8, tensor)
    if mesh is not None:
        mesh, rows = weights_mesh(mesh), mesh["context"]
        uses = splits(model)
        places = placements(model, uses, mesh["tensor"].size(), mesh["shard"].size())
        if rows.size() > 1:
            model.row_ranks = RowRanks(*_named(rows))
        if mesh["tensor"].size() > 1:
            from attamba.train.tensor import share_layers

            share_layers(model, mesh["tensor"], uses, places)
    kind = config.parallel.activation_checkpointing
    if kind != "none":
        for layer in model.layers:
            _replace_forward(layer, _recomputed(_forward(layer), selective=kind == "selective"))
        if config.train.compile:
            _allow_memo()
    if config.train.compile:
        # Variants of one code object: lengths of the chunks, their phases in layers, and the first
        # layer, which computes what the others find.
        _allow_variants(len(config.train.chunk_sizes or ()) + 2 * len(model.layers) + 8)
    if mesh is None:
        return torch.compile(model) if config.train.compile else model
    if config.train.compile:
        _compile_layers(model)
    _shard(model, mesh, places, config.parallel.gather_dtype == "bfloat16")
    return model


def reduce_on_last(model: nn.Module, is_last: bool) -> None:
    """Do the copies of a sharded model add up their gradients after the backward pass to come?

    Once per step is enough, however many passes it has.
    """
    set_it = getattr(model, "set_requires_all_reduce", None)  # by fully_shard
    if set_it is not None:
        set_it(is_last)


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass leaves gathered."""
    free = getattr(model, "reshard", None)  # by fully_shard
    if free is not None:
        free()


def weights_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh whose "replicate", "shard" and "tensor" are those of parameters.

    Ranks that share rows are among those that share parameters: they need the same ones.
    """
    if mesh["context"].size() == 1:
        return mesh
    from torch.distributed.device_mesh import init_device_mesh

    replicate, shard, context, tensor = mesh.shape
    sizes = (replicate, shard * context, tensor)
    return init_device_mesh(
        mesh.device_type, sizes, mesh_dim_names=("replicate", "shard", "tensor")
    )


def tensor_ranks(mesh: DeviceMesh | None) -> TensorRanks | None:
    """The ranks that share layers, or None where none do."""
    if mesh is None or mesh["tensor"].size() == 1:
        return None
    from attamba.train.tensor import TensorRanks

    return TensorRanks(*_named(mesh["tensor"]))


def _named(mesh: DeviceMesh) -> tuple[int, int, str]:
    """This rank's number along a mesh of one dimension, how many there are, and their group."""
    return mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name


def _recomputed(forward: Forward, *, selective: bool) -> Forward:
    options: dict[str, Any] = {}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    # Nothing in a layer draws from torch's random state: random boundaries are hashes.
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **options)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    own = "attamba.chunk_attention", "attamba.gated_product"
    kept = operator in _PRODUCTS or str(operator).startswith(own)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _allow_memo() -> None:
    """Let layers that are computed anew be compiled although they note what others can use.

    Without it torch.compile leaves them uncompiled, and says nothing. The second computation finds
    what the first noted, so nothing is lost if it notes nothing itself.
    """
    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if hasattr(torch._dynamo.config, name):
        setattr(torch._dynamo.config, name, True)


def _allow_variants(n: int) -> None:
    """Without it torch.compile leaves what comes after the eighth uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, n)


def _compile_layers(model: Decoder) -> None:
    """Each layer by itself, so that parameters of one layer at a time need be gathered."""
    for layer in model.layers:
        _replace_forward(layer, torch.compile(_forward(layer)))


def _forward(module: nn.Module) -> Forward:
    return cast(Forward, module.forward)


def _replace_forward(module: nn.Module, forward: Forward) -> None:
    module.forward = forward


def _shard(
    model: Decoder, mesh: DeviceMesh, places: dict[str, Placement], gather_bfloat16: bool
) -> None:
    # Imported where it is needed, as it takes most of a second.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    gathered = torch.bfloat16 if gather_bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
    mesh = mesh["shard"] if mesh["replicate"].size() == 1 else mesh["replicate", "shard"]
    vectors = [n for n, p in model.named_parameters() if hasattr(p, NO_DECAY)]
    dims = {p: places[name].shard_dim for name, p in model.named_parameters()}
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, shard_placement_fn=lambda p: Shard(dims[p]))
    for name in vectors:  # parameters are new ones, without the attributes of the old
        setattr(model.get_parameter(name), NO_DECAY, True)
