"""Runs: done once, resumed where they stopped, failing alone, written whole."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from attamba.cli import main
from attamba.config import ConfigError
from attamba.data import load_tokenizer, prepare
from attamba.studies import engine
from attamba.studies.engine import Place, work_on
from attamba.studies.jobs import run_all
from attamba.studies.results import (
    Shelf,
    differences,
    read_result,
    result_path,
    saved_config,
    thinned,
)
from attamba.studies.scores import TextScore
from attamba.studies.show import run_lines
from attamba.studies.tables import tell
from attamba.train import TrainingPreempted
from attamba.train.metrics import read_metrics


def _statuses(outcomes):
    return {o.name: o.status for o in outcomes}


def results_of(folder):
    return [read_result(path) for path in sorted(folder.glob("*.jsonl"))]


def _losses(result):
    return [record["loss"] for record in result.train]


@pytest.fixture
def one(make_study):
    """The first run of the little study."""
    return make_study().runs("full")[0]


def test_a_study_end_to_end(make_study, place):
    study = make_study()
    said = []
    outcomes = run_all(study.runs("full"), place, say=said.append)
    assert set(_statuses(outcomes).values()) == {"done"} and len(said) == 4
    results = results_of(place.results / "little")
    assert [r.path.stem for r in results] == ["chunks-s0", "chunks-s1", "full-s0", "full-s1"]
    for result in results:
        assert result.run["config"]["train"]["seed"] == result.run["seed"]
        assert result.run["data"]["train"] and result.run["parameters"] > 0
        assert (
            result.run["costs"]["65536"]["cache_bytes"] > result.run["costs"]["32"]["cache_bytes"]
        )
        assert [r["step"] for r in result.train] == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in result.valid] == [3, 6]
        assert result.scores["books"]["n_tokens"] == 200
        assert result.end["tokens"] == 6 * 2 * 32
        assert all(r["tokens_per_second"] <= result.tokens_per_second for r in result.train)
        (call,) = result.end["calls"]
        assert call["code"]["source"] and call["torch"] and call["device"]
        text = result.path.read_text(encoding="utf-8")
        assert str(place.data) not in text and str(place.out) not in text
    assert results[0].scores != results[1].scores != results[2].scores


def test_what_is_done_is_not_done_again(one, place):
    assert work_on(one, place).status == "done"
    path = result_path(place.results, one.study, one.name)
    before = path.stat().st_mtime_ns
    metrics = place.run_dir(one) / "metrics.jsonl"
    metrics.unlink()  # nothing of the run folder is needed any more
    assert work_on(one, place).status == "there"
    assert path.stat().st_mtime_ns == before and not metrics.exists()
    assert sorted(os.listdir(path.parent)) == [path.name]


def test_a_time_limit_stops_with_a_checkpoint_and_the_next_call_goes_on(
    one, place, limited, tmp_path
):
    whole = Place(place.data, tmp_path / "whole", tmp_path / "whole-results")
    assert work_on(one, whole).status == "done"
    outcome = work_on(one, limited(3))
    assert outcome.status == "stopped"
    assert not result_path(place.results, one.study, one.name).exists()
    stopped = read_metrics(place.run_dir(one) / "metrics.jsonl")[-1]["step"]
    assert 0 < stopped < 6 and f"step {stopped} of 6" in outcome.text
    assert list((place.run_dir(one) / "checkpoints").iterdir())
    assert work_on(one, place).status == "done"
    results = [read_result(result_path(p.results, one.study, one.name)) for p in (whole, place)]
    assert _losses(results[0]) == _losses(results[1])
    assert results[0].scores == results[1].scores
    assert len(results[1].end["calls"]) == 2


class UntilTrained(Place):
    """A place whose time is up once a run is trained."""

    def left(self):
        return -1.0 if list(self.out.glob("*/*/*/checkpoints/step-00000006")) else 100.0


def test_a_time_limit_ends_a_score_that_takes_longer_than_it_should(one, place, monkeypatch):
    monkeypatch.setattr(engine._Worker, "_estimate", lambda self, tokens: -2.0)
    outcome = work_on(one, UntilTrained(place.data, place.out, place.results))
    assert outcome.status == "stopped" and "scores are missing" in outcome.text
    assert not list(place.run_dir(one).glob("scores/*"))
    assert work_on(one, place).status == "done"


def test_no_time_at_all_leaves_runs_waiting(make_study, place):
    late = Place(place.data, place.out, place.results, deadline=1.0)
    outcomes = run_all(make_study().runs("full"), late, say=lambda text: None)
    assert set(_statuses(outcomes).values()) == {"waiting"}
    assert not place.out.exists()


def test_an_impossible_run_fails_alone(make_study, place):
    study = make_study(
        seeds=[0], variants={"bad": {"mixer.chunk_size": 0}, "odd": {"mixer.nosuch": 1}, "good": {}}
    )
    outcomes = {o.name: o for o in run_all(study.runs("full"), place, say=lambda text: None)}
    assert outcomes["bad-s0"].status == outcomes["odd-s0"].status == "failed"
    assert "mixer.chunk_size=0 must be at least 1" in outcomes["bad-s0"].text
    assert "nosuch" in outcomes["odd-s0"].text
    assert outcomes["good-s0"].status == "done"


def test_a_result_of_another_configuration_is_not_taken(make_study, place):
    assert work_on(make_study().runs("full")[0], place).status == "done"
    changed = make_study(set={"optim.lr": 1e-5}).runs("full")[0]
    outcome = work_on(changed, place)
    assert outcome.status == "failed"
    assert "optim.lr: 0.003 there, 1e-05 here" in outcome.text


def test_a_result_from_before_ssm_init_is_of_what_was_done_then(make_study, place):
    """Its file does not name the field, whose default is another now."""
    variants = {"then": {"mixer.ssm_init": 1.0}}
    (run,) = make_study("old", seeds=[0], variants=variants).runs("full")
    assert work_on(run, place).status == "done"
    path = result_path(place.results, "old", "then-s0")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"ssm_init": 1.0, ', ""), encoding="utf-8")
    assert "ssm_init" not in path.read_text(encoding="utf-8") and "ssm_init" in text
    now = make_study("new", seeds=[0], variants={**variants, "now": {}}).runs("full")
    outcomes = {o.name: o for o in run_all(now, place, say=lambda text: None)}
    assert outcomes["then-s0"].text == "as old/then-s0"
    assert outcomes["now-s0"].status == "done"


def test_what_another_study_has_run_is_not_run_again(make_study, place):
    first = make_study(seeds=[0])
    run_all(first.runs("full"), place, say=lambda text: None)
    variants = {"same": first.variants["chunks"], "new": {"optim.lr": 1e-4}}
    outcomes = {
        o.name: o
        for o in run_all(
            make_study("other", seeds=[0], variants=variants).runs("full"),
            place,
            say=lambda text: None,
        )
    }
    assert outcomes["same-s0"].status == "there"
    assert outcomes["same-s0"].text == "as little/chunks-s0"
    assert outcomes["new-s0"].status == "done"
    assert [r.path.stem for r in results_of(place.results / "other")] == ["new-s0"]
    more = {**first.scores, "other": {"kind": "text", "data": "wikitext2", "max_tokens": 100}}
    (run,) = make_study("more", seeds=[0], variants={"same": variants["same"]}, scores=more).runs(
        "full"
    )
    assert work_on(run, place).status == "done"  # the other has not all of its scores


def test_results_on_other_texts_are_not_taken(make_study, place, tmp_path):
    first = make_study(seeds=[0]).runs("full")[0]
    assert work_on(first, place).status == "done"
    others = tmp_path / "others"
    shutil.copytree(place.data, others)
    (others / "more.txt").write_text("other words " * 300, encoding="utf-8")
    shutil.rmtree(others / "train")
    prepare(others / "more.txt", others / "train", load_tokenizer("bytes"))
    there = Place(others, tmp_path / "other-runs", place.results)
    outcome = work_on(first, there)
    assert outcome.status == "failed"
    assert "was trained, validated or scored on other texts" in outcome.text
    (same,) = make_study("other", seeds=[0], variants={"chunks": {"mixer.chunk_size": 4}}).runs(
        "full"
    )
    assert work_on(same, there).status == "done"


def test_scores_on_another_text_are_not_taken(make_study, place, tmp_path):
    """Nor is what the run's folder has of them."""
    scores = {"wiki": {"kind": "text", "data": "wikitext2", "max_tokens": 100}}
    first, second = make_study(seeds=[0], scores=scores).runs("full")
    assert work_on(first, place).status == "done"
    path = result_path(place.results, first.study, first.name)
    before = read_result(path)
    (tmp_path / "more.txt").write_text("other words " * 300, encoding="utf-8")
    shutil.rmtree(place.data / "wikitext2")
    prepare(tmp_path / "more.txt", place.data / "wikitext2", load_tokenizer("bytes"))
    outcome = work_on(first, place)
    assert outcome.status == "failed"
    assert "was trained, validated or scored on other texts" in outcome.text
    assert work_on(second, place).status == "done"
    second = read_result(result_path(place.results, second.study, second.name))
    assert second.texts["wiki"] != before.texts["wiki"]
    study = make_study(seeds=[0], scores=scores)
    with pytest.raises(ConfigError, match="have wiki on different texts"):
        tell(study, Shelf(place.results), tmp_path, "full")
    path.unlink()
    assert work_on(first, place).status == "done"
    assert read_result(path).texts == second.texts
    assert read_result(path).scores != before.scores


