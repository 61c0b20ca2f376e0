"""Reports from the result files of tiny runs: numbers from the files, and nothing invented."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pages import rows_of

from attamba.cli import main
from attamba.config import ConfigError
from attamba.studies import figures
from attamba.studies.jobs import run_all
from attamba.studies.recipe import GROUPS, find_recipes, load_study, save_json
from attamba.studies.report import markdown, write_report
from attamba.studies.results import Result, Shelf, read_result
from attamba.studies.tables import (
    Row,
    Told,
    above_at_position,
    position_table,
    quality_table,
    tell,
)
from attamba.studies.task_tables import (
    at_setting,
    copy_table,
    dial_table,
    memory_table,
    place_table,
)

FOLDER = Path(__file__).parents[2] / "studies"
BOOKS = {"kind": "text", "data": "valid", "context": 32, "max_tokens": 200}
SCORES = {
    "books": BOOKS,
    "wikitext2": {**BOOKS, "data": "wikitext2"},
    "whole": {**BOOKS, "context": None, "document_tokens": 100},
    "dial": {"kind": "dial", "values": [2, 4], "context": 32, "max_tokens": 100},
    "copying": {"kind": "copy", "passage": 12, "gaps": [4, 20], "rows": 3},
}
NUMBERS = {
    "source": "a paper",
    "runs": {
        "p": {"perplexity": 33.5, "tokens": 1_000_000, "parameters_millions": 60.0},
        "q": {"perplexity": 30.0, "tokens": 1, "parameters_millions": 60.0},
        "r": {"perplexity": 40.0, "tokens": 1_000_000, "parameters_millions": 52.5},
    },
}


THREE = {
    "variants": {
        "chunks": {"mixer.chunk_size": 4},
        "late": {},
        "transformer": {"mixer": {"type": "transformer"}},
    },
    "scores": SCORES,
    "paper": {"chunks": "p", "transformer": "q"},
    "report": ["paper", "main"],
}


@pytest.fixture(scope="module")
def folder_of_done(study_in, place_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    study = study_in(folder, **THREE)
    runs = [r for r in study.runs("full") if r.name in ("chunks-s0", "chunks-s1", "transformer-s0")]
    outcomes = run_all(runs, place_in(folder), say=lambda text: None)
    assert {o.status for o in outcomes} == {"done"}
    return folder


@pytest.fixture
def done(folder_of_done, make_study, tmp_path):
    """A study of three variants; two of them have been run, one of these with two seeds."""
    shutil.copytree(folder_of_done, tmp_path, dirs_exist_ok=True)
    paper = tmp_path / "recipes" / "paper"
    paper.mkdir()
    (paper / "numbers.json").write_text(json.dumps(NUMBERS))
    return make_study(**THREE)


def test_what_is_level_looks_level(done, place, tmp_path, monkeypatch):
    """The axis of perplexities is never narrower than a twentieth of them."""
    told = tell(done, Shelf(place.results), tmp_path / "recipes", "full")
    shown = []
    monkeypatch.setattr(figures.plots, "save", lambda figure, path: shown.append(figure.axes[0]))
    for worse in (1.001, 1.5):
        for row in told.rows:
            factor = worse if row.variant == "transformer" else 1.0
            for result in row.results:
                result.scores["books"]["perplexity"] = 30.0 * factor
        figures.quality(told, tmp_path / "plot.svg", score="books")
    low, high = shown[0].get_ylim()
    assert high - low == pytest.approx(0.05 * 30.0, rel=0.01)
    assert (high + low) / 2 == pytest.approx(30.015)
    low, high = shown[1].get_ylim()
    assert low < 30.0 < 45.0 < high < 46.0


def test_a_report_holds_the_results_numbers(done, place, tmp_path):
    written = write_report("main", tmp_path / "recipes", place.results, tmp_path / "report")
    page = written[0].read_text(encoding="utf-8")
    rows = rows_of(page, "little")
    results = {r.path.stem: r for r in map(read_result, (place.results / "little").iterdir())}
    seeds = [results[f"chunks-s{i}"].scores["books"]["perplexity"] for i in (0, 1)]
    mean, half = sum(seeds) / 2, abs(seeds[0] - seeds[1]) / 2
    assert f"{mean:.2f} ± {half:.2f}" in rows["chunks"]
    theirs = results["transformer-s0"].scores["books"]["perplexity"]
    assert f"{theirs:.2f}" in rows["transformer"]
    # The transformer has seed 0 alone, and is compared with that.
    assert f"{100 * (seeds[0] / theirs - 1):+.1f}%" in rows["chunks"]
    assert rows["chunks"][1] == "2 of 2" and rows["transformer"][1] == "1 of 2"
    assert rows["late"][1:3] == ["0 of 2", "not run"]
    copied = [results[f"chunks-s{i}"].scores["copying"]["settings"] for i in (0, 1)]
    first = sum(setting["first"] for run in copied for setting in run) / 4
    again = [sum(run[i]["again"] for run in copied) / 2 for i in (0, 1)]
    table = page.split("**copying**")[1].splitlines()
    assert table[2].startswith("| model | runs | cache | first | gap 4 | gap 20 |")
    assert table[4].endswith(f"| {first:.3f} | {again[0]:.3f} | {again[1]:.3f} |")
    assert "33.50" in rows["chunks"] and "30.00" in rows["transformer"]
    assert "a paper" in page and "3 of 6 runs are done" in page
    call = results["chunks-s0"].end["calls"][0]
    assert f"Made on {call['device']}; torch {call['torch']}; " in page
    names = [path.name for path in written[1:]]
    for name in ("quality", "books-position", "whole-position", "dial", "copying", "paper"):
        assert f"main-little-{name}.svg" in names
    for path in written[1:]:
        assert path.read_text(encoding="utf-8").startswith("<?xml") and path.name in page


def test_the_plot_beside_the_paper(done, make_study, place, tmp_path):
    """Percent above the transformer, also below it; perplexities where there is none."""

    def labels(name):
        folder = tmp_path / name
        write_report("paper", tmp_path / "recipes", place.results, folder)
        return {
            path.name: [text.strip() for text in re.findall("<!-- (.*?) -->", path.read_text())]
            for path in folder.glob("*-paper.svg")
        }

    def alike(name, variants, paper, **changes):
        """A study of runs that have been made."""
        common = {"variants": variants, "scores": done.scores, "report": ["paper"]}
        make_study(name, paper=paper, **common, **changes)

    chunks, transformer = done.variants["chunks"], done.variants["transformer"]
    one = {"chunks": chunks, "late": {}, "transformer": transformer}
    alike("one", one, {"chunks": "p", "late": "q", "transformer": "r"})
    two = {"chunks": chunks, "late": {}, "other": transformer}
    alike("two", two, {"chunks": "p", "late": "q", "other": "r"})
    alike("three", two, {"chunks": "p", "late": "q", "other": "r"}, against="late")
    alike("four", {**two, "same": chunks}, {"same": "p", "other": "r"}, against="chunks")
    drawn = labels("report")
    results = {r.path.stem: r for r in map(read_result, (place.results / "little").iterdir())}
    ours, theirs = (results[f"{n}-s0"].scores["books"] for n in ("chunks", "transformer"))
    relative, plain = drawn["paper-one-paper.svg"], drawn["paper-two-paper.svg"]
    assert f"{100 * (ours['perplexity'] / theirs['perplexity'] - 1):+.1f}%" in relative
    assert "-16.2%" in relative and "33.50" not in relative  # 33.5 / 40
    assert "-25.0%" not in relative  # 30 / 40, after other numbers of tokens
    assert "33.50" in plain and "30.00" in plain and "40.00" in plain and "not run" in plain
    # What all are compared with has not been run, or the paper has no figure of it.
    assert drawn["paper-three-paper.svg"] == plain
    assert {"33.50", "40.00"} <= set(drawn["paper-four-paper.svg"])


def test_variants_are_compared_with_what_the_recipe_names(done, make_study, place, tmp_path):
    """One for all has its name in the head; others are named beside the difference."""
    results = {r.path.stem: r for r in map(read_result, (place.results / "little").iterdir())}
    full, chunks = (
        results[f"{name}-s0"].scores["books"]["perplexity"] for name in ("transformer", "chunks")
    )
    difference = f"{round(100 * (full / chunks - 1), 1) + 0.0:+.1f}%"
    variants = {"full": done.variants["transformer"], "late": {}, "chunks": done.variants["chunks"]}
    common = {"variants": variants, "scores": {"books": BOOKS}, "paper": {}}
    make_study("one", **common, against="chunks")
    make_study("pairs", **common, against={"full": "chunks", "chunks": "late"})
    page = write_report("main", tmp_path / "recipes", place.results, tmp_path / "report")[0]
    text = page.read_text(encoding="utf-8")
    one, pairs, glance = (rows_of(text, title) for title in ("one", "pairs", "At a glance"))
    at = one["model"].index("to chunks")
    assert one["full"][at] == difference and not one["chunks"][at]
    assert pairs["full"][pairs["model"].index("difference")] == f"{difference} to chunks"
    # What has not been run is compared with nothing, nor is anything with it.
    of_these = {name for name in glance if name.startswith(("one/", "pairs/"))}
    assert of_these == {"one/full", "pairs/full"}
    assert glance["one/full"][1] == "chunks" and glance["one/full"][4] == difference


def test_a_report_shows_what_another_study_has_run(done, make_study, place, tmp_path):
    variants = {"same": done.variants["chunks"], "new": {"optim.lr": 1e-4}}
    make_study("other", variants=variants, scores=done.scores, paper={})
    page = write_report("main", tmp_path / "recipes", place.results, tmp_path / "report")[0]
    text = page.read_text(encoding="utf-8")
    rows = rows_of(text, "other")
    up_to_perplexity = slice(1, 6)  # after it comes what depends on the other variants
    assert rows["same"][up_to_perplexity] == rows_of(text, "little")["chunks"][up_to_perplexity]
    assert rows["new"][1:3] == ["0 of 2", "not run"]
    assert "in other studies: same is little/chunks-s0, same is little/chunks-s1." in text


def test_the_own_chunk_size_is_shown_where_several_were_tried():
    settings = [{"chunk_size": p, "gap": 0, "accuracy": 1 / p} for p in (4, 8)]
    config = {"model": {"mixer": {"type": "attamba", "chunk_size": 8}}}
    result = Result(Path("a"), {"config": config, "seed": 0}, scores={"r": {"settings": settings}})
    assert at_setting(Row("a", [result], 1), "r", "gap", 0, "accuracy") == 1 / 8


def _ended(seed, diverged, scores):
    """A result by hand; it has scores where it has not diverged."""
    data = {"seq_len": 32}
    run = {"seed": seed, "costs": {}, "config": {"data": data, "model": {"mixer": {}}}}
    end = {"tokens": 64, "peak_memory_bytes": None, **({"diverged": "x"} if diverged else {})}
    run["parameters"] = 1
    return Result(Path("a"), run, scores={} if diverged else scores, end=end)


FOUND = {
    "recall": [
        {"gap": gap, "accuracy": 0.5, "first": 1.0, "again": 2.0, "chunk_size": None}
        for gap in (0, 8)
    ],
    "dial": [{"value": value, "perplexity": 3.0} for value in (2, 4)],
    "books": [{"start": 0, "stop": 8, "nats": 1.5}],
}


@pytest.mark.parametrize(
    ("table", "name", "spec", "n_before", "cells"),
    [
        (memory_table, "recall", {"kind": "recall", "gaps": [0, 8]}, 5, ["50.0%", "50.0%"]),
        (copy_table, "recall", {"kind": "copy", "gaps": [0, 8]}, 3, ["1.000", "2.000", "2.000"]),
        (dial_table, "dial", {"kind": "dial", "values": [2, 4]}, 0, ["3.00", "3.00"]),
        (position_table, "books", {"kind": "text"}, 0, ["1.5000"]),
    ],
)
def test_tables_say_what_diverged(make_study, table, name, spec, n_before, cells):
    key = {"books": "by_position", "dial": "rows"}.get(name, "settings")
    scores = {name: {key: FOUND[name]}}
    rows = [
        Row("well", [_ended(0, False, scores)], 2),
        Row("half", [_ended(0, True, scores), _ended(1, False, scores)], 2),
        Row("none", [_ended(0, True, scores)], 2),
        Row("late", [], 2),
    ]
    body = table(Told(make_study(scores={name: spec}), rows, ""), name)[1]
    if n_before:  # a row per variant
        found = {row[0]: row[n_before : n_before + len(cells)] for row in body}
    else:  # a column per variant
        columns = list(zip(*body))[1:]
        found = {row.variant: list(column) for row, column in zip(rows, columns)}
    assert found["well"] == cells
    assert found["half"] == [f"{cell} (1 diverged)" for cell in cells]
    assert found["none"] == ["diverged"] * len(cells)
    assert "diverged" not in " ".join(found["late"])


def test_places_are_pooled_over_gaps_and_seeds(make_study):
    """By counts, not by the mean of shares; of pass keys the longest rows alone."""

    def at(key, value, part, *buckets):
        names = ("start" if part == "by_distance" else "depth", "n", "accuracy")
        return {key: value, part: [dict(zip(names, bucket)) for bucket in buckets]}

    near = at("gap", 0, "by_distance", (4, 1, 1.0), (8, 3, 0.0))
    far = at("gap", 8, "by_distance", (8, 1, 1.0))
    keys = [
        at("length", 64, "by_depth", (0, 5, 0.0)),
        at("length", 99, "by_depth", (0, 2, 0.5), (4, 1, 1.0)),
    ]
    scores = {"recall": {"settings": [near, far]}, "passkey": {"settings": keys}}
    specs = {"recall": {"kind": "recall"}, "passkey": {"kind": "passkey"}}
    rows = [Row("a", [_ended(0, False, scores), _ended(1, False, scores)], 2), Row("b", [], 2)]
    told = Told(make_study(scores=specs), rows, "")
    assert place_table(told, "recall") == (
        ["model", "4 to 7", "8 to 15"],
        [["a", "100.0%", "25.0%"]],
    )
    head = ["model", "first fifth", "last fifth"]
    assert place_table(told, "passkey") == (head, [["a", "50.0%", "100.0%"]])


def test_position_is_compared_over_the_seeds_that_both_have():
    def row(name, nats):
        results = [
            Result(
                Path(name),
                {"seed": seed},
                scores={"books": {"by_position": [{"start": 8, "stop": 16, "nats": value}]}},
            )
            for seed, value in nats.items()
        ]
        return Row(name, results, 2)

    few, both = row("few", {0: 3.5}), row("transformer", {0: 3.0, 1: 9.0})
    assert above_at_position(few, both, "books", 8) == 0.5
    assert above_at_position(few, both, "books", 16) is None


def test_the_same_results_give_the_same_files(done, place, tmp_path):
    pages = []
    for name in ("a", "b"):
        written = write_report("paper", tmp_path / "recipes", place.results, tmp_path / name)
        pages.append({path.name: path.read_bytes() for path in written})
    assert pages[0] == pages[1] and len(pages[0]) > 3


def test_results_alone_are_enough(done, place, tmp_path):
    """Neither run folders nor texts are looked at."""
    shutil.rmtree(place.out)
    arguments = ["study", "report", "main", "--recipes", str(tmp_path / "recipes")]
    arguments += ["--results", str(place.results), "--out", str(tmp_path / "again")]
    assert main(arguments) == 0
    assert "chunks" in (tmp_path / "again" / "main.md").read_text()


def test_a_result_of_tiny_scale_is_not_taken_for_one(done, place, tmp_path):
    told = tell(done, Shelf(place.results), tmp_path / "recipes", "tiny")
    assert not any(row.results for row in told.rows)
    table = quality_table(told)
    assert all(row[2] == "not run" for row in table[1])


def test_results_on_different_texts_are_not_compared(done, place, tmp_path):
    path = place.results / "little" / "chunks-s0.jsonl"
    first, *rest = path.read_text().splitlines()
    record = json.loads(first)
    record["data"]["train"] = "0" * 64
    path.write_text("\n".join([json.dumps(record), *rest]) + "\n")
    with pytest.raises(ConfigError, match=r"chunks-s0.* on different tokens"):
        write_report("main", tmp_path / "recipes", place.results, tmp_path / "report")


def test_a_damaged_result_is_named(done, place, tmp_path):
    path = place.results / "little" / "chunks-s0.jsonl"
    path.write_text(path.read_text()[:50])
    with pytest.raises(ConfigError, match=r"chunks-s0\.jsonl is no result file"):
        write_report("main", tmp_path / "recipes", place.results, tmp_path / "report")


@pytest.mark.parametrize("group", GROUPS)
def test_every_shipped_group_reports_from_nothing(group, tmp_path):
    """Without one result: all is shown as not run, with the paper's numbers."""
    written = write_report(group, FOLDER, tmp_path / "none", tmp_path / "report")
    page = written[0].read_text(encoding="utf-8")
    studies = [load_study(path) for path in find_recipes(FOLDER).values()]
    for study in studies:
        if group in study.groups:
            rows = rows_of(page, study.name)
            assert set(study.variants) <= set(rows)
            for variant in study.variants:
                assert "not run" in rows[variant]
    assert len(written) == 1  # no plot


