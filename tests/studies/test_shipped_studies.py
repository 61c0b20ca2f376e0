"""Every shipped study runs at tiny scale, from its recipe to its result."""

from pathlib import Path

import pytest

from attamba.cli import main
from attamba.studies.recipe import find_recipes, load_study
from attamba.studies.results import read_result

FOLDER = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("name", find_recipes(FOLDER))
def test_a_variant_is_trained_and_scored(name, which, tmp_path, capsys):
    path = find_recipes(FOLDER)[name]
    study = load_study(path)
    run = study.runs("tiny")[0 if which == "first" else -1]
    out, results = tmp_path / "runs", tmp_path / "results"
    arguments = ["study", "run", str(path), "--scale", "tiny", "--only", run.name]
    assert main([*arguments, "--out", str(out), "--results", str(results)]) == 0
    assert f"{name} at tiny scale: 1 of 1 runs are done (1 now)" in capsys.readouterr().out
    (file,) = results.rglob("*.jsonl")
    result = read_result(file)
    assert set(result.scores) == set(study.scores)
    assert result.end["tokens"] > 0 and "diverged" not in result.end
