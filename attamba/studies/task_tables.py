"""Tables of scores other than the loss on texts: passages read again, recall, pass keys, dials."""

from __future__ import annotations

import math
import statistics
from typing import Any

from attamba.display import format_bytes
from attamba.studies.results import Result
from attamba.studies.scores import DialScore, make_score
from attamba.studies.tables import (
    MISSING,
    Row,
    Table,
    Told,
    budget_cells,
    digits,
    speed_cells,
    with_diverged,
)


def dial_table(told: Told, score: str) -> Table:
    """Perplexity at each test-time setting, a column per variant."""
    asked = dial_of(told, score)
    head = [asked.key, *(row.variant for row in told.rows)]
    body = []
    for value in asked.values:
        found = [(row, at_setting(row, score, "value", value, "perplexity")) for row in told.rows]
        body.append([str(value), *(digits(row, perplexity, 2) for row, perplexity in found)])
    return head, body


def dial_of(told: Told, score: str) -> DialScore:
    """What a dial score of the study turns."""
    asked = make_score(told.study.scores[score], score)
    assert isinstance(asked, DialScore)
    return asked


def memory_table(told: Told, score: str) -> Table:
    """Share of values or pass keys found, a row per variant, a column per gap or length; cost and
    budget beside it."""
    key = setting_key(told, score)
    settings = settings_of(told, score, key)
    head = ["model", "runs", "tokens", "parameters", "cache"]
    head += [*(f"{key} {value:,}" for value in settings), "training tokens/s", "peak memory"]
    body = []
    for row in told.rows:
        shares = [at_setting(row, score, key, value, "accuracy") for value in settings]
        cells = [with_diverged(row, _share(share)) for share in shares]
        cells = cells if row.results else [MISSING, *[""] * (len(settings) - 1)]
        body.append([*_begin(row, *budget_cells(row)), *cells, *speed_cells(row)])
    return head, body


def place_table(told: Told, score: str) -> Table:
    """Share found by where it stood, over all seeds: of values by the tokens from the question back
    to the pair, at all gaps; of pass keys by the fifth of the row, in the longest rows. A row per
    variant, a column per place; no rows where nothing was found out."""
    is_recall = told.study.scores[score]["kind"] == "recall"
    part, place = ("by_distance", "start") if is_recall else ("by_depth", "depth")
    key = setting_key(told, score)
    settings = settings_of(told, score, key)
    counted = settings if is_recall else settings[-1:]
    found = {}
    for row in told.rows:
        buckets = [
            bucket
            for result in row.results
            for setting in _own_settings(result, score)
            if setting[key] in counted
            for bucket in setting[part]
        ]
        if buckets:
            found[row.variant] = _pooled(buckets, place)
    places = sorted({at for shares in found.values() for at in shares})
    head = ["model", *(_place(at, is_recall) for at in places)]
    return head, [
        [variant, *(_share(shares.get(at)) for at in places)] for variant, shares in found.items()
    ]


def _pooled(buckets: list[dict[str, Any]], place: str) -> dict[int, float]:
    """The share found at each place, of all that were asked for there."""
    asked: dict[int, int] = {}
    found: dict[int, float] = {}
    for bucket in buckets:
        at, n = bucket[place], bucket["n"]
        asked[at] = asked.get(at, 0) + n
        found[at] = found.get(at, 0.0) + n * bucket["accuracy"]
    return {at: found[at] / asked[at] for at in asked}


def _place(at: int, is_recall: bool) -> str:
    if is_recall:
        return f"{at:,} to {2 * at - 1:,}"
    return f"{('first', 'second', 'third', 'fourth', 'last')[at]} fifth"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def copy_table(told: Told, score: str) -> Table:
    """Nats per token of passages: read first (the mean over the gaps), and again after each gap."""
    gaps = settings_of(told, score, "gap")
    head = ["model", "runs", "cache", "first", *(f"gap {gap:,}" for gap in gaps)]
    body = []
    for row in told.rows:
        first = [at_setting(row, score, "gap", gap, "first") for gap in gaps]
        known = [nats for nats in first if nats is not None]
        again = [at_setting(row, score, "gap", gap, "again") for gap in gaps]
        shown = (statistics.fmean(known) if known else None, *again)
        cells = [digits(row, nats, 3) for nats in shown]
        body.append([*_begin(row), *(cells if row.results else [MISSING, *[""] * len(gaps)])])
    return head, body


def _begin(row: Row, *budget: str) -> list[str]:
    cache = "" if row.cache_bytes is None else format_bytes(row.cache_bytes)
    return [row.variant, f"{len(row.results)} of {row.n_seeds}", *budget, cache]


def setting_key(told: Told, score: str) -> str:
    """What a score of memory is measured over: gap or length."""
    return "length" if told.study.scores[score]["kind"] == "passkey" else "gap"


def settings_of(told: Told, score: str, key: str) -> list[int]:
    """The gaps or lengths that results were measured at; those asked for where there is none."""
    found = {
        setting[key]
        for row in told.rows
        for result in row.results
        for setting in result.scores.get(score, {}).get("settings", [])
    }
    if found:
        return sorted(found)
    asked = make_score(told.study.scores[score], score)
    return sorted(getattr(asked, f"{key}s"))


def at_setting(row: Row, score: str, key: str, value: Any, figure: str) -> float | None:
    """Mean over the seeds of a figure at one setting (the model's own P where several were)."""
    values = [
        setting[figure]
        for result in row.results
        for setting in _own_settings(result, score)
        if setting[key] == value
    ]
    values = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.fmean(values) if values else None


def _own_settings(result: Result, score: str) -> list[dict[str, Any]]:
    """What a score measured, of a model with a dial at its own P alone."""
    there = result.scores.get(score, {})
    measured = [*there.get("settings", []), *there.get("rows", [])]
    return [one for one in measured if one.get("chunk_size") in (None, _chunk_size(result))]


def _chunk_size(result: Result) -> int | None:
    """P of the first mixer that has one."""
    mixer = result.run["config"]["model"]["mixer"]
    mixers = mixer if isinstance(mixer, list) else [mixer]
    return next((m["chunk_size"] for m in mixers if "chunk_size" in m), None)
