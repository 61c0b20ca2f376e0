"""The documentation's pictures: chunk ends, masks, states and cache, as the code has them.

`python -m attamba.pictures [FOLDER]` draws them all (default: docs/images). Ends, visibility,
dependence and what a cache holds are asked of the operators and the cache that a model runs on;
nothing is drawn from memory. Needs matplotlib: pip install 'attamba[plot]'.

Shapes: T tokens, P tokens per chunk, L leading tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attamba.config import ModelConfig
from attamba.plots import (
    FAINT,
    HIDDEN,
    IN_PAST,
    IN_WINDOW,
    INK,
    IS_SINK,
    PAST,
    SINK,
    STYLE,
    WINDOW,
    Box,
    Curve,
    colour,
    draw_cache,
    draw_cells,
    draw_curves,
    draw_mask,
    legend,
    pyplot,
    save,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = "the cat sat on the mat, and saw a black cat go by"
"""What boundary "separator" is shown on, in bytes."""


def model_of(n_layers: int = 4, n_heads: int = 1, **mixer: Any) -> ModelConfig:
    """A small model's config: mixer's fields, P=8 and L=4 unless they are given."""
    fields = {"type": "attamba", "n_heads": n_heads, "chunk_size": 8, "leading_tokens": 4}
    if mixer.get("type") == "transformer":
        fields = {"n_heads": n_heads}
    return ModelConfig(dim=64, n_layers=n_layers, mixer=fields | mixer)  # type: ignore[arg-type]


class Policy(NamedTuple):
    """One boundary policy as it is shown."""

    title: str
    config: ModelConfig
    in_training: bool = False
    """Ends as one training step draws them."""
    heads: bool = False
    """Rows are the heads of the first layer, else they are layers."""


POLICIES = (
    Policy("uniform: all layers at once", model_of(boundary="uniform")),
    Policy("cyclic (default): layers take turns", model_of(boundary="cyclic")),
    Policy(
        "head_cyclic: heads take turns too (four heads of layer 1)",
        model_of(n_heads=4, boundary="head_cyclic", ssm_scope="sequence"),
        heads=True,
    ),
    Policy("jitter: cyclic, moved at random in training", model_of(boundary="jitter"), True),
    Policy("random: each position with probability 1/P", model_of(boundary="random")),
    Policy(
        "separator: at spaces, at most 2 P tokens apart",
        model_of(n_layers=1, boundary={"type": "separator", "tokens": [32]}),
    ),
    Policy(
        "budget: fewer than 8 chunks, however long the text",
        model_of(boundary={"type": "budget", "max_chunks": 8}, chunk_size=2),
    ),
)


def policy_ends(policy: Policy, seq_len: int) -> np.ndarray:
    """Where chunks end: bool [rows, T], a row for each layer, or for each head of layer 1."""
    import numpy as np
    import torch

    from attamba.ops.chunking import make_boundary, make_span

    tokens = torch.tensor([list(TEXT.encode()[:seq_len])])
    draw = torch.tensor(1) if policy.in_training else None
    span = make_span(seq_len, torch.device("cpu"), tokens=tokens, draw=draw)
    rows = []
    for layer_idx, mixer in enumerate(policy.config.layer_mixers()):
        boundary = make_boundary(
            mixer.boundary,  # type: ignore[union-attr]
            chunk_size=mixer.chunk_size,  # type: ignore[union-attr]
            layer_idx=layer_idx,
            n_layers=policy.config.n_layers,
            n_kv_heads=mixer.n_heads,  # type: ignore[union-attr]
            sink=mixer.sink,  # type: ignore[union-attr]
        )
        ends = boundary(span)[0][0].numpy()  # [1, T] or [G, T]
        rows.append(ends if policy.heads else ends[:1])
    return rows[0] if policy.heads else np.concatenate(rows)


def draw_chunks(ax: Axes, policy: Policy, seq_len: int) -> None:
    """Chunks of one policy: a bar for each chunk, its end filled, position 0 as the sink."""
    ends = policy_ends(policy, seq_len)
    bars: list[Box] = []
    filled: list[Box] = []
    sinks: list[Box] = []
    for row, here in enumerate(ends):
        start = 0
        for t in range(seq_len):
            if here[t] or t == seq_len - 1:
                bars.append((start + 0.06, row + 0.08, t + 1 - start - 0.12, 0.84))
                start = t + 1
            if here[t]:
                (filled if t else sinks).append((t + 0.06, row + 0.08, 0.88, 0.84))
    for boxes, face in ((bars, HIDDEN), (filled, PAST), (sinks, SINK)):
        draw_cells(ax, boxes, face)
    shows_text = policy.title.startswith("separator")
    for s, character in enumerate(TEXT[:seq_len] if shows_text else ()):
        ax.text(s + 0.5, len(ends) + 0.75, character, ha="center", fontsize=9, color=INK)
    ax.set(xlim=(-0.2, seq_len + 0.2), ylim=(len(ends) + (1 if shows_text else 0.1), -0.1))
    ax.set_title(policy.title, loc="left", pad=4, fontsize=10.5)
    what = "head" if policy.heads else "layer"
    ax.set_yticks(
        [i + 0.5 for i in range(len(ends))], [f"{what} {i + 1}" for i in range(len(ends))]
    )
    _bare(ax)
    ax.set_xticks([])


def chunks() -> Figure:
    """Where each policy's chunks end."""
    seq_len = len(TEXT)
    heights = [policy_ends(p, seq_len).shape[0] + 1.4 for p in POLICIES]
    figure = pyplot().figure(figsize=(9.6, sum(heights) * 0.235 + 0.25))
    grid = figure.add_gridspec(len(POLICIES), 1, height_ratios=heights, hspace=0.42)
    grid.update(left=0.075, right=0.995, top=0.972, bottom=0.01)
    for place, policy in zip(grid, POLICIES):
        draw_chunks(figure.add_subplot(place), policy, seq_len)
    return figure


