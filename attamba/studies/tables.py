"""What is known of a study, from its recipe, its result files and the paper's numbers and nothing
else, and the tables of its scores on text; task_tables has those of other scores."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attamba.config import ConfigError
from attamba.display import format_bytes
from attamba.studies.recipe import Scale, Study
from attamba.studies.results import Result, Shelf

MISSING = "not run"
PAPER_NUMBERS = Path("paper/numbers.json")
"""The paper's figures, below the folder of recipes."""


@dataclass(frozen=True)
class Row:
    """A variant: its results so far, of how many, and the paper's figures for it."""

    variant: str
    results: list[Result]
    n_seeds: int
    paper: dict[str, Any] = field(default_factory=dict)

    def mean(self, score: str, figure: str) -> float | None:
        """Mean over the seeds that are there; None where none is."""
        values = self.values(score, figure)
        return statistics.fmean(values) if values else None

    def values(self, score: str, figure: str) -> list[float]:
        return list(self.by_seed(score, figure).values())

    def by_seed(self, score: str, figure: str) -> dict[int, float]:
        """The values that there are, by the seed of their run."""
        found = {r.run["seed"]: r.scores.get(score, {}).get(figure) for r in self.results}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def first(self) -> Result | None:
        return self.results[0] if self.results else None

    @property
    def cache_bytes(self) -> int | None:
        """At the training length, bfloat16; None for no result, or a model that cannot decode."""
        if self.first is None or not self.first.run["costs"]:
            return None
        return self._cost("cache_bytes")

    @property
    def entries(self) -> float | None:
        """Keys that a query sees, the mean at the training length."""
        if self.first is None or not self.first.run["costs"]:
            return None
        return self._cost("entries")

    def _cost(self, name: str) -> Any:
        assert self.first is not None
        seq_len = self.first.run["config"]["data"]["seq_len"]
        return self.first.run["costs"][str(seq_len)][name]


@dataclass(frozen=True)
class Told:
    """A study and what is known of it."""

    study: Study
    rows: list[Row]
    source: str
    """Where the paper's figures are from."""

    def scores(self, kind: str) -> list[str]:
        """Names of the scores of a kind."""
        return [name for name, spec in self.study.scores.items() if spec["kind"] == kind]

    def reference(self, row: Row) -> Row | None:
        """What a variant is compared with."""
        name = self.study.against.get(row.variant)
        return next((other for other in self.rows if other.variant == name), None)

    @property
    def common_reference(self) -> Row | None:
        """What all others are compared with, where that is one variant."""
        names = set(self.study.against.values())
        if len(names) != 1 or len(self.study.against) != len(self.rows) - 1:
            return None
        return next(row for row in self.rows if row.variant in names)


def tell(study: Study, shelf: Shelf, recipes: Path, scale: Scale) -> Told:
    """Gather what a study's report needs. Raises ConfigError for results or numbers it cannot."""
    numbers: dict[str, Any] = {"runs": {}, "source": ""}
    if study.paper:
        numbers = _paper_numbers(recipes)
    by_variant: dict[str, list[Result]] = {}
    for run in study.runs(scale):
        result = shelf.find(run)
        if result is not None:
            by_variant.setdefault(run.variant, []).append(result)
    _check_one_text([result for found in by_variant.values() for result in found])
    n_seeds = 1 if scale == "tiny" else len(study.seeds)
    rows = []
    for variant in study.variants:
        key = study.paper.get(variant)
        if key is not None and key not in numbers["runs"]:
            raise ConfigError(f"{study.name}: paper.{variant}={key} is not in {PAPER_NUMBERS}")
        paper = numbers["runs"][key] if key is not None else {}
        rows.append(Row(variant, by_variant.get(variant, []), n_seeds, paper))
    return Told(study, rows, numbers["source"])


def _check_one_text(results: list[Result]) -> None:
    """Raise ConfigError for trainings and scores on different tokens: a table must not compare
    them."""
    texts = [r for r in results if r.run["data"] and r.run["config"]["data"]["generate"] is None]
    for result in texts[1:]:
        if result.run["data"] != texts[0].run["data"]:
            raise ConfigError(
                f"{texts[0].path} and {result.path} were trained or validated on different tokens; "
                f"prepare the texts of a study once, and delete the results on the others"
            )
    scored: dict[str, Result] = {}
    for result in results:
        for name, text in result.texts.items():
            first = scored.setdefault(name, result)
            if first.texts[name] != text:
                raise ConfigError(
                    f"{first.path} and {result.path} have {name} on different texts; prepare the "
                    f"texts of a study once, and delete the results on the others"
                )