@pytest.mark.parametrize("group", GROUPS)
def test_shipped_reports_are_those_of_the_shipped_results(group, tmp_path):
    """Rebuilt, each page is the one that is shipped, and so are the names of its plots."""
    shipped = FOLDER / "report"
    written = write_report(group, FOLDER, FOLDER / "results", tmp_path)
    page = written[0]
    assert page.read_text(encoding="utf-8") == (shipped / page.name).read_text(encoding="utf-8")
    assert {path.name for path in written[1:]} == {p.name for p in shipped.glob(f"{group}-*.svg")}


def test_every_number_of_the_paper_is_named_by_a_recipe():
    numbers = json.loads((FOLDER / "paper" / "numbers.json").read_text())["runs"]
    named = {
        key for path in find_recipes(FOLDER).values() for key in load_study(path).paper.values()
    }
    assert named == set(numbers)


def test_a_shipped_study_end_to_end_at_tiny_scale(tmp_path, capsys):
    folders = ["--results", str(tmp_path / "results")]
    recipe = tmp_path / "recall.json"
    save_json(load_study(FOLDER / "recall.yaml"), recipe)
    run = [
        "study",
        "run",
        str(recipe),
        "--scale",
        "tiny",
        *folders,
        "--out",
        str(tmp_path / "runs"),
    ]
    assert main([*run, "--only", "*-P8"]) == 0
    assert "recall at tiny scale: 3 of 3 runs are done (3 now)" in capsys.readouterr().out
    report = ["study", "report", "memory", "--scale", "tiny", "--recipes", str(FOLDER)]
    assert main([*report, *folders, "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "memory.md").read_text(encoding="utf-8")
    rows = rows_of(page, "recall")
    assert rows["heads-P8"][5].endswith("%") and rows["chunk-P4"][5] == "not run"
    assert "say nothing about the models" in page
    assert (tmp_path / "report" / "memory-recall-recall.svg").exists()


def test_columns_that_are_empty_are_left_out():
    table = markdown((["a", "b", "c"], [["1", "", "x"], ["2", "", ""]]))
    assert table.splitlines() == ["| a | c |", "| --- | --: |", "| 1 | x |", "| 2 |  |"]