def masks() -> Figure:
    """The attention masks of several settings, at the same 32 tokens."""
    settings = (
        ("full attention", model_of(type="transformer"), 0),
        ("sliding window of 5", model_of(type="transformer", window=5), 0),
        ("P=8, L=4, uniform", model_of(boundary="uniform"), 0),
        ("cyclic, layer 3 of 4", model_of(), 2),
        ("P=4, L=12", model_of(chunk_size=4, leading_tokens=12), 0),
        ("P=8, L=4, no sink", model_of(sink=False, boundary="uniform"), 0),
    )
    figure = pyplot().figure(figsize=(9.6, 6.9))
    grid = figure.add_gridspec(2, 3, wspace=0.16, hspace=0.3)
    grid.update(left=0.055, right=0.995, top=0.95, bottom=0.065)
    for place, (title, config, layer_idx) in zip(grid, settings):
        draw_mask(figure.add_subplot(place), config, layer_idx, 32, title=title)
    return figure


def mask_and_cache() -> Figure:
    """Two layers' masks, and the cache of one as tokens come in."""
    config = model_of(n_layers=2)
    figure = pyplot().figure(figsize=(12.4, 4.1))
    grid = figure.add_gridspec(1, 3, width_ratios=(1, 1, 1.36), wspace=0.2)
    grid.update(left=0.04, right=0.995, top=0.9, bottom=0.12)
    for layer_idx in range(2):
        ax = figure.add_subplot(grid[layer_idx])
        draw_mask(ax, config, layer_idx, 32, title=f"What layer {layer_idx + 1} sees")
    ax = figure.add_subplot(grid[2])
    draw_cache(ax, config, 0, (8, 16, 24, 32), title="What layer 1 keeps")
    legend(ax)
    return figure