def test_a_result_of_another_recipe_is_not_listed_nor_reported(make_study, place, tmp_path):
    run = make_study(seeds=[0]).runs("full")[0]
    assert work_on(run, place).status == "done"
    more = {**run.scores, "other": {"kind": "text", "data": "wikitext2", "max_tokens": 100}}
    for changes, why in (({"set": {"optim.lr": 1e-5}}, "of another configuration"),
                         ({"scores": more}, "without other")):  # fmt: skip
        study = make_study(seeds=[0], **changes)
        told = list(run_lines(study, study.runs("full"), place.results))
        assert why in "".join(told) and "done" not in "".join(told)
        rows = tell(study, Shelf(place.results), tmp_path, "full").rows
        assert not any(row.results for row in rows)


def test_a_new_score_of_a_model_that_is_gone_is_refused(make_study, place):
    run = make_study().runs("full")[0]
    work_on(run, place)
    path = result_path(place.results, run.study, run.name)
    before = path.read_bytes()
    shutil.rmtree(place.run_dir(run))
    scores = {**run.scores, "other": {"kind": "text", "data": "wikitext2", "max_tokens": 100}}
    outcome = work_on(make_study(scores=scores).runs("full")[0], place)
    assert outcome.status == "failed" and "has no score other, and there is no chec" in outcome.text
    assert path.read_bytes() == before


