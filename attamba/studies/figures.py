"""Plots of a study. Every number comes from result files or from the paper's numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba import plots
from attamba.display import format_bytes
from attamba.studies.tables import (
    MISSING,
    Row,
    Told,
    above,
    above_at_position,
    at_position,
    paper_above,
    percent,
    position_edges,
)
from attamba.studies.task_tables import (
    at_setting,
    dial_of,
    setting_key,
    settings_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = {
    "attamba": ("#E0782A", "#8E2F1D", "#F0AC72", "#C2541B", "#5C1F12", "#D4A017"),
    "transformer": ("#4C86C6", "#1F4E86", "#8FB8E3", "#5B6770", "#2B8CA8", "#A9B4BF"),
    "hybrid": ("#A05195", "#6B2D63", "#D29BC9", "#C03D7E"),
    "recurrent": ("#2F9E77", "#145C43", "#86C9AE", "#7A8F2A"),
}
"""Colours of the variants of a family, one after the other."""
MARKERS = "os^Dv*PX"
PAPER_COLOUR = "#8A929C"
WIDE = (8.2, 4.4)
LEAST_RANGE = 0.05
"""Of perplexities, relative to them: what is level looks level."""


@contextmanager
def _figure(path: Path, size: tuple[float, float] = WIDE, panels: int = 1) -> Iterator[Any]:
    plt = plots.pyplot()
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained")
        yield axes
        plots.save(figure, path)


def _looks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Colours and markers of variants: families by colour, shades and markers within them."""
    families = [_family(row) for row in rows]
    looks = []
    for i, family in enumerate(families):
        place = families[:i].count(family)
        shades = SHADES[family]
        marker = MARKERS[(place // len(shades) + place) % len(MARKERS)]
        looks.append({"color": shades[place % len(shades)], "marker": marker})
    return looks


def _family(row: Row) -> str:
    """Of a variant's mixer; any for one that has not been run, which is not drawn."""
    if row.first is None:
        return "recurrent"
    mixer = row.first.run["config"]["model"]["mixer"]
    if isinstance(mixer, list):
        return "hybrid"
    return mixer["type"] if mixer["type"] in SHADES else "recurrent"


def quality(told: Told, path: Path, *, score: str) -> None:
    """Perplexity against cache bytes at the training length; bars are the range over seeds."""
    with _figure(path) as ax:
        for row, looks in zip(told.rows, _looks(told.rows)):
            mean, cache = row.mean(score, "perplexity"), row.cache_bytes
            if mean is None or cache is None:
                continue
            values = row.values(score, "perplexity")
            spread = [[mean - min(values)], [max(values) - mean]]
            ax.errorbar(cache, mean, yerr=spread, linestyle="", label=row.variant, **looks)
        _powers_of_two(ax)
        low, high = (math.log2(x) for x in ax.get_xlim())
        ax.set_xlim(2.0 ** math.floor(low), 2.0 ** math.ceil(high))  # two ticks at the least
        ax.xaxis.set_major_formatter(lambda x, place: format_bytes(round(x)))
        bottom, top = ax.get_ylim()
        middle = (bottom + top) / 2
        half = max(top - bottom, LEAST_RANGE * middle) / 2
        ax.set_ylim(middle - half, middle + half)
        _finish(ax, "cache after a training row (bfloat16)", f"{score}: perplexity per token")


def position(told: Told, path: Path, *, score: str) -> None:
    """Loss by position in the document; above the reference's, where all have the same."""
    starts = [start for start, _ in position_edges(told, score)]
    reference = _known_reference(told)
    with _figure(path) as ax:
        for row, looks in zip(told.rows, _looks(told.rows)):
            points = [
                (
                    start,
                    at_position(row, score, start)
                    if reference is None
                    else above_at_position(row, reference, score, start),
                )
                for start in starts
            ]
            _line(ax, [(max(s, 8), y) for s, y in points if y is not None], looks, row.variant)
        _powers_of_two(ax)
        than = "" if reference is None else f" above that of {reference.variant}"
        _finish(ax, "position in the document (tokens)", f"{score}: nats per token{than}")


def dial(told: Told, path: Path, *, score: str) -> None:
    """Perplexity of one checkpoint at other settings."""
    asked = dial_of(told, score)
    values = asked.values
    with _figure(path) as ax:
        for row, looks in zip(told.rows, _looks(told.rows)):
            ys = [at_setting(row, score, "value", value, "perplexity") for value in values]
            _line(ax, [(x, y) for x, y in enumerate(ys) if y is not None], looks, row.variant)
        ax.set_xticks(range(len(values)), [str(value) for value in values])
        _finish(ax, f"{asked.key} at test time", "perplexity per token")


def memory(told: Told, path: Path, *, score: str) -> None:
    """Share found against gap or length."""
    key = setting_key(told, score)
    settings = settings_of(told, score, key)
    with _figure(path) as ax:
        for row, looks in zip(told.rows, _looks(told.rows)):
            ys = [at_setting(row, score, key, value, "accuracy") for value in settings]
            points = [(x, 100 * y) for x, y in enumerate(ys) if y is not None]
            _line(ax, points, looks, row.variant)
        found = [r.scores[score] for row in told.rows for r in row.results if score in r.scores]
        chance = [result["chance"] for result in found]
        if chance:
            ax.axhline(100 * chance[0], color=plots.FAINT, lw=1, ls=":", label="at random")
        ax.set_xticks(range(len(settings)), [f"{value:,}" for value in settings])
        what = "blanks between pairs and questions" if key == "gap" else "length (bytes)"
        _finish(ax, what, f"{score}: share found (%)")


def copying(told: Told, path: Path, *, score: str) -> None:
    """Nats per token of passages read again, against the tokens between."""
    gaps = settings_of(told, score, "gap")
    with _figure(path) as ax:
        for row, looks in zip(told.rows, _looks(told.rows)):
            ys = [at_setting(row, score, "gap", gap, "again") for gap in gaps]
            _line(ax, [(x, y) for x, y in enumerate(ys) if y is not None], looks, row.variant)
        ax.set_xticks(range(len(gaps)), [f"{gap:,}" for gap in gaps])
        _finish(ax, "tokens between the two readings", f"{score}: nats per token, read again")


def beside_paper(told: Told, path: Path, *, score: str) -> None:
    """Ours beside the paper's: how far perplexities are above the reference's, on one scale.

    Where a study has no reference for all, perplexities themselves, each on its own axis: text and
    tokenizer are others.
    """
    rows = [row for row in told.rows if row.paper]
    reference = _known_reference(told)
    if reference is not None and not reference.paper:
        reference = None
    if reference is None:
        ours = [row.mean(score, "perplexity") for row in rows]
        theirs = [row.paper["perplexity"] for row in rows]
        form, label = "{:.2f}", "perplexity per token"
    else:
        ours = _percents(above(row, reference, score) for row in rows)
        theirs = _percents(paper_above(row.paper, reference.paper) for row in rows)
        form, label = "{:+.1f}%", f"perplexity above that of {reference.variant} (%)"
    with _figure(path, (9.2, 1.2 + 0.32 * len(rows)), panels=2) as (left, right):
        _bars(left, ours, form, plots.COLOURS["attamba"])
        for y, row in enumerate(rows):
            if not row.results:
                left.text(0, y, f" {MISSING}", va="center", color=plots.FAINT)
        left.set_title(f"here: {score}", loc="left")
        left.set_yticks(range(len(rows)), [row.variant for row in rows])
        _bars(right, theirs, form, PAPER_COLOUR)
        right.set_title("paper: WikiText-2", loc="left")
        right.set_yticks([])
        limits = [*left.get_xlim(), *right.get_xlim()]
        for ax in (left, right):
            ax.set_xlabel(label)
            if reference is not None:
                ax.set_xlim(min(limits), max(limits))


def _known_reference(told: Told) -> Row | None:
    """What all others are compared with, if it has been run."""
    reference = told.common_reference
    return reference if reference is not None and reference.results else None


def _percents(shares: Iterable[float | None]) -> list[float | None]:
    return [None if share is None else percent(share) for share in shares]


def _bars(ax: Axes, values: Sequence[float | None], form: str, colour: str) -> None:
    """A bar and its value in each line, from the top; none where there is no value."""
    for y, value in enumerate(values):
        if value is not None:
            ax.barh(y, value, color=colour, height=0.7)
            ax.text(max(value, 0), y, f" {form.format(value)}", va="center", fontsize=8)
    # Where nothing is below zero the axis begins there; labels stand to the right of their bars.
    known = [0.0, *(value for value in values if value is not None)]
    low, high = min(known), max(known)
    ax.set_xlim(1.05 * low, high + 0.15 * (high - low or 1))
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)


def _line(
    ax: Axes, points: Sequence[tuple[float, float]], looks: dict[str, Any], name: str
) -> None:
    if points:
        xs, ys = zip(*points)
        ax.plot(xs, ys, label=name, lw=1.6, ms=5, **looks)


def _powers_of_two(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, place: f"{x:,.0f}")


def _finish(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, lw=0.6)
    ax.set_axisbelow(True)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