def dependence(scope: str, chunk_size: int, seq_len: int) -> np.ndarray:
    """Which tokens each state of a compressor depends on: bool [T states, T tokens].

    Found by differentiating the scan. scope: "chunk" or "sequence", as mixer.ssm_scope.
    """
    import torch

    from attamba.ops import chunk_scan

    starts = torch.arange(seq_len) % chunk_size == 0
    if scope == "sequence":
        starts = torch.arange(seq_len) == 0
    ones = torch.ones(1, seq_len, 1)

    def states(x: torch.Tensor) -> torch.Tensor:
        y = chunk_scan(x[None, :, None, None], ones, torch.tensor([-0.1]), ones, ones, starts)
        assert isinstance(y, torch.Tensor)
        return y.flatten()

    return (torch.autograd.functional.jacobian(states, torch.ones(seq_len)) != 0).numpy()


def scopes() -> Figure:
    """What a state holds under either scope of the compressors."""
    chunk_size, seq_len = 8, 24
    figure = pyplot().figure(figsize=(9.6, 4.6))
    grid = figure.add_gridspec(1, 2, wspace=0.12)
    grid.update(left=0.055, right=0.995, top=0.92, bottom=0.12)
    for place, scope in zip(grid, ("chunk", "sequence")):
        ax = figure.add_subplot(place)
        holds = dependence(scope, chunk_size, seq_len)
        is_end = [t % chunk_size == chunk_size - 1 for t in range(seq_len)]
        for face, wanted in ((WINDOW, False), (PAST, True)):
            cells = [
                (s + 0.06, t + 0.06, 0.88, 0.88)
                for t in range(seq_len)
                for s in range(seq_len)
                if holds[t, s] and is_end[t] == wanted
            ]
            draw_cells(ax, cells, face)
        ax.set(xlim=(0, seq_len), ylim=(seq_len, 0), aspect="equal", anchor="NW")
        ax.set_title(f"ssm_scope: {scope}", loc="left")
        ax.set_xlabel("token that it depends on")
        ax.set_ylabel("state after token")
        ticks = range(0, seq_len, chunk_size)
        ax.set_xticks([t + 0.5 for t in ticks], [str(t) for t in ticks])
        ax.set_yticks([t + 0.5 for t in ticks], [str(t) for t in ticks])
        _bare(ax)
    return figure


def held_positions(config: ModelConfig, layer_idx: int, n_tokens: int) -> tuple[list, list]:
    """Positions that a real cache holds after n_tokens, one at a time: (ring slots, past).

    An empty slot of the ring is None. Each token's key is its own position, and is read back.
    """
    import torch

    from attamba.modules.kv_cache import KVCache
    from attamba.ops.chunking import make_boundary, make_span

    mixer: Any = config.layer_mixers()[layer_idx]
    boundary = make_boundary(
        mixer.boundary,
        chunk_size=mixer.chunk_size,
        layer_idx=layer_idx,
        n_layers=config.n_layers,
        n_kv_heads=1,
        sink=mixer.sink,
    )
    cpu, window = torch.device("cpu"), mixer.leading_tokens + 1
    kv = KVCache(1, 1, 1, window, boundary.per_head, torch.float32, cpu, backend="torch")
    for t in range(n_tokens):
        span = make_span(1, cpu, offsets=torch.tensor([t]))
        key = torch.full((1, 1, 1, 1), float(t))
        kv.append(key, key, boundary(span)[0], span)
    n_ring, n_past = min(n_tokens, window), int(kv.n_past.max())
    keys = [round(x) for x in kv.k[0, 0, :, 0].tolist()]
    ring = keys[:n_ring] + [None] * (window - n_ring)
    return ring, keys[window : window + n_past]


