"""The tables of docs/scaling.md, made from configs/plan."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from attamba.config import RunConfig, load_run_config
from attamba.data.files import write_aside
from attamba.display import format_bytes
from attamba.plan.estimate import Plan, beside, make_plan
from attamba.plan.layout import Layout, make_layout
from attamba.plan.report import MFU, PEAK_TFLOPS

BEGIN, END = "<!-- tables: python -m attamba.plan -->", "<!-- end of tables -->"
CONFIGS = Path("configs/plan")


@dataclass(frozen=True)
class Case:
    """One model at one length."""

    name: str
    """A file of configs/plan."""
    ranks: int
    tensor: int
    context: int
    seq_len: int

    def load(self, configs: Path) -> tuple[RunConfig, Layout]:
        """As many tokens in a step at any length: rows are longer, and fewer."""
        path = configs / f"{self.name}.yaml"
        base = load_run_config(path)
        rows = base.data.batch_size * base.data.seq_len // self.seq_len
        config = load_run_config(path, [f"data.seq_len={self.seq_len}", f"data.batch_size={rows}"])
        return config, make_layout(config, self.ranks, self.tensor, self.context)


SHORT, LONG = 32_768, 1_048_576
MACHINES = {"1b": (32, 1), "7b": (64, 1), "70b": (512, 8)}
"""Ranks, and ranks that share a layer."""
CASES = {
    length: [
        Case(name, ranks, tensor, 1 if length == SHORT else 32, length)
        for name, (ranks, tensor) in MACHINES.items()
    ]
    for length in (SHORT, LONG)
}
"""Rows of 1M tokens are shared by 32 ranks: each has 32k tokens at a time, as with short rows."""


def tables(configs: Path = CONFIGS) -> str:
    """The tables as Markdown, without the markers."""
    parts = []
    for length, cases in CASES.items():
        parts.append(f"## Rows of {length:,} tokens")
        planned = [entry for case in cases for entry in _both(case, configs)]
        parts += ["### Memory of a rank", _memory(planned)]
        parts += ["### Bytes that a rank receives in a step", _traffic(planned)]
        parts += ["### Work, time and decode cache", _work(planned)]
    return "\n\n".join(parts)


def write(page: Path, configs: Path = CONFIGS) -> None:
    """Put the tables between the markers of a page. Raises ValueError where it has none."""
    page_text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(page_text):
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r} to put tables between")
    made = f"{BEGIN}\n\n{tables(configs)}\n\n{END}"
    write_aside(page, pattern.sub(lambda _: made, page_text).encode())


Planned = list[tuple[Case, Layout, str, Plan]]


def _both(case: Case, configs: Path) -> Planned:
    config, layout = case.load(configs)
    named = {"Attamba": config, "transformer": beside(config)}
    return [(case, layout, name, make_plan(c, layout, case.seq_len)) for name, c in named.items()]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _model(case: Case, plan: Plan, name: str) -> list[str]:
    return [f"{case.name.upper()}, {case.ranks} ranks", f"{name}, {plan.n_parameters / 1e9:.2f} B"]


def _memory(planned: Planned) -> str:
    heads = ["", "model", "weights, gradients, optimizer", "whole weights", "activations"]
    heads += ["loss, or a layer anew", "other ranks' keys", "in all"]
    rows = []
    for case, _, name, plan in planned:
        kept = plan.memory
        states = kept["weights"] + kept["gradients"] + kept["optimizer state"]
        figures = [states, kept["whole weights"], kept["activations"]]
        figures += [kept["loss, or one layer anew"], kept["keys from other ranks"]]
        rows.append(_model(case, plan, name) + [_told(n) for n in [*figures, plan.total_memory]])
    return _table(heads, rows)


def _traffic(planned: Planned) -> str:
    names = list(planned[0][3].traffic)
    names = [n for n in names if any(plan.traffic[n] for *_, plan in planned)]
    rows = [
        _model(case, plan, name)
        + [_told(n) for n in [*(plan.traffic[kind] for kind in names), plan.total_traffic]]
        for case, _, name, plan in planned
    ]
    return _table(["", "model", *names, "in all"], rows)


def _work(planned: Planned) -> str:
    heads = ["", "model", "FLOPs per token", "seconds per step", "tokens/s and rank"]
    heads += ["decode cache of one row in bfloat16, a rank's part"]
    rows = []
    for case, layout, name, plan in planned:
        tokens = layout.tokens * layout.passes / layout.tensor
        seconds = plan.seconds(PEAK_TFLOPS, MFU)
        figures = [f"{plan.flops / tokens / 1e9:,.1f} G", f"{seconds:.2f}"]
        figures += [f"{tokens / seconds:,.0f}", _told(plan.cache or 0.0)]
        rows.append(_model(case, plan, name) + figures)
    return _table(heads, rows)


def _told(n: float) -> str:
    return format_bytes(n) if n else "-"
