"""A plan as a table for terminals: the model beside a transformer of the same sizes."""

from __future__ import annotations

from dataclasses import dataclass

from attamba.config import RunConfig
from attamba.display import columns, format_bytes
from attamba.plan.estimate import Plan, beside, make_plan
from attamba.plan.layout import Layout
from attamba.plan.policies import told

PEAK_TFLOPS, MFU = 989.0, 0.4
"""Of an H100 SXM in dense bfloat16, by NVIDIA's data sheet; and a utilisation that is often had."""


@dataclass(frozen=True)
class Speed:
    """What a rank computes per second."""

    tflops: float = PEAK_TFLOPS
    """Its peak, 1e12 floating-point operations per second."""
    mfu: float = MFU
    """Share of the peak, in model FLOPs."""


def render(
    config: RunConfig, layout: Layout, speed: Speed, decode_tokens: int | None = None
) -> str:
    """All that `attamba plan` prints."""
    plans = [make_plan(c, layout, decode_tokens) for c in (config, beside(config))]
    rows = [["", _name(config), "transformer"]]
    rows += _rows(plans, speed, config, layout, decode_tokens)
    return "\n".join([*_heading(config, layout), "", columns(rows), "", *_notes(config, layout)])


def _heading(config: RunConfig, layout: Layout) -> list[str]:
    ways = ("replicate", "shard", "tensor", "context")
    mesh = ", ".join(f"{way} {getattr(layout, way)}" for way in ways)
    c = config
    return [
        f"{layout.ranks:,} rank{'s' * (layout.ranks > 1)}: {mesh}",
        f"{c.data.batch_size:,} rows of {c.data.seq_len:,} tokens in a step; a rank has "
        f"{layout.tokens:,.0f} tokens in each of {layout.passes} pass{'es' * (layout.passes > 1)}",
        f"products in {c.train.dtype}{_float8(c)}, weights gathered in {c.parallel.gather_dtype}, "
        f"activation checkpointing {c.parallel.activation_checkpointing}",
    ]


def _float8(config: RunConfig) -> str:
    name = config.train.float8
    return "" if name == "none" else f" (and float8, {name}, counted as if it were not)"


def _rows(
    plans: list[Plan], speed: Speed, config: RunConfig, layout: Layout, decode_tokens: int | None
) -> list[list[str]]:
    rows = [["parameters", *(f"{p.n_parameters / 1e9:,.3f} B" for p in plans)], ["", "", ""]]
    rows += _part("memory of a rank", [p.memory for p in plans])
    rows += _part("received by a rank in a step", [p.traffic for p in plans])
    rows.append(["a rank's step", "", ""])
    rows.append(["  model FLOPs", *(f"{p.flops / 1e12:,.2f} T" for p in plans)])
    rows.append(["  FLOPs done anew", *(f"{p.flops_anew / 1e12:,.2f} T" for p in plans)])
    if layout.context > 1:
        rows.append(["  of the last rank, over it", *(f"{p.slowest:.2f}" for p in plans)])
    label = f"  seconds at {speed.mfu:.0%} of {speed.tflops:g} TFLOPS"
    seconds = [p.seconds(speed.tflops, speed.mfu) for p in plans]
    rows.append([label, *(f"{s:,.3f}" for s in seconds)])
    tokens = config.data.batch_size * config.data.seq_len / layout.ranks
    rows.append(["  tokens per second and rank", *(f"{tokens / s:,.0f}" for s in seconds)])
    if decode_tokens is not None:
        told_cache = [format_bytes(p.cache or 0.0) for p in plans]
        rows.append([f"decode cache of {decode_tokens:,} tokens, bfloat16", *told_cache])
    return rows


def _part(title: str, figures: list[dict[str, float]]) -> list[list[str]]:
    """A line for each figure that is not zero in all, and their sum."""
    rows = [[title, "", ""]]
    for name in figures[0]:
        values = [f[name] for f in figures]
        if any(values):
            rows.append([f"  {name}", *map(format_bytes, values)])
    rows.append(["  in all", *(format_bytes(sum(f.values())) for f in figures)])
    return [*rows, ["", "", ""]]


def _notes(config: RunConfig, layout: Layout) -> list[str]:
    notes = ["What is counted and what is not: docs/scaling.md."]
    if layout.tensor > 1 or layout.context > 1:
        notes.append("Ranks that share layers or rows: docs/scaling-out.md.")
    if any(getattr(mixer, "ssm_scope", "") == "strided" for mixer in config.model.layer_mixers()):
        notes.append("ssm_scope=strided, which is for studies, keeps more activations than that.")
    if told(config.model):
        notes.append("Chunks that follow the text are counted as if all had the mean length.")
    return notes


def _name(config: RunConfig) -> str:
    return " + ".join(dict.fromkeys(mixer.type for mixer in config.model.layer_mixers()))
