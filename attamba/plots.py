"""Pictures of what a model sees and keeps. Needs matplotlib: pip install 'attamba[plot]'.

Chunk ends and visibility are asked of the model's own policy and rule, never drawn from memory.
The documentation's pictures, made of these: attamba.pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attamba.config import AttambaMixer, ModelConfig
from attamba.mixers import attends

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW, PAST, SINK, HIDDEN = "#4C86C6", "#E8963A", "#2F9E77", "#EDEFF2"
"""Colours that also differ in lightness and for colour-blind eyes."""
INK, FAINT, PAGE = "#24292F", "#8A929C", "#FFFFFF"
COLOURS = {
    "attamba": "#E0782A",
    "transformer": "#4C86C6",
    "cyclic": "#E0782A",
    "head_cyclic": "#8E2F1D",
    "attamba head_cyclic": "#8E2F1D",
    "shared_heads": "#C9A227",
    "attamba shared_heads": "#C9A227",
    "cudnn": "#4C86C6",
    "flash": "#7F9DB9",
    "efficient": "#A9B4BF",
    "dense mask": "#6B7280",
}

NOT_SEEN, IN_WINDOW, IN_PAST, IS_SINK = range(4)
"""What a key is to a query: entries of key_kinds()."""


Box = tuple[float, float, float, float]
"""A rectangle: left, top, width, height, in the axes' own units."""


class Curve(NamedTuple):
    """A named line: x and y of equal length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def pyplot() -> Any:
    """matplotlib.pyplot without a window. Raises ImportError saying what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'attamba[plot]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def key_kinds(
    config: ModelConfig, layer_idx: int, seq_len: int, head: int = 0, tokens: Any = None
) -> np.ndarray:
    """What each key is to each query of one layer and key/value head.

    tokens: int64 [1, T], for boundary "separator". Returns int [T queries, T keys] of NOT_SEEN,
    IN_WINDOW (one by one), IN_PAST (as the end of a chunk), IS_SINK (position 0, from the past).
    Raises ValueError where the layer has no attention.
    """
    import numpy as np

    from attamba.models.accounting import layer_ends
    from attamba.ops.chunking import visible

    mixer = config.layer_mixers()[layer_idx]
    if not attends(mixer):
        raise ValueError(f"layer_idx={layer_idx} is {mixer.type}, which has no attention to draw")
    if isinstance(mixer, AttambaMixer):
        lead, sink = mixer.leading_tokens, mixer.sink
    else:
        lead, sink = None if mixer.window is None else mixer.window - 1, False
    ends = layer_ends(config, layer_idx, seq_len, tokens)
    ends = ends[head % ends.shape[0]][None, None]  # one row where the heads agree
    seen = visible(ends, lead, seq_len)[0, 0].numpy()
    window = visible(ends & False, lead, seq_len)[0, 0].numpy()
    kinds = np.where(window, IN_WINDOW, np.where(seen, IN_PAST, NOT_SEEN))
    if sink:
        kinds[kinds[:, 0] == IN_PAST, 0] = IS_SINK
    return kinds


def draw_cells(ax: Axes, boxes: Sequence[Box], face: str, *, edge: float = 0.0) -> None:
    """Rectangles of one colour as one shape, which keeps an SVG small; edge: in points."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    if boxes:
        outlines = [
            Outline([(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)], closed=True)
            for x, y, w, h in boxes
        ]
        shape = Outline.make_compound_path(*outlines)
        ax.add_patch(PathPatch(shape, facecolor=face, edgecolor=face, linewidth=edge))


def draw_mask(
    ax: Axes, config: ModelConfig, layer_idx: int, seq_len: int, *, title: str = ""
) -> None:
    """The attention mask of one layer, queries downwards and keys to the right."""
    kinds = key_kinds(config, layer_idx, seq_len)
    bars: dict[int, list[Box]] = {kind: [] for kind in (NOT_SEEN, IN_WINDOW, IN_PAST, IS_SINK)}
    for s in range(seq_len):
        t = s
        for kind, run in itertools.groupby(kinds[s:, s].tolist()):
            length = len(list(run))
            bars[kind].append((s, t, 1, length))
            t += length
    for kind, boxes in bars.items():
        # A hair of an edge closes the seams that renderers leave between bars.
        draw_cells(ax, boxes, colour(kind), edge=0.3)
    cell = ax.bbox.width / ax.figure.dpi * 72 / seq_len  # in points
    if cell > 3:
        # Lines of the page's colour cut the bars into cells, where there is room for them.
        x: list[float] = []
        y: list[float] = []
        pause = float("nan")  # between one line and the next
        for i in range(seq_len + 1):
            x += [i, i, pause, 0, min(i + 1, seq_len), pause]
            y += [max(0, i - 1), seq_len, pause, i, i, pause]
        ax.plot(x, y, color=PAGE, lw=0.16 * cell)
    ax.set(xlim=(-0.3, seq_len + 0.1), ylim=(seq_len + 0.1, -0.3), aspect="equal", anchor="NW")
    ticks = range(0, seq_len, max(1, seq_len // 4))
    ax.set_xticks([t + 0.5 for t in ticks], [str(t) for t in ticks])
    ax.set_yticks([t + 0.5 for t in ticks], [str(t) for t in ticks])
    ax.set_xlabel("key", labelpad=3)
    ax.set_ylabel("query", labelpad=3)
    ax.set_title(title, loc="left", pad=8)
    _bare(ax)


def draw_cache(
    ax: Axes,
    config: ModelConfig,
    layer_idx: int,
    steps: Sequence[int],
    *,
    title: str = "",
) -> None:
    """One layer's decode cache after some tokens: what it holds, beside a per-token cache.

    steps: numbers of tokens seen, in rising order. For each the tokens in order of position, the
    forgotten ones faint, and below them the entries that memory really holds.
    """
    longest, scale, pitch = steps[-1], 2.0, 4.6
    kinds = key_kinds(config, layer_idx, longest)
    for y, n in zip(itertools.count(step=pitch), steps):
        row = kinds[n - 1, :n]
        for s in range(n):
            _cell(ax, s, y, colour(row[s]))
        past = [s for s in range(n) if row[s] >= IN_PAST]
        held = past + [s for s in range(n) if row[s] == IN_WINDOW]
        for slot, s in enumerate(held):
            _cell(ax, slot * scale, y + 1.15, colour(row[s]), scale)
            ax.text(
                (slot + 0.5) * scale,
                y + 1.15 + scale / 2,
                str(s),
                color="white",
                ha="center",
                va="center_baseline",
                fontsize=8,
                fontweight="bold",
            )
        ax.text(-0.7, y + 0.5, f"{n} tokens", ha="right", va="center_baseline", color=FAINT)
        ax.text(-0.7, y + 1.15 + scale / 2, f"{len(held)} kept", ha="right", va="center_baseline")
    bottom = len(steps) * pitch - 1.2
    ax.set(xlim=(-0.3, longest + 0.1), ylim=(bottom, -0.3), aspect="equal", anchor="NW")
    ax.set_title(title, loc="left", pad=8)
    ax.set_xticks([])
    ax.set_yticks([])
    _bare(ax)


def draw_curves(
    ax: Axes, curves: Sequence[Curve], *, x: str, y: str, title: str = "", log_x: bool = False
) -> None:
    """Lines with their names at their ends' colours, e.g. training losses."""
    for curve in curves:
        ax.plot(curve.x, curve.y, label=curve.name, color=COLOURS.get(curve.name), lw=1.8)
    _axes(ax, x, y, title)
    if log_x:
        ax.set_xscale("log")
    ax.legend(frameon=False)


