"""Masks and attention heat maps of a trained model reading a text.

The weights are those that the model computes: its own queries, keys, chunk ends and visibility.

Shapes: T tokens, H query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attamba import plots
from attamba.modules.attamba import ChunkAttention
from attamba.modules.attention import Attention
from attamba.ops.chunking import Span, visible
from attamba.ops.rotary import rotate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from attamba.models import Decoder

PANEL = 2.6
"""Inches of a heat map."""
MOST_COLUMNS = 5
FAINTEST = 1e-4
"""Weights below this share of a query's attention are shown as this."""
SHOWN_HEADS = 8
"""Heads of a layer that are drawn one by one."""


@dataclass(frozen=True)
class LayerAttention:
    """What one layer did."""

    layer_idx: int
    seen: Tensor
    """bool [G or 1, T queries, T keys]."""
    weights: Tensor
    """float32 [H, T queries, T keys]; a query's sum to 1."""


@torch.no_grad()
def layer_attention(model: Decoder, ids: Tensor) -> list[LayerAttention]:
    """Attention of every layer that has any, for ids int64 [1, T].

    Raises ValueError for a model without attention.
    """
    taken: dict[int, tuple[Tensor, Span]] = {}
    hooks = [
        layer.mixer.register_forward_pre_hook(
            lambda module, args, i=i: taken.__setitem__(i, (args[0], args[1]))
        )
        for i, layer in enumerate(model.layers)
        if isinstance(layer.mixer, (ChunkAttention, Attention))
    ]
    if not hooks:
        raise ValueError("no layer of this model has attention, so there is nothing to draw")
    try:
        model(ids, return_hidden=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [_of_layer(i, model.layers[i].mixer, *taken[i]) for i in sorted(taken)]


def _of_layer(layer_idx: int, mixer: Any, x: Tensor, span: Span) -> LayerAttention:
    if isinstance(mixer, ChunkAttention):
        ends, _ = mixer.boundary(span)
        q, k, _ = mixer.project(x, ends, span)
    else:
        q = mixer.wq(x).unflatten(-1, (mixer.n_heads, mixer.head_dim))
        k = mixer.wkv(x).unflatten(-1, (2, mixer.n_kv_heads, mixer.head_dim))[:, :, 0]
        rotary = mixer.rotary(span)
        q, k = rotate(q, rotary), rotate(k, rotary)
        ends = torch.zeros(1, 1, x.shape[1], dtype=torch.bool, device=x.device)
    seen = visible(ends, mixer.lead, x.shape[1])[0]
    k = k.repeat_interleave(mixer.n_heads // mixer.n_kv_heads, 2)
    scores = torch.einsum("thd,shd->hts", q[0].float(), k[0].float()) * mixer.head_dim**-0.5
    per_head = seen.repeat_interleave(mixer.n_heads // seen.shape[0], 0)
    weights = scores.masked_fill(~per_head, -torch.inf).softmax(-1)
    return LayerAttention(layer_idx, seen.cpu(), weights.cpu())


def draw_attention(
    checkpoint: str | Path, text: str, out: Path, n_tokens: int, *, device: str = "cpu"
) -> list[Path]:
    """One picture per layer: its mask, the mean of its heads, and each of its first heads.

    text: read from its begin, up to n_tokens tokens, the separator before it included. Returns the
    files, <out>/layer-1.png and so on. Needs matplotlib. Raises what attamba.load does, and
    ValueError for a text that is empty.
    """
    from attamba.train import load

    model, tokenizer = load(checkpoint, device=device)
    ids = [tokenizer.eos_id, *tokenizer.encode(text)][:n_tokens]
    if len(ids) < 2:
        raise ValueError("the text is empty; give a file with text in it")
    tokens = torch.tensor([ids], device=model.embed.weight.device)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for layer in layer_attention(model, tokens):
        path = out / f"layer-{layer.layer_idx + 1}.png"
        _picture(model, layer, tokens.cpu(), path)
        written.append(path)
    return written


def _picture(model: Decoder, layer: LayerAttention, tokens: Tensor, path: Path) -> None:
    plt = plots.pyplot()
    heads = layer.weights[:SHOWN_HEADS]
    panels_needed = 2 + len(heads)
    rows = -(-panels_needed // MOST_COLUMNS)
    columns = -(-panels_needed // rows)
    size = (PANEL * columns + 0.6, PANEL * rows + 0.4)
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        panels = list(axes.flat)
        _mask(panels[0], model, layer, tokens)
        _heat(panels[1], layer.weights.mean(0), f"mean of {len(layer.weights)} heads")
        for i, weights in enumerate(heads):
            image = _heat(panels[2 + i], weights, f"head {i + 1}")
        for unused in panels[panels_needed:]:
            unused.set_visible(False)
        figure.colorbar(image, ax=axes[:, -1].tolist(), label="attention weight", shrink=0.8)
        plots.save(figure, path)


def _mask(ax: Axes, model: Decoder, layer: LayerAttention, tokens: Tensor) -> None:
    """Who sees whom in head 1."""
    from matplotlib.colors import ListedColormap

    kinds = plots.key_kinds(model.config, layer.layer_idx, tokens.shape[1], tokens=tokens)
    colours = (plots.HIDDEN, plots.WINDOW, plots.PAST, plots.SINK)
    ax.imshow(kinds, cmap=ListedColormap(colours), vmin=0, vmax=3, interpolation="nearest")
    which = " of head 1" if len(layer.seen) > 1 else ""
    _labels(ax, f"layer {layer.layer_idx + 1}: mask{which}")


def _heat(ax: Axes, weights: Tensor, title: str) -> Any:
    from matplotlib.colors import LogNorm

    shown = weights.clamp(min=FAINTEST).masked_fill(weights == 0, torch.nan).numpy()
    image = ax.imshow(shown, cmap="viridis", norm=LogNorm(FAINTEST, 1.0), interpolation="nearest")
    _labels(ax, title)
    return image


def _labels(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=9)
    ax.tick_params(labelsize=7)
    ax.set_xlabel("key", fontsize=8)
    ax.set_ylabel("query", fontsize=8)