def test_a_damaged_result_of_another_study_is_no_obstacle(make_study, place):
    (place.results / "broken").mkdir(parents=True)
    (place.results / "broken" / "a-s0.jsonl").write_text("{")
    assert work_on(make_study().runs("full")[0], place).status == "done"


def test_a_new_score_needs_no_new_training(make_study, place):
    run = make_study().runs("full")[0]
    work_on(run, place)
    scores = {**run.scores, "other": {"kind": "text", "data": "wikitext2", "max_tokens": 100}}
    more = make_study(scores=scores).runs("full")[0]
    before = (place.run_dir(run) / "metrics.jsonl").read_bytes()
    assert work_on(more, place).status == "done"
    assert (place.run_dir(run) / "metrics.jsonl").read_bytes() == before
    result = read_result(result_path(place.results, run.study, run.name))
    assert result.scores["other"]["n_tokens"] == 100


def test_a_diverged_run_is_a_result(make_study, place):
    changes = {"optim.lr": 1e30, "optim.warmup_steps": 0, "optim.grad_clip": 0}
    run = make_study(set=changes).runs("full")[0]
    outcome = work_on(run, place)
    assert outcome.status == "done" and "diverged at step" in outcome.text
    result = read_result(result_path(place.results, run.study, run.name))
    assert result.end["diverged"].startswith("step ")
    assert result.scores == {}
    assert work_on(run, place).status == "there"


@pytest.mark.parametrize("gone", [False, True])
def test_weights_that_were_exchanged_make_another_run(make_study, place, one, gone):
    """Of the same configuration: train.init_from says where they are."""
    assert work_on(one, place).status == "done"
    given = place.out / "given"
    shutil.copytree(place.run_dir(one), given)
    init = {"set": {"train.init_from": str(given)}, "seeds": [0], "variants": {"chunks": {}}}
    (run,) = make_study(name="begun", **init).runs("full")
    assert work_on(run, place).status == "done"
    assert work_on(run, place).status == "there"
    twin = make_study(name="twin", **init).runs("full")[0]
    assert Shelf(place.results).find(twin) is None
    shutil.rmtree(given)
    if not gone:
        other = make_study().runs("full")[2]  # the other seed
        assert work_on(other, place).status == "done"
        shutil.copytree(place.run_dir(other), given)
    outcome = work_on(run, place)
    assert outcome.status == ("there" if gone else "failed")
    assert gone or f"other weights than are in {given} now; delete it" in outcome.text


