"""Tensor parallelism: ranks that share a layer, each with some of its heads and inner widths.

    what enters a mixer or a feed-forward part     the same on all ranks; its gradient is summed
    what leaves it                                 summed over ranks
    embedding                                      by rows of the vocabulary, and summed
    head                                           by rows of the vocabulary: logits [B, T, V/n]

as in Megatron-LM (arXiv 1909.08053). Inside, an Attamba layer's compressors have a part of their
SSM heads: the mean square of the norm after the scan is taken over all of them, and what they add
to keys and values is summed to each rank's own key/value heads.

A module computes what its parameters and its sizes say. So it is given smaller sizes, once, and in
each call the parts of the parameters that this rank uses (see models.splits).

Shapes: B rows, T tokens, E inner width of a compressor, V vocabulary, n ranks that share a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attamba.models import Decoder
from attamba.models.decoder import Block
from attamba.models.splits import Placement, Split
from attamba.modules.attamba import ChunkAttention
from attamba.modules.attention import Attention
from attamba.modules.compressor import Compressors
from attamba.modules.mamba2 import Mamba2
from attamba.modules.mixer import TimeMixer
from attamba.modules.pooling import GatedPooling
from attamba.modules.recurrent import Recurrence
from attamba.ops.row_ranks import all_reduce, all_to_all, reduce_scatter

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class TensorRanks:
    """This rank among the n that share each layer."""

    rank: int
    size: int
    group: str
    """Name of the process group."""

    def spread(self, x: Tensor) -> Tensor:
        """x, the same on all ranks, each of which uses a part; its gradient is summed."""
        return _Spread.apply(x, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over ranks, which all of them go on with in the same way."""
        return _Sum.apply(x, self.group)

    def sum_for_parts(self, x: Tensor) -> Tensor:
        """The sum of x over ranks, of which each makes something of its own."""
        return self.spread(self.sum(x))

    def sum_to_parts(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C/n]: the sum of x over ranks, each rank's own part of it."""
        parts = x.unflatten(-1, (self.size, -1)).movedim(-2, 0)
        return reduce_scatter(parts, self.size, self.group)

    def largest(self, x: Tensor) -> Tensor:
        """The largest of x over ranks, without a gradient."""
        return all_reduce(x.detach(), self.group, "max")


def share_layers(
    model: Decoder, mesh: DeviceMesh, uses: dict[str, Split], places: dict[str, Placement]
) -> None:
    """Divide `model`, in place, over a mesh of one dimension; parameters become DTensors on it.

    uses, places: from models.splits.
    """
    ranks = TensorRanks(mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name)
    _distribute(model, mesh, places)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        _shrink(layer.mixer, ranks)
        for name in ("mixer", "ffn"):
            part = layer.get_submodule(name)
            own = _Own(part, _below(uses, f"layers.{i}.{name}."), ranks)
            _replace_forward(part, partial(_shared_forward, part.forward, own, ranks))
    names = ("mixer_norm", "ffn_norm")
    norms = [layer.get_submodule(name) for layer in model.layers for name in names]
    for norm in (*norms, model.norm):
        _replace_forward(norm, partial(_whole_forward, norm.forward, _Own(norm, {}, ranks)))
    own = _Own(model.embed, {"weight": uses["embed.weight"]}, ranks)
    _replace_forward(model.embed, partial(_embed, own, ranks))
    own = _Own(model.head, {"weight": uses.get("head.weight", uses["embed.weight"])}, ranks)
    _replace_forward(model.head, partial(_shared_head, model.head.forward, own, ranks))


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, ignore_index: int, ranks: TensorRanks
) -> Tensor:
    """Summed cross entropy in nats, a scalar; logits float32 [N, V/n], targets int64 [N]."""
    counted = targets != ignore_index
    place = targets - ranks.rank * logits.shape[1]
    here = counted & (place >= 0) & (place < logits.shape[1])
    return _CrossEntropy.apply(logits, place.where(here, 0), here, counted, ranks)


