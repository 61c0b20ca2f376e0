"""`attamba study report`: Markdown tables and SVG plots of a group of studies, rebuilt offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from attamba.config import ConfigError
from attamba.data.files import write_aside
from attamba.studies import figures
from attamba.studies.recipe import GROUPS, Scale, find_recipes, load_study
from attamba.studies.results import Shelf
from attamba.studies.tables import (
    Table,
    Told,
    glance_table,
    made_with,
    position_table,
    quality_table,
    tell,
)
from attamba.studies.task_tables import (
    copy_table,
    dial_table,
    memory_table,
    place_table,
)

TITLES = {
    "paper": "The paper's studies, beside its numbers",
    "main": "The main table",
    "ablations": "Ablations",
    "memory": "Tasks that need memory",
}
NOT_ONE_MEASURE = (
    "The paper's figures are of another corpus and tokenizer, and of code in which chunks were not "
    "compressed: compare the order and the ratios within a column, never numbers across columns."
)
ABOVE = (
    "Differences are to the model that a variant is compared with, over the seeds that both have; "
    "perplexities are means over all. Studies may score other parts of a text: compare within one."
)
PLACES = {
    "recall": "by the tokens from the question back to the pair, at all gaps",
    "passkey": "by where the key stood in the longest rows",
}
TINY_IS_NO_RESULT = (
    "Tiny scale: a few steps on a little text, to try that everything runs. These figures say "
    "nothing about the models."
)


def write_report(
    group: str, recipes: Path, results: Path, out: Path, scale: Scale = "full"
) -> list[Path]:
    """Write <out>/<group>.md and its plots, and return what was written, the page first.

    recipes: folder of the recipes and of paper/numbers.json. results: of result files; what is not
    there is shown as not run. Needs matplotlib. Raises ConfigError for what cannot be read.
    """
    if group not in GROUPS:
        raise ConfigError(f"report {group!r} must be one of: {', '.join(GROUPS)}")
    studies = [load_study(path) for path in find_recipes(recipes).values()]
    studies = [study for study in studies if group in study.groups]
    if not studies:
        raise ConfigError(f"{recipes} holds no recipe with report: [{group}]")
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    parts = [f"# {TITLES[group]}", f"Made by `attamba study report {group}` from result files."]
    if scale == "tiny":
        parts.append(TINY_IS_NO_RESULT)
    shelf = Shelf(results)
    tolds = [tell(study, shelf, recipes, scale) for study in studies]
    glance = glance_table(tolds)
    if glance[1]:
        parts += ["## At a glance", ABOVE, markdown(glance)]
    for told in tolds:
        parts += _section(told, out, f"{group}-{told.study.name}", written)
    page = out / f"{group}.md"
    write_aside(page, ("\n\n".join(parts) + "\n").encode())
    return [page, *written]


def _section(told: Told, out: Path, stem: str, written: list[Path]) -> Iterator[str]:
    """The parts of one study's section; its plots are written on the way."""
    study = told.study
    yield f"## {study.name}"
    yield study.question
    done = sum(len(row.results) for row in told.rows)
    of = sum(row.n_seeds for row in told.rows)
    yield f"{done} of {of} runs are done: `attamba study run {study.name}`."
    if made_with(told):
        yield made_with(told)
    if told.scores("text"):
        yield markdown(quality_table(told))
    for name in told.scores("copy"):
        yield f"**{name}**, nats per token of passages, read first and again after a gap"
        yield markdown(copy_table(told, name))
    for name in told.scores("recall") + told.scores("passkey"):
        yield f"**{name}**, share found"
        yield markdown(memory_table(told, name))
        places = place_table(told, name)
        if places[1]:
            yield f"**{name}**, share found, {PLACES[study.scores[name]['kind']]}"
            yield markdown(places)
    for name in told.scores("dial"):
        yield f"**{name}**, perplexity per token of one checkpoint at other settings"
        yield markdown(dial_table(told, name))
    for name in told.scores("text"):
        table = position_table(told, name)
        if study.scores[name].get("context", 1024) is None and table[1]:
            yield f"**{name}**, nats per token by position in the document"
            yield markdown(table)
    if told.source:
        yield f"{NOT_ONE_MEASURE} Source: {told.source}."
    for name, draw in _plots(told):
        path = out / f"{stem}-{name}.svg"
        draw(told, path)
        written.append(path)
        yield f"![{study.name}: {name}]({path.name})"


Draw = Callable[[Told, Path], None]


def _plots(told: Told) -> Iterator[tuple[str, Draw]]:
    """The plots that there are results for; what compares variants needs two of them."""
    done = [row for row in told.rows if any(result.scores for result in row.results)]
    if not done:
        return
    texts = told.scores("text")
    if len(done) > 1:
        if texts:
            yield "quality", partial(figures.quality, score=texts[0])
        for name in texts:
            yield f"{name}-position", partial(figures.position, score=name)
    for name in told.scores("dial"):
        yield name, partial(figures.dial, score=name)
    for name in told.scores("copy"):
        yield name, partial(figures.copying, score=name)
    for name in told.scores("recall") + told.scores("passkey"):
        yield name, partial(figures.memory, score=name)
    if sum(bool(row.paper) for row in done) > 1:
        yield "paper", partial(figures.beside_paper, score=texts[0])


def markdown(table: Table) -> str:
    """A table in Markdown; columns that are empty throughout are left out."""
    head, rows = table
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    lines = [head, ["---", *["--:"] * (len(kept) - 1)], *rows]
    body = [[cells[i] for i in kept] if len(cells) == len(head) else cells for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in body)