def test_a_signal_before_the_first_step_says_so(one, place, monkeypatch):
    def leave(config, **_):
        raise TrainingPreempted("left")

    monkeypatch.setattr(engine, "train", leave)
    late = replace(place, deadline=time.time() + 0.2, reserve=0.1)
    place.run_dir(one).mkdir(parents=True)
    monkeypatch.setattr(engine._Worker, "_clear", lambda self: time.sleep(0.3))
    outcome = work_on(one, late)
    assert outcome.status == "stopped" and outcome.text == "at step 0 of 6"


def test_sigterm_while_a_score_is_measured_leaves_it_to_the_next_call(one, place, monkeypatch):
    monkeypatch.setattr(TextScore, "measure", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingPreempted, match="SIGTERM while no step was under way"):
        work_on(one, place)
    monkeypatch.undo()
    assert work_on(one, place).status == "done"


def test_figures_that_are_no_numbers_are_no_score(one, place, monkeypatch):
    monkeypatch.setattr(TextScore, "measure", lambda *_: {"perplexity": float("nan")})
    outcome = work_on(one, place)
    assert outcome.status == "failed" and "scores.books of the model in" in outcome.text
    monkeypatch.undo()
    assert work_on(one, place).status == "done"


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto would be a GPU")
def test_a_recipe_with_cuda_graphs_runs_without_a_gpu_as_the_same_run(make_study, place):
    study = make_study(seeds=[0], set={"train.cuda_graphs": True, "train.device": "auto"})
    outcomes = run_all(study.runs("full"), place, say=lambda text: None)
    assert _statuses(outcomes) == {"chunks-s0": "done", "full-s0": "done"}
    done = saved_config(read_result(result_path(place.results, "little", "full-s0")))
    assert not done.train.cuda_graphs
    on_a_gpu = replace(done, train=replace(done.train, cuda_graphs=True, device="cuda"))
    assert differences(done, on_a_gpu) == []


def test_missing_texts_are_named(make_study, tmp_path):
    nowhere = Place(tmp_path / "none", tmp_path / "runs", tmp_path / "results")
    outcome = work_on(make_study().runs("full")[0], nowhere)
    assert outcome.status == "failed" and "attamba study prepare" in outcome.text


def test_the_command(make_study, texts, tmp_path, capsys):
    make_study()
    folders = ["--recipes", str(tmp_path / "recipes"), "--results", str(tmp_path / "results")]
    where = [*folders, "--data", str(texts), "--out", str(tmp_path / "runs")]
    assert main(["study", "run", "little", *where, "--only", "chunks-s0"]) == 0
    assert "little at full scale: 1 of 1 runs are done (1 now)" in capsys.readouterr().out
    make_study("more", variants={"chunks": {"mixer.chunk_size": 2}})
    assert main(["study", "run", "little", "more", *where, "--only", "chunks-s0"]) == 0
    said = capsys.readouterr().out
    assert "little/chunks-s0: there\nmore/chunks-s0: done\n" in said
    assert "little, more at full scale: 2 of 2 runs are done (1 now)" in said
    assert main(["study", "run", "more", "little", *where, "--only", "full-s1"]) == 0
    assert "more, little at full scale: 1 of 1 runs are done (1 now)" in capsys.readouterr().out
    (tmp_path / "recipes" / "more.json").unlink()
    assert main(["study", "list", *folders]) == 0
    assert "little     4     2    main  Does it run?" in capsys.readouterr().out
    assert main(["study", "list", "little", *folders, "--json", str(tmp_path / "copy.json")]) == 0
    assert json.loads((tmp_path / "copy.json").read_text())["name"] == "little"
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("done") for line in lines) == 2
    assert sum(line.endswith("missing") for line in lines) == 2
    assert main(["study", "run", "little", *where, "--jobs", "0"]) == 2


def test_thinning_keeps_means_and_the_last_step():
    fixed = {"kind": "train", "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 100.0}
    records = [
        {**fixed, "step": i, "tokens": 10 * i, "loss": float(i), "seconds": i / 10}
        for i in range(1, 251)
    ]
    thin = thinned(records, most=100)
    assert len(thin) <= 100 and thin[-1]["step"] == 250
    assert thin[0]["loss"] == 2.0 and thin[0]["tokens_per_second"] == 100.0
    assert thinned([]) == []
