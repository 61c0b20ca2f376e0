"""What `attamba study list` prints: studies, runs, and how far they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attamba.config import ConfigError
from attamba.display import columns
from attamba.models.accounting import n_parameters
from attamba.studies.recipe import Run, Scale, Study, find_recipes, load_study
from attamba.studies.results import Shelf


def study_lines(recipes: Path, scale: Scale, results: Path) -> Iterator[str]:
    """One line per study: its runs, how many are done, and its question."""
    shelf = Shelf(results)
    rows = [["study", "runs", "done", "report"]]
    questions = []
    for path in find_recipes(recipes).values():
        study = load_study(path)
        runs = study.runs(scale)
        done = sum(bool(_result(run, shelf)) for run in runs)
        rows.append([study.name, str(len(runs)), str(done), " ".join(study.groups)])
        questions.append(study.question)
    head, *lines = columns(rows).splitlines()
    yield head
    for line, question in zip(lines, questions):
        yield f"{line}  {question.splitlines()[0] if question else ''}"


def run_lines(study: Study, runs: list[Run], results: Path) -> Iterator[str]:
    """The question, then one line per run: parameters, tokens, and whether there is a result."""
    yield study.question
    shelf = Shelf(results)
    rows = [["run", "parameters", "tokens", "result"]]
    for run in runs:
        told = _result(run, shelf) or shelf.why_not(run) or "missing"
        rows.append([run.name, *_size(run), told])
    yield columns(rows)


def _result(run: Run, shelf: Shelf) -> str:
    """done, or which run of another study is the same; empty without a result."""
    result = shelf.find(run)
    if result is None:
        return ""
    return "done" if result.study == run.study else f"as {result.name}"


def _size(run: Run) -> tuple[str, str]:
    try:
        config, stages = run.config(), run.stage_configs()
    except ConfigError as error:
        return "not possible:", str(error)
    trainings = [*stages, config]
    tokens = sum(c.train.steps * c.data.batch_size * c.data.seq_len for c in trainings)
    return f"{n_parameters(config.model) / 1e6:.1f}M", f"{tokens / 1e6:,.1f}M"
