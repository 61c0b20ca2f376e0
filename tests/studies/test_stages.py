"""Runs that are trained in stages, each from the weights of the one before."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attamba.config import ConfigError
from attamba.studies import engine
from attamba.studies.engine import Place, work_on
from attamba.studies.recipe import load_study, save_json
from attamba.studies.results import Shelf, read_result, result_path, saved_config
from attamba.studies.show import run_lines
from attamba.train import (
    TrainingDiverged,
    TrainingInterrupted,
    TrainingPreempted,
    load,
    train,
)
from attamba.train.checkpoint import read_config

STAGES = [
    {"data.seq_len": 8, "data.batch_size": 4, "train.steps": 4},
    {"data.seq_len": 16, "train.steps": 5},
]


@pytest.fixture
def study(make_study):
    return make_study(name="staged", stages=STAGES, seeds=[0])


@pytest.fixture
def one(study):
    return study.runs("full")[0]


def result_of(run, place):
    return read_result(result_path(place.results, run.study, run.name))


def test_each_stage_goes_on_from_the_one_before(one, place):
    assert work_on(one, place).status == "done"
    folder = place.run_dir(one)
    stages = [folder / "stages" / name for name in "12"]
    trained = [read_config(path) for path in (*stages, folder)]
    sizes = [(c.data.seq_len, c.data.batch_size, c.train.steps) for c in trained]
    assert sizes == [(8, 4, 4), (16, 2, 5), (32, 2, 6)]
    assert [c.train.init_from for c in trained] == [None, *map(str, stages)]
    # The last of them by hand.
    config = replace(trained[-1], out=str(folder.parent / "by-hand"))
    train(config)
    weights, again = (dict(load(path)[0].named_parameters()) for path in (folder, config.out))
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_the_result_counts_all_stages_and_names_no_folder(one, place):
    assert work_on(one, place).status == "done"
    result = result_of(one, place)
    assert result.end["steps"] == 4 + 5 + 6
    assert result.end["tokens"] == 4 * 4 * 8 + 5 * 2 * 16 + 6 * 2 * 32
    assert [r["step"] for r in result.train] == list(range(1, 16))
    assert [r.get("stage") for r in result.train] == 4 * [1] + 5 * [2] + 6 * [None]
    assert result.tokens_per_second == max(r["tokens_per_second"] for r in result.train[9:])
    assert [r["step"] for r in result.valid] == [3, 4, 4 + 3, 4 + 5, 9 + 3, 9 + 6]
    seconds = [r["seconds"] for r in result.train]
    assert seconds == sorted(seconds) and result.end["seconds"] == seconds[-1]
    assert str(place.out) not in result.path.read_text(encoding="utf-8")
    assert saved_config(result).train.init_from == f"stages {json.dumps(STAGES, sort_keys=True)}"


def test_what_is_done_is_found_again_and_other_stages_are_another_run(
    one, place, make_study, tmp_path
):
    assert work_on(one, place).status == "done"
    assert work_on(one, place).status == "there"
    twin = make_study(name="twin", stages=STAGES, seeds=[0]).runs("full")[0]
    assert work_on(twin, place).text == "as staged/chunks-s0"
    shelf = Shelf(place.results)
    for stages in ([], STAGES[:1], [{**STAGES[0], "train.steps": 5}, STAGES[1]]):
        other = make_study(name="staged", stages=stages, seeds=[0]).runs("full")[0]
        assert shelf.find(other) is None and "configuration" in shelf.why_not(other)
        outcome = work_on(other, place)
        assert outcome.status == "failed" and "train.init_from" in outcome.text


@pytest.mark.parametrize(
    ("steps", "stage"),
    [
        (3, ", stage 1 of 3"),
        (4, "step 4 of 4, stage 1 of 3"),
        (8, ", stage 2 of 3"),
        (14, " 3 of 3"),
    ],
)
def test_a_time_limit_stops_in_any_stage_and_the_next_call_goes_on(
    one, place, limited, tmp_path, steps, stage
):
    """Or between two, of which the second is not begun. The runs may have moved since."""
    whole = Place(place.data, tmp_path / "whole", tmp_path / "whole-results")
    assert work_on(one, whole).status == "done"
    outcome = stopped(one, limited(steps))
    assert outcome.text.endswith(stage), outcome.text
    begun = list(place.run_dir(one).glob("stages/*"))
    assert len(begun) == (1 if steps < 5 else 2)
    moved = replace(place, out=tmp_path / "moved")
    place.out.rename(moved.out)
    assert work_on(one, moved).status == "done"
    left, right = (result_of(one, p) for p in (whole, moved))
    assert [r["loss"] for r in left.train] == [r["loss"] for r in right.train]
    assert left.scores == right.scores


def stopped(run, place):
    outcome = work_on(run, place)
    assert outcome.status == "stopped"
    return outcome


def test_a_run_that_was_begun_is_not_taken_for_one_of_other_stages(one, place, limited, make_study):
    stopped(one, limited(14))
    changed = {**STAGES[1], "train.steps": 7}
    for stages in ([], STAGES[:1], [STAGES[0], changed], [changed, STAGES[1]], [*STAGES, changed]):
        (other, *_) = make_study(name="staged", stages=stages, seeds=[0]).runs("full")
        outcome = work_on(other, place)
        assert outcome.status == "failed", outcome
        assert "another configuration" in outcome.text or "holds no checkpoint" in outcome.text
    assert work_on(one, place).status == "done"


@pytest.mark.parametrize("gone", ["1", "2"])
def test_what_a_later_stage_began_with_is_not_trained_again(one, place, limited, gone):
    stopped(one, limited(14))
    folder = place.run_dir(one)
    shutil.rmtree(folder / "stages" / gone)
    outcome = work_on(one, place)
    assert outcome.status == "failed"
    assert outcome.text.startswith(f"{folder}/stages/{gone} holds no checkpoint")
    assert f"delete {folder} to train anew" in outcome.text


def test_one_that_diverges_in_a_stage_says_in_which(one, place, limited, monkeypatch):
    stopped(one, limited(4))

    def diverge(config, **_):
        if not config.out.endswith("2"):
            return train(config)
        Path(config.out).mkdir()
        Path(config.out, "metrics.jsonl").touch()
        raise TrainingDiverged("no", step=2, config=config)

    monkeypatch.setattr(engine, "train", diverge)
    assert work_on(one, place).text == "diverged at step 2, stage 2 of 3"
    result = result_of(one, place)
    assert result.end["steps"] == 4 and result.run["data"]["train"]
    assert work_on(one, place).status == "there"


def test_one_of_a_made_task_that_diverges_in_a_stage_is_a_result(make_study, place):
    """Whose rows, as long as a stage's, are other data than the run's own."""
    task = {"data.generate": {"type": "passkey", "digits": 2}, "data.seq_len": 100}
    too_much = {"optim.lr": 1e30, "optim.warmup_steps": 0, "optim.grad_clip": 0}
    short = {"data.seq_len": 90, "train.steps": 5}
    study = make_study(set=task, stages=[short, short | too_much], scores={}, seeds=[0])
    (run, _) = study.runs("full")
    assert "diverged at step" in (text := work_on(run, place).text) and "stage 2 of 3" in text
    assert work_on(run, place).status == "there"


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGINT, TrainingInterrupted), (signal.SIGTERM, TrainingPreempted)],
)
def test_a_signal_in_the_last_step_of_a_stage_ends_the_study(one, place, monkeypatch, number, kind):
    def signalled(config, *, on_log, **rest):
        def log(record):
            on_log(record)
            if record["kind"] == "valid" and record["step"] == config.train.steps:
                signal.raise_signal(number)

        return train(config, on_log=log, **rest)

    monkeypatch.setattr(engine, "train", signalled)
    with pytest.raises(kind):
        work_on(one, place)
    stages = sorted(path.name for path in place.run_dir(one).glob("stages/*"))
    assert stages == ["1"]
    monkeypatch.undo()
    assert work_on(one, place).status == "done"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mixer.chunk_size": 0}, "chunk_size=0 must be at least 1"),
        (
            {"model.dim": 64},
            "stage 2 has no weights for this model: embed.weight is",
        ),
    ],
)
def test_a_stage_that_cannot_be_fails_before_anything_is_trained(make_study, place, change, text):
    study = make_study(stages=[STAGES[0], change], seeds=[0], variants={"chunks": {}})
    (run,) = study.runs("full")
    outcome = work_on(run, place)
    assert outcome.status == "failed" and text in outcome.text
    assert not place.run_dir(run).exists()


def test_lists_count_the_tokens_of_all_stages(make_study, tmp_path):
    study = make_study(stages=[{"train.steps": 50_000}, {"train.steps": 25_000}], seeds=[0])
    text = "\n".join(run_lines(study, study.runs("full"), tmp_path / "results"))
    assert text.count(f"{75_006 * 2 * 32 / 1e6:.1f}M  missing") == 2, text


def test_a_recipe_without_its_base_keeps_its_stages(study, tmp_path):
    save_json(study, tmp_path / "staged.json")
    assert load_study(tmp_path / "staged.json") == study


def test_at_tiny_scale_all_stages_are_tiny(study):
    (run, _) = study.runs("tiny")
    trainings = [*run.stage_configs(), run.config()]
    assert [(c.train.steps, c.data.seq_len) for c in trainings] == [(4, 64)] * 3
    assert {c.model.n_layers for c in trainings} == {2}


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ({"train.steps": 3}, r"stages=\{'train\.steps': 3\} must be a list"),
        (["short"], r"stages=\['short'\] must be a list"),
        ([{"train.init_from": "runs/x"}], r"stage 1 sets train\.init_from"),
    ],
)
def test_what_stages_cannot_be(make_study, stages, text):
    with pytest.raises(ConfigError, match=text):
        make_study(stages=stages)


@pytest.mark.parametrize("place", ["base", "set", "full"])
def test_with_stages_nothing_else_says_what_a_run_begins_with(make_study, place):
    init = {"train": {"init_from": "runs/x"}} if place == "base" else {"train.init_from": "runs/x"}
    where = {"variants": {"full": init}} if place == "full" else {place: init}
    make_study(**where)
    with pytest.raises(ConfigError, match=rf"{place} sets train\.init_from, and with `stages`"):
        make_study(stages=STAGES, **where)
