"""Tasks while a model is trained: eval.tasks in its configuration."""

import json

import pytest

from attamba.cli import main
from attamba.config import ConfigError, RunConfig, from_dict
from attamba.train import read_metrics, train

WIKI = (
    " = Fish = \n \n A fish swims . \n = = Fins = = \n It has fins . \n = Birds = \n They fly . \n"
)
TASK = "wikitext2_local"


@pytest.fixture
def make_config(tmp_path):
    """make_config(name, **eval): a run of six steps."""
    (tmp_path / "wiki.txt").write_text(WIKI)
    (tmp_path / "text.txt").write_text("some words to learn from, again and again. " * 60)

    def make(name: str, **options: object) -> RunConfig:
        tree = {
            "out": str(tmp_path / name),
            "model": {"dim": 32, "n_layers": 2, "mixer": {"n_heads": 4, "boundary": "jitter"}},
            "data": {"train": str(tmp_path / "text.txt"), "seq_len": 32, "batch_size": 4},
            "train": {"steps": 6, "save_every": 3, "log_every": 1, "progress": False},
            "eval": options,
        }
        return from_dict(RunConfig, tree)

    return make


def losses(records) -> list[float]:
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_tasks_are_scored_as_eval_scores_the_checkpoint(make_config, tmp_path, capsys):
    tasks = [f"{TASK}={tmp_path}/wiki.txt"]
    result = train(make_config("run", tasks=tasks, every=3))
    found = [record for record in result.metrics if record["kind"] == "tasks"]
    assert [record["step"] for record in found] == [3, 6]
    assert found == [r for r in read_metrics(result.run_dir / "metrics.jsonl") if r in found]
    options = ["--device", "cpu", "--tasks", tasks[0], "--json", str(tmp_path / "out.json")]
    for record in found:
        checkpoint = result.run_dir / "checkpoints" / f"step-{record['step']:08d}"
        assert main(["eval", str(checkpoint), *options]) == 0
        want = json.loads((tmp_path / "out.json").read_text())["results"][TASK]
        for measure in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            assert record[f"{TASK}/{measure}"] == pytest.approx(want[f"{measure},none"], rel=1e-5)
    capsys.readouterr()


def test_training_goes_on_as_without_tasks(make_config, tmp_path):
    plain = train(make_config("plain"))
    tasks = train(make_config("tasks", tasks=[f"{TASK}={tmp_path}/wiki.txt"], every=1, limit=1))
    assert losses(tasks.metrics) == losses(plain.metrics)
    assert sum(record["kind"] == "tasks" for record in tasks.metrics) == 6


def test_the_last_step_alone_by_default_and_a_line_for_it(make_config, tmp_path, capsys):
    config = make_config("run", tasks=[f"{TASK}={tmp_path}/wiki.txt"])
    config.train.progress = True
    result = train(config)
    assert [r["step"] for r in result.metrics if r["kind"] == "tasks"] == [6]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if TASK in line]
    assert line.startswith(f"step 6/6  {TASK}/")


def test_what_cannot_be_shows_before_the_first_step(make_config, tmp_path):
    with pytest.raises(ValueError, match="no path was given; say wikitext2_local=PATH"):
        train(make_config("run", tasks=[TASK]))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    for options in ({"every": 3}, {"limit": 3}):
        with pytest.raises(ConfigError, match=r"need eval\.tasks"):
            make_config("run", **options).validate()
    with pytest.raises(ConfigError, match=r"eval\.limit=0 must be at least 1"):
        make_config("run", tasks=[TASK], limit=0).validate()