def made_with(told: Told) -> str:
    """Devices, versions and code of a study's results, in a sentence; empty without results."""
    calls = [call for row in told.rows for r in row.results for call in r.end["calls"]]
    if not calls:
        return ""
    devices = sorted({call["device"] for call in calls})
    torch_versions = sorted({call["torch"] for call in calls})
    code = sorted({_code(call["code"]) for call in calls})
    text = f"Made on {', '.join(devices)}; torch {', '.join(torch_versions)}; {', '.join(code)}."
    others = [
        f"{row.variant} is {result.name}"
        for row in told.rows
        for result in row.results
        if result.study != told.study.name
    ]
    return text + (f" The same runs as in other studies: {', '.join(others)}." if others else "")


def _code(code: dict[str, Any]) -> str:
    if "commit" in code:
        return f"commit {code['commit'][:12]}{' and changes' if code['dirty'] else ''}"
    return f"version {code['version']}, source {code['source'][:12]}"


def _paper_numbers(recipes: Path) -> dict[str, Any]:
    path = recipes / PAPER_NUMBERS
    if not path.exists():
        raise ConfigError(f"{path} is missing: the paper's figures that recipes name stand there")
    return json.loads(path.read_text(encoding="utf-8"))


Table = tuple[list[str], list[list[str]]]
"""Headers and rows."""


def quality_table(told: Told) -> Table:
    """Quality beside cost, a row per variant."""
    texts = told.scores("text")
    head = ["model", "runs", "tokens", "parameters", "cache", "keys seen"]
    common = told.common_reference
    to = "difference" if common is None else f"to {common.variant}"
    for name in texts:
        head += [f"{name}: perplexity/token", to, "bits/byte"]
        if name == "wikitext2":
            head.append("perplexity/word")
    head += ["training tokens/s", "peak memory"]
    with_paper = any(row.paper for row in told.rows)
    if with_paper:
        head += ["paper: perplexity/token", f"paper: {to}", "paper: tokens", "paper: parameters"]
    return head, [_quality_row(told, row, texts, with_paper) for row in told.rows]


def _quality_row(told: Told, row: Row, texts: list[str], with_paper: bool) -> list[str]:
    reference = told.reference(row)
    than = "" if reference is None or told.common_reference else f" to {reference.variant}"
    cells = [row.variant, f"{len(row.results)} of {row.n_seeds}"]
    cells += budget_cells(row) if row.first else [MISSING, ""]
    cells += _cost_cells(row) if row.first else ["", ""]
    for name in texts:
        cells += [_score(row, name, "perplexity", 2), _difference(row, reference, name, than)]
        cells.append(_score(row, name, "bits_per_byte", 4))
        if name == "wikitext2":
            word = row.mean(name, "word_perplexity")
            cells.append("" if word is None else f"{word:.4g}")
    cells += speed_cells(row)
    if with_paper:
        cells += _paper_cells(row.paper, {} if reference is None else reference.paper, than)
    return cells


def _paper_cells(paper: dict[str, Any], reference: dict[str, Any], than: str) -> list[str]:
    """The paper's perplexity, how far it is above that of its reference, its tokens, its
    parameters."""
    if not paper:
        return ["", "", "", ""]
    ratio = _signed(paper_above(paper, reference), than)
    tokens, parameters = paper["tokens"], 1e6 * paper["parameters_millions"]
    return [f"{paper['perplexity']:.2f}", ratio, _millions(tokens), _millions(parameters)]


def paper_above(paper: dict[str, Any], reference: dict[str, Any]) -> float | None:
    """How far the paper's perplexity is above its reference's, of equal tokens; 0.05: 5%."""
    if not paper or not reference or reference["tokens"] != paper["tokens"]:
        return None
    return float(paper["perplexity"] / reference["perplexity"] - 1)


def _cost_cells(row: Row) -> list[str]:
    cache, entries = row.cache_bytes, row.entries
    if cache is None or entries is None:
        return ["cannot decode", ""]
    return [format_bytes(cache), f"{entries:.1f}" if entries else "none"]


def budget_cells(row: Row) -> list[str]:
    """Tokens that were trained on, and parameters; empty without a result."""
    if row.first is None:
        return ["", ""]
    return [_millions(row.first.end["tokens"]), _millions(row.first.run["parameters"])]


def speed_cells(row: Row) -> list[str]:
    """The highest rate of training and of memory, of any seed; empty where none is known."""
    if row.first is None:
        return ["", ""]
    rates = [r.tokens_per_second for r in row.results if r.tokens_per_second is not None]
    peaks = [r.end["peak_memory_bytes"] for r in row.results if r.end["peak_memory_bytes"]]
    return [
        f"{max(rates):,.0f}" if rates else "",
        format_bytes(max(peaks)) if peaks else "",
    ]