class _CrossEntropy(torch.autograd.Function):
    """One tensor like the logits is kept, and one more is made of it: as torch's own does."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, place: Tensor, here: Tensor, counted: Tensor, ranks: TensorRanks
    ) -> Tensor:
        top = ranks.largest(logits.amax(1))
        shares = (logits - top[:, None]).exp_()
        total = ranks.sum(shares.sum(1))
        chosen = ranks.sum(logits.gather(1, place[:, None])[:, 0] * here)
        ctx.save_for_backward(shares.div_(total[:, None]), place, here, counted)
        return ((total.log() + top - chosen) * counted).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        shares, place, here, counted = ctx.saved_tensors
        d_logits = shares * (counted * grad)[:, None]
        d_logits.scatter_add_(1, place[:, None], -(here * grad)[:, None])
        return d_logits, None, None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


# --------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------


def _distribute(model: Decoder, mesh: DeviceMesh, places: dict[str, Placement]) -> None:
    """Make DTensors of all parameters. Every rank has them whole, so nothing is sent."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in made:
            dim = places[name].tensor_dim
            kind = Replicate() if dim is None else Shard(dim)
            data = distribute_tensor(parameter.data, mesh, [kind], src_data_rank=None)
            made[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            made[parameter].__dict__.update(parameter.__dict__)
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, made[parameter])


class _Own:
    """The parts of a module's parameters that this rank uses."""

    def __init__(self, module: nn.Module, uses: dict[str, Split], ranks: TensorRanks) -> None:
        self.module, self.ranks = module, ranks
        self.uses = {name: uses.get(name) for name, _ in module.named_parameters()}

    def tensors(self) -> dict[str, Tensor]:
        """By name, on this rank."""
        return {name: self._of(self.module.get_parameter(name), name) for name in self.uses}

    def _of(self, parameter: Any, name: str) -> Tensor:
        from torch.distributed.tensor import Partial, Shard

        split = self.uses[name]
        if split is None:  # of a norm between layers, which all ranks compute alike
            return parameter.to_local()
        held = parameter.placements[-1]
        if not isinstance(held, Shard):  # each rank has a part of the gradient
            whole = parameter.to_local(grad_placements=[Partial()])
            return _take(whole, split, self.ranks)
        local = parameter.to_local()
        return local if len(split.segments) == 1 else _exchange(local, split, self.ranks)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module has these for its parameters."""
        owners = {}
        for name, tensor in self.tensors().items():
            path, _, attribute = name.rpartition(".")
            owner = self.module.get_submodule(path)._parameters
            owners[name] = (owner, attribute, owner[attribute])
            owner[attribute] = tensor  # type: ignore[assignment]
        try:
            yield
        finally:
            for owner, attribute, parameter in owners.values():
                owner[attribute] = parameter


def _take(whole: Tensor, split: Split, ranks: TensorRanks) -> Tensor:
    if split.dim is None:
        return whole
    runs = split.used(ranks.rank, ranks.size)
    return torch.cat([whole.narrow(split.dim, a, b - a) for a, b in runs], split.dim)


def _exchange(local: Tensor, split: Split, ranks: TensorRanks) -> Tensor:
    """From the run of rows that each rank holds to the rows that it uses; gradients go back."""
    n = local.shape[0]
    index: list[int] = []
    sent, received = [], []
    for other in range(ranks.size):
        begin = ranks.rank * n
        mine = [_overlap(run, (begin, begin + n)) for run in split.used(other, ranks.size)]
        index += [row - begin for a, b in mine for row in range(a, b)]
        sent.append(sum(b - a for a, b in mine))
        held = (other * n, other * n + n)
        theirs = [_overlap(run, held) for run in split.used(ranks.rank, ranks.size)]
        received.append(sum(b - a for a, b in theirs))
    rows = local.index_select(0, torch.tensor(index, device=local.device))
    return all_to_all(rows, received, sent, ranks.group)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return low, max(low, high)


def _below(uses: dict[str, Split], prefix: str) -> dict[str, Split]:
    return {n.removeprefix(prefix): split for n, split in uses.items() if n.startswith(prefix)}


# --------------------------------------------------------------------------------------------
# Modules
# --------------------------------------------------------------------------------------------


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward


def _shared_forward(
    forward: Callable[..., Tensor], own: _Own, ranks: TensorRanks, x: Tensor, *rest: Any
) -> Tensor:
    with own.in_place():
        return ranks.sum(forward(ranks.spread(x), *rest))


def _shared_head(
    forward: Callable[..., Tensor], own: _Own, ranks: TensorRanks, x: Tensor
) -> Tensor:
    with own.in_place():
        return forward(ranks.spread(x))


def _whole_forward(forward: Callable[..., Tensor], own: _Own, x: Tensor) -> Tensor:
    with own.in_place():
        return forward(x)


def _embed(own: _Own, ranks: TensorRanks, ids: Tensor) -> Tensor:
    (weight,) = own.tensors().values()
    place = ids - ranks.rank * weight.shape[0]
    here = (place >= 0) & (place < weight.shape[0])
    rows = F.embedding(place.clamp(0, weight.shape[0] - 1), weight)
    return ranks.sum(rows * here[..., None])


def _shrink(mixer: TimeMixer, ranks: TensorRanks) -> None:
    """Give a mixer the sizes of a rank's part."""
    n = ranks.size
    if isinstance(mixer, (ChunkAttention, Attention)):
        mixer.n_heads //= n
        mixer.n_kv_heads //= n
    if isinstance(mixer, ChunkAttention):
        heads, width = mixer.n_kv_heads, mixer.n_kv_heads * mixer.head_dim
        mixer.own_heads = slice(ranks.rank * heads, (ranks.rank + 1) * heads)
        mixer.own_columns = slice(ranks.rank * width, (ranks.rank + 1) * width)
        _shrink_compressors(mixer.compressors, ranks)
    elif isinstance(mixer, Mamba2):
        mean = partial(_shared_norm, width=mixer.inner, eps=mixer.norm.eps, ranks=ranks)
        _replace_forward(mixer.norm, lambda y: mean(y) * mixer.norm.weight.to(y.dtype))
        mixer.inner //= n
        mixer.n_heads //= n
        mixer.widths = [mixer.inner, mixer.inner + 2 * mixer.state_dim, mixer.n_heads]
    elif isinstance(mixer, Recurrence):
        mixer.channels //= n


