"""Statistics of each layer while a model trains.

Shapes: B rows, T tokens, n queries that are looked at, H query heads, G key/value heads, D width of
a head.
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
from attamba.train import losses
from attamba.train.observers import Observer
from attamba.train.optim import total_norm
from attamba.train.parallelize import reshard
from attamba.train.sinks import Record

if TYPE_CHECKING:
    from attamba.train.run import Run

Figures = dict[str, dict[str, Tensor]]
"""By figure, then by module: scalars on the device, nan where there is none."""


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
    queries and heads, past_entropy over queries that see earlier chunks. All are means over ranks,
    activation_absmax the largest. Attention is not looked at where ranks share the tokens of a row
    (parallel.context). In such a step each rank holds its weights twice.
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
        shared = run.config.parallel.context > 1  # a rank has not all keys of its row
        assert run.batch is not None
        row = Batch(run.batch.inputs[:1], run.batch.targets[:1], run.batch.doc_ids[:1])
        sent = losses.on_device(row, run.device)
        with (
            _watched(run.model, figures, 0 if shared else self._queries),
            run.drawn_chunks(),
            torch.compiler.set_stance("force_eager"),  # hooks within a compiled layer are not heard
        ):
            run.logits(sent, run.forward)
        reshard(run.model)
        for name, by_name in figures.items():
            largest = name == "activation_absmax"
            values = torch.stack(list(by_name.values()))
            values = run.ranks.most(values) if largest else run.ranks.sum(values) / run.ranks.size
            figures[name] = dict(zip(by_name, values.unbind()))
        figures["activation_rms"] = {n: v.sqrt() for n, v in figures["activation_rms"].items()}
        return figures


def by_module(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of embed, layers.0, ..., norm, head; a tied head's are embed's."""
    modules: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        modules[".".join(parts[: 2 if parts[0] == "layers" else 1])].append(parameter)
    return modules


@contextmanager
def _watched(model: nn.Module, figures: Figures, queries: int) -> Iterator[None]:
    """Layers note what they put out, RMS as the mean square, and what their attention sees.

    queries: whose attention is looked at; 0 for none.
    """
    with ExitStack() as hooks:
        for name, layer in model.get_submodule("layers").named_children():
            module = f"layers.{name}"

            def note(_: Any, inputs: Any, output: Tensor, module: str = module) -> None:
                values = output.float()
                figures["activation_rms"][module] = values.square().mean()
                figures["activation_absmax"][module] = values.abs().max()

            mixer = layer.get_submodule("mixer")
            assert isinstance(mixer, TimeMixer)
            hooks.enter_context(layer.register_forward_hook(note))
            if queries and hasattr(mixer, "wo"):
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
            for figure, value in attention_figures(seen, span.doc_ids, queries).items():
                figures[figure][module] = value

    keep = mixer.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    hooks.enter_context(keep)
    hooks.enter_context(mixer.get_submodule("wo").register_forward_pre_hook(look))


def attention_figures(
    seen: AttentionInputs, doc_ids: Tensor | None, queries: int
) -> dict[str, Tensor]:
    """Entropies of attention weights, and their share on the past; see LayerStatistics.

    By the formula, in float32, for `queries` of the T queries, evenly spread, the last among them.

    doc_ids: int [B, T]; documents do not see each other.
    """
    seq = seen.q.shape[1]
    n = min(queries, seq)
    chosen = torch.arange(1, n + 1, device=seen.q.device) * seq // n - 1
    window, past = _masks(seen, doc_ids, chosen)
    groups = seen.k.shape[2]
    q = seen.q[:, chosen].float().unflatten(2, (groups, -1))
    scores = torch.einsum("bngrd,bsgd->bgrns", q, seen.k.float()) * seen.q.shape[-1] ** -0.5
    hidden = ~(window | past)
    logs = scores.masked_fill(hidden, -math.inf).log_softmax(-1)
    share = logs.exp().mul(past).sum(-1)
    with_past = past.any(-1).expand_as(share)
    return {
        "attention_entropy": _entropy(logs).mean(),
        "window_entropy": _entropy(scores.masked_fill(~window, -math.inf).log_softmax(-1)).mean(),
        "past_entropy": _entropy(
            scores.masked_fill(~past, -math.inf).log_softmax(-1)[with_past]
        ).mean(),
        "past_share": share.mean(),
    }


def _masks(seen: AttentionInputs, doc_ids: Tensor | None, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys the chosen queries see in the window, and beyond it: bool [B, G or 1, 1, n, T]."""
    key = torch.arange(seen.q.shape[1], device=chosen.device)
    distance = chosen[:, None] - key
    earlier = (distance >= 0)[None]
    if doc_ids is not None:
        earlier = earlier & (doc_ids[:, chosen, None] == doc_ids[:, None, :])
    earlier = earlier[:, None, None]
    if seen.leading_tokens is None:
        return earlier, torch.zeros_like(earlier)
    window = earlier & (distance <= seen.leading_tokens)
    if seen.ends is None:
        return window, torch.zeros_like(window)
    return window, (earlier & ~window) & seen.ends[:, :, None, None, :]


def _entropy(logs: Tensor) -> Tensor:
    """Of distributions over the last dimension, in nats, from logarithms."""
    return -(logs.exp() * logs.nan_to_num(neginf=0.0)).sum(-1)