def draw_steps(ax: Axes, config: ModelConfig, layer_idx: int, steps: Sequence[int]) -> None:
    """Ring and past of one layer at several lengths; the slot just written is outlined."""
    mixer: Any = config.layer_mixers()[layer_idx]
    window, gap = mixer.leading_tokens + 1, 1.2
    for row, n in enumerate(steps):
        ring, past = held_positions(config, layer_idx, n)
        y = row * 1.35
        kinds = [None if s is None else IN_WINDOW for s in ring]
        kinds += [IS_SINK if s == 0 else IN_PAST for s in past]
        for slot, (s, kind) in enumerate(zip([*ring, *past], kinds)):
            x = slot + (gap if slot >= window else 0)
            face = HIDDEN if kind is None else colour(kind)
            draw_cells(ax, [(x + 0.06, y + 0.06, 0.88, 0.88)], face)
            if s is not None:
                ax.text(
                    x + 0.5,
                    y + 0.5,
                    str(s),
                    color="white",
                    ha="center",
                    va="center_baseline",
                    fontsize=9,
                    fontweight="bold",
                )
            if s == n - 1:
                ax.plot([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], color=INK, lw=1.4)
        ax.text(-0.4, y + 0.5, f"{n} tokens", ha="right", va="center_baseline", color=FAINT)
    for x, text in ((0, f"ring: the last L+1 = {window}"), (window + gap, "past: chunk ends")):
        ax.text(x, -0.35, text, color=INK, fontweight="bold")
    ax.set(xlim=(-0.1, 10.3), ylim=(len(steps) * 1.35, -0.4), aspect="equal", anchor="NW")
    _bare(ax)
    ax.set_xticks([])
    ax.set_yticks([])


def cache_steps() -> Figure:
    """A real cache, step by step: what leaves the ring stays if it ended a chunk."""
    figure = pyplot().figure(figsize=(5.8, 5.0))
    ax = figure.add_axes((0.145, 0.01, 0.85, 0.93))
    draw_steps(ax, model_of(n_layers=1), 0, (3, 5, 6, 12, 13, 20, 21, 29))
    return figure


def cache_bytes_picture() -> Figure:
    """Bytes of the decode cache against tokens, by the formula that tests hold to the cache."""
    from attamba.models.accounting import cache_bytes

    lengths = [2**i for i in range(4, 18)]
    contenders: list[tuple[str, dict[str, Any]]] = [("transformer", {"type": "transformer"})]
    for P in (4, 8, 16):
        mixer = {"type": "attamba", "chunk_size": P, "leading_tokens": 64}
        contenders.append((f"attamba, P={P}, L=64", mixer))
    figure = pyplot().figure(figsize=(7.4, 4.3))
    ax = figure.add_axes((0.1, 0.13, 0.88, 0.84))
    ax.set_prop_cycle(color=("#F0B07A", "#E0782A", "#8A3F0C"))  # from light to dark as P grows
    curves = []
    for name, mixer in contenders:
        config = ModelConfig(dim=512, n_layers=8, mixer=mixer)  # type: ignore[arg-type]
        curves.append(Curve(name, lengths, [cache_bytes(config, n, 2) / 2**20 for n in lengths]))
    draw_curves(ax, curves, x="tokens", y="MiB (bfloat16, width 512, 8 layers)", log_x=True)
    ax.set_yscale("log")
    for axis, ticks in (
        (ax.xaxis, {16: "16", 128: "128", 1024: "1k", 8192: "8k", 65536: "64k"}),
        (ax.yaxis, {1: "1", 10: "10", 100: "100", 1000: "1,000"}),
    ):
        axis.set_ticks(list(ticks), list(ticks.values()))
        axis.set_ticks([], minor=True)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "mask-and-cache": mask_and_cache,
    "chunks": chunks,
    "masks": masks,
    "scopes": scopes,
    "cache-steps": cache_steps,
    "cache-bytes": cache_bytes_picture,
}
"""Every picture by its file's name, less the suffix."""


def draw(name: str, folder: str | Path) -> Path:
    """Draw one of PICTURES as <folder>/<name>.svg and return its path."""
    path = Path(folder) / f"{name}.svg"
    with pyplot().rc_context(STYLE):
        save(PICTURES[name](), path)
    return path


def _bare(ax: Axes) -> None:
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, pad=2)


if __name__ == "__main__":
    for each in PICTURES:
        print(draw(each, sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