def _shrink_compressors(inside: nn.Module, ranks: TensorRanks) -> None:
    if isinstance(inside, Compressors):
        mean = partial(_shared_norm, width=inside.ssm_dim, eps=inside.norm_eps, ranks=ranks)
        inside.ssm_dim //= ranks.size
        inside.n_heads //= ranks.size
        inside.all_heads = False
        inside.finish = partial(_finish, inside, mean, ranks)  # type: ignore[method-assign]
    elif isinstance(inside, GatedPooling):
        mean = partial(_shared_norm, width=inside.out_dim, eps=inside.norm_eps, ranks=ranks)
        inside.norm = mean  # type: ignore[method-assign]


def _finish(
    inside: Compressors,
    mean: Callable[[Tensor], Tensor],
    ranks: TensorRanks,
    y: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor]:
    """As Compressors.finish, of a part of the inner width; y and z [B, T, 2E/n]."""
    y = mean((y * F.silu(z)).unflatten(-1, (2, -1)))
    y = y * inside.norm_weight.to(y.dtype)
    sums = [F.linear(y[..., i, :], inside.out_proj[i]) for i in range(2)]
    k, v = ranks.sum_to_parts(torch.stack(sums)).unbind(0)
    return k, v


def _shared_norm(y: Tensor, *, width: int, eps: float, ranks: TensorRanks) -> Tensor:
    """y / sqrt(mean(y^2) + eps) over a last dimension of `width` numbers that ranks divide."""
    squares = ranks.sum_for_parts(y.float().square().sum(-1, keepdim=True))
    return (y.float() * (squares / width + eps).rsqrt()).to(y.dtype)