def draw_dial(
    ax: Axes,
    points: Sequence[tuple[str, float, float]],
    reference: tuple[str, float, float] | None = None,
    *,
    trained: str = "",
    y: str = "perplexity",
    title: str = "",
) -> None:
    """Quality against cache bytes of one checkpoint run at several settings.

    points: (name, cache bytes, quality), the point named `trained` is emphasised.
    reference: the same of another model.
    """
    sizes, values = [p[1] / 1024 for p in points], [p[2] for p in points]
    ax.plot(sizes, values, color=COLOURS["attamba"], lw=1.6, zorder=1)
    for i, ((name, _, value), size) in enumerate(zip(points, sizes)):
        filled = name == trained
        face = COLOURS["attamba"] if filled else ax.get_facecolor()
        ax.scatter(size, value, s=46, color=face, edgecolor=COLOURS["attamba"], lw=1.6, zorder=2)
        label = f"{name}, trained" if filled else name
        above = -17 if i % 2 else 9  # in turns, for neighbours may be close
        ax.annotate(
            label, (size, value), xytext=(0, above), textcoords="offset points", ha="center"
        )
    if reference is not None:
        name, size, value = reference
        ax.scatter(size / 1024, value, s=60, marker="D", color=COLOURS["transformer"], zorder=2)
        ax.annotate(
            name, (size / 1024, value), xytext=(0, -16), textcoords="offset points", ha="center"
        )
    ax.set_xscale("log")
    ax.margins(0.1, 0.18)
    low, high = ax.get_xlim()
    ticks = [m * 10**e for e in range(-2, 9) for m in (1, 1.5, 2, 3, 4, 5, 7)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    ax.set_xticks(ticks, [f"{tick:,.4g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    _axes(ax, "cache (KiB)", y, title)


STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.edgecolor": FAINT,
    "axes.facecolor": PAGE,
    "figure.facecolor": PAGE,
    "grid.color": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "svg.fonttype": "path",
    "svg.hashsalt": "attamba",
}
"""matplotlib settings of every picture; hashsalt keeps an SVG the same from run to run."""


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure (.svg, .png, ...) and close it; the same figure gives the same SVG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=metadata)
    pyplot().close(figure)


def legend(ax: Axes) -> None:
    """What the colours of masks and caches mean, below an axes."""
    from matplotlib.patches import Patch

    entries = (
        (WINDOW, "window: the last tokens, one by one"),
        (PAST, "past: one entry per chunk, at its end"),
        (SINK, "sink: position 0"),
        (HIDDEN, "forgotten"),
    )
    ax.legend(
        handles=[Patch(color=colour, label=label) for colour, label in entries],
        loc="upper left",
        bbox_to_anchor=(-0.03, -0.03),
        frameon=False,
        handlelength=1,
        handleheight=1,
        borderpad=0,
    )


def _cell(ax: Axes, x: float, y: float, colour: str, size: float = 1.0) -> None:
    from matplotlib.patches import FancyBboxPatch

    gap = 0.08
    side = size - 2 * gap
    shape = f"round,pad=0,rounding_size={0.16 * size}"
    ax.add_patch(
        FancyBboxPatch((x + gap, y + gap), side, side, shape, linewidth=0, facecolor=colour)
    )


def colour(kind: int) -> str:
    """The colour of an entry of key_kinds()."""
    return {NOT_SEEN: HIDDEN, IN_WINDOW: WINDOW, IN_PAST: PAST, IS_SINK: SINK}[int(kind)]


def _bare(ax: Axes) -> None:
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, pad=2)


def _axes(ax: Axes, x: str, y: str, title: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, loc="left", pad=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, lw=0.6)
    ax.set_axisbelow(True)
