"""`python -m attamba.bench.plot OUT.svg RESULT.json ...`: benchmark results as one picture.

Needs matplotlib: pip install 'attamba[plot]'. Every point is read from the result files.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba.plots import Curve, draw_curves, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Panel:
    """One set of axes: tokens to the right, logarithmic, and `what` upwards."""

    title: str
    what: str
    curves: list[Curve]
    from_zero: bool = False
    """Upwards from zero rather than logarithmic."""


def panels(record: dict[str, Any]) -> list[Panel]:
    """What a result file shows, each contender a curve over the sequence length."""
    return list(_PANELS[record["benchmark"]](record))


def joined(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of one benchmark, device and setting, but for the repeats, as one record each."""
    by_kind: dict[str, dict[str, Any]] = {}
    for record in records:
        settings = {**record["settings"], "repeats": None}
        kind = json.dumps([record["benchmark"], settings, record["environment"]["device"]])
        first = by_kind.setdefault(kind, {**record, "rows": []})
        first["rows"] = sorted([*first["rows"], *record["rows"]], key=lambda row: row["length"])
    return list(by_kind.values())


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """All panels of all records side by side; the ending of `path` chooses the format."""
    plt = pyplot()
    found = [panel for record in joined(records) for panel in panels(record)]
    rows = -(-len(found) // 2)
    with plt.rc_context({"svg.hashsalt": "attamba", "font.size": 9}):
        figure, axes = plt.subplots(rows, 2, figsize=(9, 3.4 * rows), squeeze=False)
        for ax, panel in zip(axes.flat, found):
            _draw(ax, panel)
        for ax in axes.flat[len(found) :]:
            ax.set_axis_off()
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _draw(ax: Axes, panel: Panel) -> None:
    draw_curves(ax, panel.curves, x="tokens", y=panel.what, title=panel.title)
    for line in ax.lines:
        line.set_marker("o")
        line.set_markersize(3.5)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k")
    if panel.from_zero:
        ax.set_ylim(0, 1.1 * ax.dataLim.y1)
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}" if _decades(ax) < 1.3 else "")


def _decades(ax: Axes) -> float:
    low, high = ax.get_ylim()
    return math.log10(high / low)


def _curves(rows: list[dict[str, Any]], values: list[dict[str, float]]) -> list[Curve]:
    """Each name's points over the rows that have it, in the order of first appearance."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row, found in zip(rows, values):
        for name, value in found.items():
            points.setdefault(name, []).append((row["length"], value))
    return [Curve(name, *map(list, zip(*pairs))) for name, pairs in points.items()]


def _kernels(record: dict[str, Any]) -> Iterator[Panel]:
    rows = [row for row in record["rows"] if row["width"] == 64]
    for part, title in (("forward", "forward"), ("both", "forward + backward")):
        values = [{n: ms[part] for n, ms in row["ms"].items()} for row in rows]
        title = f"Attention, {title}, 65,536 tokens"
        yield Panel(title, "milliseconds", _curves(rows, values))


def _train_gpu(record: dict[str, Any]) -> Iterator[Panel]:
    rows = record["rows"]
    models = [{n: m for n, m in row.items() if isinstance(m, dict)} for row in rows]
    values = [{n: m["step_ms"] for n, m in row.items()} for row in models]
    yield Panel("Training step", "milliseconds", _curves(rows, values))
    values = [{n: m["peak_bytes"] / 2**30 for n, m in row.items()} for row in models]
    yield Panel("Training step, peak memory", "GiB", _curves(rows, values), from_zero=True)


def _train(record: dict[str, Any]) -> Iterator[Panel]:
    rows, names = record["rows"], ("attamba", "transformer")
    values = [{n: row[n]["step_ms"] for n in names} for row in rows]
    yield Panel("Forward and backward", "milliseconds", _curves(rows, values))


def _decode(record: dict[str, Any]) -> Iterator[Panel]:
    rows, batch = record["rows"], record["settings"]["batch_size"]

    def steps(row: dict[str, Any]) -> dict[str, float]:
        found = {n: m["step_ms"] for n, m in row.items() if isinstance(m, dict) and "step_ms" in m}
        if "transformer_best_ms" in row:  # whichever attention is fastest
            found["transformer"] = row["transformer_best_ms"]
        return found

    rows_of = "1 row" if batch == 1 else f"{batch} rows"
    curves = _curves(rows, [steps(row) for row in rows])
    yield Panel(f"Decoding step, {rows_of}", "milliseconds", curves)
    values = [{n: row[n]["bytes_used"] / 2**20 for n in ("attamba", "transformer")} for row in rows]
    yield Panel(f"Cache, {rows_of}", "MiB", _curves(rows, values))


_PANELS: dict[str, Callable[[dict[str, Any]], Iterator[Panel]]] = {
    "kernels": _kernels,
    "train_gpu": _train_gpu,
    "train": _train,
    "decode": _decode,
}


def main() -> None:
    """Draw the result files named on the command line."""
    parser = argparse.ArgumentParser(description="draw benchmark results")
    parser.add_argument("out", type=Path, help="picture to write, .svg or .png")
    parser.add_argument("results", nargs="+", type=Path, help="files that --json wrote")
    args = parser.parse_args()
    draw([json.loads(path.read_text(encoding="utf-8")) for path in args.results], args.out)


if __name__ == "__main__":
    main()