def _difference(row: Row, reference: Row | None, score: str, than: str = "") -> str:
    """How far a perplexity is above the reference's, in percent; see _signed."""
    return "" if reference is None else _signed(above(row, reference, score), than)


def above(row: Row, reference: Row, score: str) -> float | None:
    """How far a perplexity is above the reference's, over the seeds that both have; 0.05: 5%."""
    here, there = (r.by_seed(score, "perplexity") for r in (row, reference))
    both = here.keys() & there.keys()
    if not both:
        return None
    return sum(here[seed] for seed in both) / sum(there[seed] for seed in both) - 1


def _signed(share: float | None, than: str = "") -> str:
    """A difference in percent; than: what follows it, " to uniform"."""
    return "" if share is None else f"{percent(share):+.1f}%{than}"


def percent(share: float) -> float:
    """To a tenth, and never minus zero."""
    return round(100 * share, 1) + 0.0


def glance_table(tolds: list[Told]) -> Table:
    """How far the variants of all studies are above what they are compared with; a row for each
    that can be."""
    texts = list(dict.fromkeys(name for told in tolds for name in told.scores("text")))
    head = ["model", "compared with", "tokens"]
    for name in texts:
        head += [f"{name}: perplexity/token", "difference"]
    head.append("paper: difference")
    rows = []
    for told in tolds:
        for row in told.rows:
            reference = told.reference(row)
            if reference is None or all(above(row, reference, name) is None for name in texts):
                continue
            assert row.first is not None
            cells = [f"{told.study.name}/{row.variant}", reference.variant]
            cells.append(_millions(row.first.end["tokens"]))
            for name in texts:
                cells += [_score(row, name, "perplexity", 2), _difference(row, reference, name)]
            rows.append([*cells, _signed(paper_above(row.paper, reference.paper))])
    return head, rows


def _score(row: Row, score: str, figure: str, digits: int) -> str:
    """Mean and, of several seeds, half of their range."""
    values = row.values(score, figure)
    text = f"{statistics.fmean(values):.{digits}f}" if values else ""
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.{digits}f}"
    return with_diverged(row, text)


def with_diverged(row: Row, text: str) -> str:
    """A figure of the runs that have one (empty: none), and how many others diverged."""
    diverged = sum("diverged" in result.end for result in row.results)
    if not diverged:
        return text
    return f"{text} ({diverged} diverged)" if text else "diverged"


def position_edges(told: Told, score: str) -> list[tuple[int, int]]:
    """The buckets [start, stop) of positions that results have."""
    return sorted(
        {
            (bucket["start"], bucket["stop"])
            for row in told.rows
            for result in row.results
            for bucket in result.scores.get(score, {}).get("by_position", [])
        }
    )


def position_table(told: Told, score: str) -> Table:
    """Nats per token by position in the document, a row per bucket."""
    head = ["position", *(row.variant for row in told.rows)]
    body = [
        [f"{a:,} to {b - 1:,}", *(digits(row, at_position(row, score, a), 4) for row in told.rows)]
        for a, b in position_edges(told, score)
    ]
    return head, body


def at_position(row: Row, score: str, start: int) -> float | None:
    """Mean nats of a bucket over the seeds."""
    values = _nats_by_seed(row, score, start).values()
    return statistics.fmean(values) if values else None


def above_at_position(row: Row, reference: Row, score: str, start: int) -> float | None:
    """Nats of a bucket above the reference's, the mean over the seeds that both have."""
    here, there = (_nats_by_seed(r, score, start) for r in (row, reference))
    values = [here[seed] - there[seed] for seed in here.keys() & there.keys()]
    return statistics.fmean(values) if values else None


def _nats_by_seed(row: Row, score: str, start: int) -> dict[int, float]:
    return {
        result.run["seed"]: bucket["nats"]
        for result in row.results
        for bucket in result.scores.get(score, {}).get("by_position", [])
        if bucket["start"] == start
    }


def digits(row: Row, value: float | None, n: int) -> str:
    """A figure to n digits; see with_diverged."""
    return with_diverged(row, "" if value is None else f"{value:.{n}f}")


def _millions(n: float) -> str:
    if n >= 1e9:
        return f"{n / 1e9:.2f}B"
    return f"{n / 1e6:.{1 if n >= 1e7 else 2}f}M" if n >= 1e5 else f"{n:,.0f}"
