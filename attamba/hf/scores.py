"""Scores for a model card, from the files that `attamba eval --json` wrote: on text, and on tasks.

Their forms: {"result": {"perplexity": ...}, "data": ...} and
{"results": {task: {"metric,filter": value}}, "n-samples": ...}; the harness's own --output_path
writes the latter too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attamba.config import ConfigError

Row = list[str]


@dataclass
class Scores:
    """Rows of the card's two tables."""

    texts: list[Row] = field(default_factory=list)
    """What was scored; perplexity per token; bits per byte."""
    tasks: list[Row] = field(default_factory=list)
    """Task; measure; value, with its standard error where there is one; how it was scored."""


def read_scores(step: int, weights: str, files: Iterable[str | Path]) -> Scores:
    """The scores in files, which must be those of the checkpoint of this step and these weights.

    weights: by storage.weights_digest; older files, and the harness's own, have none.

    Raises ConfigError for a file without a score, and for one measured at another step or on
    another model; OSError for one that is not there.
    """
    scores = Scores()
    for path in map(Path, files):
        record = _read(path)
        measured = re.fullmatch(r"step-(\d+)", Path(record.get("checkpoint", "")).name)
        if measured and int(measured[1]) != step:
            raise ConfigError(
                f"{path} was measured at step {int(measured[1])}, but step {step} is exported; "
                f"score that one with `attamba eval --json`, or export the other"
            )
        if record.get("weights", weights) != weights:
            raise ConfigError(
                f"{path} was measured on other weights ({record.get('checkpoint')}) than are "
                f"exported; score these with `attamba eval --json`"
            )
        if "result" in record:
            scores.texts.append(_text_row(record))
        else:
            scores.tasks += _task_rows(record)
    return scores


def score(perplexity: float, bits_per_byte: float | None) -> Row:
    """Cells of a score on text."""
    return [f"{perplexity:.4g}", "" if bits_per_byte is None else f"{bits_per_byte:.4f}"]


def _read(path: Path) -> dict[str, Any]:
    """A file's record, once it is known to hold a score."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "result" in record:
            float(record["result"]["perplexity"])
        elif not any(_measures(values) for values in record["results"].values()):
            raise KeyError("results")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no score ({error!r}); give a file that `attamba eval --json` wrote, "
            f"with --tasks or without, but not with --sweep"
        ) from error
    return record


def _text_row(record: dict[str, Any]) -> Row:
    result, data = record["result"], record.get("data")
    names = data if isinstance(data, str) else ", ".join(Path(name).name for name in data or [])
    most, dtype = record.get("max_tokens"), record.get("dtype")
    part = f"first {most:,} tokens" if most else ""
    how = _how(record, result.get("context") or "whole document", part, dtype or "")
    return [f"{names} ({how})", *score(result["perplexity"], result.get("bits_per_byte"))]


def _task_rows(record: dict[str, Any]) -> list[Row]:
    rows = []
    for task, values in record["results"].items():
        how = _how(record, record.get("context"), _sample(record, task))
        for measure, value, error in _measures(values):
            spread = "" if error is None else f" ± {error:.4f}"
            rows.append([task, measure, f"{value:.4f}{spread}", how])
    return rows


def _measures(values: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """(name, value, standard error) of each of a task's figures."""
    found = []
    for key, value in values.items():
        name, comma, used = key.partition(",")
        if not comma or name.endswith("_stderr") or not _is_number(value):
            continue
        error = values.get(f"{name}_stderr,{used}")
        shown = name if used == "none" else f"{name} ({used})"
        found.append((shown, float(value), error if _is_number(error) else None))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _sample(record: dict[str, Any], task: str) -> str:
    """What part of a task was scored, and after how many examples; "" for all, after none."""
    counts = record.get("n-samples", {}).get(task, {})
    shots = record.get("n-shot", {}).get(task)
    scored, there = counts.get("effective"), counts.get("original")
    part = f"{scored:,} of {there:,} documents" if scored != there else ""
    return ", ".join(filter(None, [f"{shots}-shot" if shots else "", part]))


def _how(record: dict[str, Any], context: Any, *others: str) -> str:
    parts = [f"context {context}" if context else "", *others, *(record.get("overrides") or [])]
    return ", ".join(filter(None, parts))
