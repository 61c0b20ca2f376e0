"""Statistics of each layer while a model trains.

Shapes: B rows, T tokens, W those of this rank (all, where ranks do not share rows), n queries that
are looked at, H query heads, G key/value heads, r = H/G, D width of a head.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attamba.data import Batch
from attamba.modules.mixer import AttentionInputs, TimeMixer
from attamba.ops.row_ranks import RowRanks, all_reduce
from attamba.train import losses
from attamba.train.observers import Observer
from attamba.train.optim import total_norm
from attamba.train.parallelize import reshard
from attamba.train.sinks import Record

if TYPE_CHECKING:
    from attamba.train.run import Run

Figures = dict[str, dict[str, Tensor]]
"""By figure, then by module: scalars on the device, nan where there is none. Of one rank, before it
is put together with others: means as [2], a sum and the number of its terms."""


class LayerStatistics(Observer):
    """Every metrics.layers_every steps a record of kind "layers", each figure by module:

    activation_rms, activation_absmax
                     of a layer's output, before the step
    grad_norm        of the layer's parameters (and of embed, norm, head), before clipping
    update_ratio     norm of what the step added to them over their norm before
    attention_entropy, window_entropy, past_entropy
                     nats, of the attention weights: all of them, those in the window and those on
                     earlier chunks, each part made a distribution of its own
    past_share       of the weights, on earlier chunks

    Activations and attention are those of the first row of each rank, in a forward pass of its own
    that is not compiled; attention those of metrics.layers_queries queries of it, as a mean over
    queries and heads, past_entropy over queries that see earlier chunks. All are means over the
    rows, tokens and heads of all ranks, activation_absmax the largest. In such a step each rank
    holds its weights twice.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._every = run, run.config.metrics.layers_every
        self._queries = run.config.metrics.layers_queries
        self._figures: Figures = {}
        self._before: list[Tensor] = []
        run.optimizer.register_step_pre_hook(self._before_update)
        run.optimizer.register_step_post_hook(self._after_update)

    def after_step(self, run: Run) -> list[Record]:
        if not self._figures:
            return []
        keys = [(name, module) for name, of in self._figures.items() for module in of]
        values = torch.stack([self._figures[name][module].float() for name, module in keys])
        run.read()  # waits for the step, which counts as time of training
        record: Record = {"kind": "layers"}
        for (name, module), value in zip(keys, values.tolist()):
            record.setdefault(name, {})[module] = value if math.isfinite(value) else None
        self._figures = {}
        return [record]

    @torch.no_grad()
    def _before_update(self, optimizer: Any, *_: Any) -> None:
        run = self._run
        if (run.step + 1) % self._every:
            return
        self._before = [p.detach().clone() for p in run.model.parameters()]
        self._figures = self._of_forward() | {"grad_norm": self._of_gradients()}

    @torch.no_grad()
    def _after_update(self, optimizer: Any, *_: Any) -> None:
        if not self._before:
            return
        modules = by_module(self._run.model)
        before = dict(zip(self._run.model.parameters(), self._before))
        self._figures["update_ratio"] = {
            name: total_norm(p.detach() - before[p] for p in own)
            / total_norm(before[p] for p in own)
            for name, own in modules.items()
        }
        self._before = []

    def _of_gradients(self) -> dict[str, Tensor]:
        """Norms as they were before clipping made all smaller by one factor."""
        limit = self._run.config.optim.grad_clip
        scale = ((self._run.pending[1] + 1e-6) / limit).clamp(min=1) if limit else 1.0
        modules = by_module(self._run.model).items()
        return {
            name: scale * total_norm(p.grad for p in own if p.grad is not None)
            for name, own in modules
        }

    def _of_forward(self) -> Figures:
        """What a forward pass over the first row shows, over all ranks."""
        run, figures = self._run, defaultdict[str, dict[str, Tensor]](dict)
        assert run.batch is not None
        sent = losses.on_device(_looked_at(run.batch), run.device)
        with (
            _watched(run.model, figures, self._queries),
            run.drawn_chunks(),
            torch.compiler.set_stance("force_eager"),  # hooks within a compiled layer are not heard
        ):
            run.logits(sent, run.forward)
        reshard(run.model)
        for name, by_name in figures.items():
            values = torch.stack(list(by_name.values()))
            if name == "activation_absmax":
                of_all = run.ranks.most(values)
            else:
                sums, numbers = run.ranks.sum(values).unbind(1)
                of_all = sums / numbers
            figures[name] = dict(zip(by_name, of_all.unbind()))
        figures["activation_rms"] = {n: v.sqrt() for n, v in figures["activation_rms"].items()}
        return figures


def _looked_at(batch: Batch) -> Batch:
    """The first row of a rank's own."""
    return Batch(batch.inputs[:1], batch.targets[:1], batch.doc_ids[:1])


