"""The tables of studies/README.md hold what results and reports hold."""

import json
import re
from pathlib import Path

import pytest
from pages import cells_of, rows_of, tables_of

from attamba.studies.recipe import find_recipes, load_study

FOLDER = Path(__file__).parents[2] / "studies"
README = (FOLDER / "README.md").read_text(encoding="utf-8")

RECALL = {
    "recall": (
        "chunk-P4",
        "sequence-P4",
        "heads-P4",
        "chunk-P8",
        "sequence-P8",
        "heads-P8",
        "window-bytes",
        "transformer",
    ),
    "recall-long": (
        "transformer",
        "heads-P8",
        "sequence-P8",
        "chunk-P8",
        "window-bytes",
        "heads-P16",
    ),
    "recall-full": (
        "transformer",
        "heads-P4",
        "G4-P4",
        "G2-P2",
        "sequence-P8",
        "chunk-P8",
        "heads-P8",
        "window-bytes",
        "G1",
    ),
}
"""Variants of the studies whose tables the section "Recall" shows, in their order."""


def report(name: str) -> str:
    return (FOLDER / "report" / f"{name}.md").read_text(encoding="utf-8")


def figures(section: str, at: int = 0) -> list[list[str]]:
    """A table's cells from the third column on, row by row, with nothing in bold."""
    table = cells_of(README, section)[at]
    return [[cell.replace("*", "") for cell in row[2:]] for row in table]


def settings_of(run: str) -> list[dict]:
    """What a run's score of memory measured: run as STUDY/VARIANT-sSEED."""
    lines = (FOLDER / "results" / f"{run}.jsonl").read_text(encoding="utf-8").splitlines()
    (score,) = [line for line in map(json.loads, lines) if line["kind"] == "score"]
    return score["result"]["settings"]


def test_the_readme_knows_what_has_been_run():
    """How many runs of the main table are done, and which studies have none."""
    state = README.split("**State.**")[1].split("\n\n")[0]
    recipes = find_recipes(FOLDER)
    done = {name: len(list((FOLDER / "results" / name).glob("*.jsonl"))) for name in recipes}
    assert (
        f"{done['main']} of {len(load_study(recipes['main']).runs('full'))} runs are done" in state
    )
    none = set(re.findall("`([a-z-]+)`", state.split("are done.")[1].split("have none")[0]))
    assert none == {name for name, count in done.items() if count == 0}


@pytest.mark.parametrize(
    ("section", "study", "n_runs"),
    [("The story in two minutes", "main", 13), ("Copying", "eighth", 8)],
)
def test_the_readme_shows_the_report_as_it_is(section, study, n_runs):
    """Its tables are the report's, runs that are missing and some columns left out."""
    told = tables_of(report("main"), study)
    shown = tables_of(README, section)[0]
    done = {name for name, cells in told[0].items() if not cells[1].startswith("0 of")}
    assert set(shown) == done and len(shown) == n_runs + len({"model", "---"})
    for i, column in enumerate(shown["model"]):
        table = next(table for table in told if column in table["model"])
        at = table["model"].index(column)
        assert [shown[name][i] for name in shown] == [table[name][at] for name in shown]


def test_the_readme_shows_single_changes_as_they_are():
    """Every variant with a result, of the studies it names, row by row as in the report."""
    told = rows_of(report("ablations"), "At a glance")
    shown = rows_of(README, "One thing at a time")
    studies = {name.split("/")[0] for name in shown if "/" in name}
    assert {"boundaries", "compressors", "scopes"} <= studies
    wanted = {name for name in told if name.split("/")[0] in studies}
    assert shown == {name: told[name] for name in ("model", "---", *wanted)}


@pytest.mark.parametrize(("at", "study"), list(enumerate(RECALL)))
def test_the_readme_shows_recall_as_it_is(at, study):
    """Shares found at once and after 64 blanks, with seeds 0 and 1."""

    def found(variant: str, gap: int) -> str:
        runs = [settings_of(f"{study}/{variant}-s{seed}") for seed in (0, 1)]
        shares = [one["accuracy"] for run in runs for one in run if one["gap"] == gap]
        return " / ".join(f"{share:.1%}" for share in shares)

    wanted = [[found(variant, gap) for gap in (0, 64)] for variant in RECALL[study]]
    assert figures("Recall", at) == wanted


def test_the_readme_shows_pass_keys_as_they_are():
    """Shares found in rows of each length, and the share of digits in the longest."""

    def found(variant: str) -> list[str]:
        by_length = {one["length"]: one for one in settings_of(f"passkey-gentle/{variant}-s0")}
        shares = [f"{by_length[length]['accuracy']:.1%}" for length in (512, 4096, 16384, 65536)]
        return [*shares, f"{by_length[65536]['digits']:.0%}"]

    variants = ("transformer", "attamba-heads-P8", "P2-G2", "attamba-P8", "window-P8")
    assert figures("Pass keys") == [found(variant) for variant in variants]