def by_module(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of embed, layers.0, ..., norm, head; a tied head's are embed's."""
    modules: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        modules[".".join(parts[: 2 if parts[0] == "layers" else 1])].append(parameter)
    return modules


@contextmanager
def _watched(model: nn.Module, figures: Figures, queries: int) -> Iterator[None]:
    """Layers note what they put out, RMS as the mean square, and what their attention sees."""
    with ExitStack() as hooks:
        for name, layer in model.get_submodule("layers").named_children():
            module = f"layers.{name}"

            def note(_: Any, inputs: Any, output: Tensor, module: str = module) -> None:
                values = output.float()
                figures["activation_rms"][module] = _summed(values.square())
                figures["activation_absmax"][module] = values.abs().max()

            mixer = layer.get_submodule("mixer")
            assert isinstance(mixer, TimeMixer)
            hooks.enter_context(layer.register_forward_hook(note))
            if hasattr(mixer, "wo"):
                _watch_attention(mixer, figures, queries, module, hooks)
        yield


def _watch_attention(
    mixer: TimeMixer, figures: Figures, queries: int, module: str, hooks: ExitStack
) -> None:
    """Note attention_figures when the mixer comes to its output projection.

    Within its forward pass, where its parameters are those that it computes with.
    """
    given: list[Any] = []

    def look(*_: Any) -> None:
        x, span, _, ends = given[0]
        seen = mixer.attention_inputs(x, span, ends)
        if seen is not None:
            found = attention_figures(seen, span.rows.doc_ids, queries, span.ranks)
            for figure, value in found.items():
                figures[figure][module] = value

    keep = mixer.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    hooks.enter_context(keep)
    hooks.enter_context(mixer.get_submodule("wo").register_forward_pre_hook(look))


def attention_figures(
    seen: AttentionInputs, doc_ids: Tensor | None, queries: int, ranks: RowRanks | None = None
) -> dict[str, Tensor]:
    """Entropies of attention weights, and their share on the past; see LayerStatistics.

    By the formula, in float32, for `queries` of the T queries, evenly spread, the last among them.
    Ranks that share rows each compare them with their own keys.

    doc_ids: int [B, T]; documents do not see each other.

    Returns [2] each: the sum over queries and heads, and their number.
    """
    width, device = seen.q.shape[1], seen.q.device
    first, seq = (0, width) if ranks is None else (ranks.rank * width, ranks.size * width)
    n = min(queries, seq)
    chosen = torch.arange(1, n + 1, device=device) * seq // n - 1
    window, past = _masks(seen, doc_ids, chosen, first)
    q = _of_queries(seen.q.float(), chosen - first, ranks).unflatten(2, (seen.k.shape[2], -1))
    scores = torch.einsum("bngrd,bsgd->bgrns", q, seen.k.float()) * seen.q.shape[-1] ** -0.5
    (log_all, of_all), (_, of_window), (log_past, of_past) = (
        _log_mass_and_entropy(scores.masked_fill(~mask, -math.inf), ranks)
        for mask in (window | past, window, past)
    )
    return {
        "attention_entropy": _summed(of_all),
        "window_entropy": _summed(of_window),
        "past_entropy": _summed(of_past, log_past > -math.inf),
        "past_share": _summed((log_past - log_all).exp()),
    }


def _of_queries(q: Tensor, places: Tensor, ranks: RowRanks | None) -> Tensor:
    """Queries at these places, of whichever rank has them: [B, W, H, D] -> [B, n, H, D]."""
    if ranks is None:
        return q[:, places]
    here = (places >= 0) & (places < q.shape[1])
    own = q[:, places.where(here, 0)] * here[:, None, None]
    return all_reduce(own, ranks.group)


def _masks(
    seen: AttentionInputs, doc_ids: Tensor | None, chosen: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Which keys the chosen queries see in the window, and beyond it: bool [B, G or 1, 1, n, W].

    first: the place in the row of the first of the W keys.
    """
    key = first + torch.arange(seen.k.shape[1], device=chosen.device)
    distance = chosen[:, None] - key
    earlier = (distance >= 0)[None]
    if doc_ids is not None:
        earlier = earlier & (doc_ids[:, chosen, None] == doc_ids[:, None, key])
    earlier = earlier[:, None, None]
    if seen.leading_tokens is None:
        return earlier, torch.zeros_like(earlier)
    window = earlier & (distance <= seen.leading_tokens)
    if seen.ends is None:
        return window, torch.zeros_like(window)
    return window, (earlier & ~window) & seen.ends[:, :, None, None, :]


def _log_mass_and_entropy(scores: Tensor, ranks: RowRanks | None) -> tuple[Tensor, Tensor]:
    """Of softmax over the last dimension, whose keys ranks may share; [..., W] -> [...] twice.

    log sum(exp(s)), and the entropy in nats; -inf and nan where all scores are -inf.
    """
    top = scores.amax(-1)
    if ranks is not None:
        top = all_reduce(top, ranks.group, "max")
    top = top.where(top > -math.inf, 0.0)
    logs = scores - top[..., None]
    weights = logs.exp()
    sums = torch.stack([weights.sum(-1), (weights * logs.nan_to_num(neginf=0.0)).sum(-1)])
    if ranks is not None:
        sums = all_reduce(sums, ranks.group)
    mass, moment = sums.unbind()
    return mass.log() + top, mass.log() - moment / mass


def _summed(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Sum and number of the values, or of those that are counted: float32 [2]. Does not wait for
    the device."""
    if counted is None:
        return torch.stack([values.sum(), values.new_full((), values.numel())])
    return torch.stack([values.where(counted, 0.0).sum(), counted.sum().to(values.dtype)])
