"""Evaluation beside training: of checkpoints, by another process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from attamba.config import ConfigError
from attamba.data import DataError, load_tokenizer, prepare
from attamba.train import TrainingInterrupted, list_checkpoints, read_metrics, train
from attamba.train import follow as follow_module
from attamba.train.follow import due, follow
from attamba.train.storage import remove_old

WIKI = " = Fish = \n \n A fish swims . \n = = Fins = = \n It has fins . \n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(follow_module, "POLL", 0.02)


def results(config):
    return read_metrics(f"{config.out}/eval.jsonl")


def of(records, kind):
    return {r["step"]: r for r in records if r["kind"] == kind}


def test_a_checkpoint_gets_the_scores_that_training_gives_it(make_config, tmp_path):
    (tmp_path / "wiki.txt").write_text(WIKI)
    tasks = {"eval.tasks": [f"wikitext2_local={tmp_path}/wiki.txt"], "eval.every": 8}
    wanted = train(make_config({**tasks, "train.keep": 9}, out="inline")).metrics
    config = make_config({**tasks, "train.keep": 9, "eval.mode": "job"})
    plain = train(config)
    assert {r["kind"] for r in plain.metrics} == {"train"}
    assert follow(config.out, device="cpu", say=lambda text: None) == 0
    found = results(config)
    for kind, steps in (("valid", [4, 8, 12]), ("tasks", [8, 12])):
        assert list(of(found, kind)) == steps
        for step, record in of(found, kind).items():
            record = dict(record)
            assert record.pop("checkpoint") == f"step-{step:08d}"
            want = of(wanted, kind)[step]
            record.pop("seconds")
            assert record.pop("kind") == want["kind"]
            assert len(record) == len(want) - 2
            assert record == pytest.approx({key: want[key] for key in record}, rel=1e-5)
    assert follow(config.out, device="cpu") == 0  # nothing is scored twice
    assert len(results(config)) == 5


def test_due_checkpoints_are_those_after_which_enough_steps_have_passed(make_config):
    config = make_config({"train.eval_every": 5, "eval.tasks": ["piqa"], "train.steps": 20})
    assert due(4, config, []) == []
    assert due(8, config, []) == ["valid"]
    done = [{"kind": "valid", "step": 8}]
    assert due(8, config, done) == due(9, config, done) == []
    assert due(12, config, done) == ["valid"]
    assert due(20, config, done) == ["valid", "tasks"]  # the last, though eval.every is 0
    assert due(20, config, [{"kind": "failed", "step": 20, "kinds": ["valid"]}]) == ["tasks"]
    config.data.valid_fraction = 0
    assert due(20, config, []) == ["tasks"]


def test_it_follows_while_training_goes_on_and_ends_with_it(make_config):
    config = make_config({"train.keep": 1, "eval.mode": "job", "train.log_every": 4})
    os.makedirs(config.out)
    ended = []
    watcher = threading.Thread(
        target=lambda: ended.append(follow(config.out, device="cpu", say=lambda text: None))
    )
    watcher.start()

    def wait_for_the_result(record):
        # Training is held up here, so that its next checkpoint cannot delete this one.
        before, limit = record["step"] - 4, time.monotonic() + 30
        while before and time.monotonic() < limit:
            path = f"{config.out}/eval.jsonl"
            if os.path.exists(path) and before in of(read_metrics(path), "valid"):
                return
            time.sleep(0.01)

    train(config, on_log=wait_for_the_result)
    watcher.join(30)
    assert ended == [0]
    assert list(of(results(config), "valid")) == [4, 8, 12]
    assert len(list_checkpoints(config.out)) == 1


def test_a_failure_is_told_and_the_next_checkpoint_is_scored(make_config):
    config = make_config({"train.keep": 9, "eval.mode": "job"})
    train(config)
    weights = list_checkpoints(config.out)[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said = []
    assert follow(config.out, device="cpu", say=said.append) == 1
    assert list(of(results(config), "valid")) == [4, 12]
    failed = of(results(config), "failed")[8]
    assert failed["error"].startswith("CheckpointError: ") and "truncated" in failed["error"]
    assert said[1].startswith("step-00000008 could not be scored: CheckpointError: ")
    assert not (list_checkpoints(config.out)[0].parent.parent / ".follow").exists()


def test_a_checkpoint_that_training_deletes_just_then_is_passed_over(make_config, monkeypatch):
    config = make_config({"train.keep": 9, "eval.mode": "job"})
    run_dir = train(config).run_dir

    def due_and_gone(step, config, done):
        if step == 4:
            remove_old(run_dir, keep=2)
        return due(step, config, done)

    monkeypatch.setattr(follow_module, "due", due_and_gone)
    assert follow(config.out, device="cpu", say=lambda text: None) == 0
    assert [record["step"] for record in results(config)] == [8, 12]


def test_a_run_that_was_refused_leaves_what_follows_it_as_it_was(make_config, texts, tmp_path):
    asked = []
    change = {"train.keep": 9, "eval.mode": "job"}
    config = make_config(change)
    with pytest.raises(TrainingInterrupted):
        train(config, should_stop=lambda: asked.append(1) or len(asked) == 5)
    others = tmp_path / "others"
    prepare(texts / "0.txt", others, load_tokenizer("bytes"))
    kept = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"data\.train: the tokens are not those"):
        train(make_config({**change, "data.train": str(others)}))
    assert (tmp_path / "run" / "config.json").read_bytes() == kept


def test_a_run_that_stopped_is_waited_for_until_idle(make_config):
    config = make_config({"eval.mode": "job"})
    with pytest.raises(TrainingInterrupted):
        train(config, should_stop=lambda: True)
    with open(f"{config.out}/status.json") as file:
        assert json.load(file) == {"state": "stopped"}
    assert follow(config.out, device="cpu", idle=0.2, say=lambda text: None) == 0
    assert not os.path.exists(f"{config.out}/eval.jsonl")  # step 1 is not due


def test_a_second_follower_and_a_missing_folder_are_refused(make_config, tmp_path):
    with pytest.raises(ConfigError, match="is not a folder; give the folder of a run"):
        follow(tmp_path / "none")
    with (
        follow_module._alone(tmp_path, wait=False),
        pytest.raises(ConfigError, match="another process scores its checkpoints already"),
    ):
        follow(tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="--batch-size=0 must be at least 1"):
        follow(tmp_path, device="cpu", batch_size=0)


def test_mode_process_scores_beside_training_and_draws_the_results(make_config, capfd):
    change = {"eval.mode": "process", "train.tensorboard": True, "train.progress": True}
    config = make_config({**change, "train.keep": 9})
    result = train(config)
    assert {r["kind"] for r in result.metrics} == {"train"}
    assert list(of(results(config), "valid")) == [4, 8, 12]  # the last ones were waited for
    told = capfd.readouterr().out
    assert all(f"step {step}/12  validation: " in told for step in (4, 8, 12))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{config.out}/tensorboard").Reload()
    assert [e.step for e in events.Scalars("valid/valid_loss")] == [4, 8, 12]


def test_mode_process_says_when_the_other_process_fails(make_config, capfd):
    change = {"eval.mode": "process", "eval.device": "cuda:77", "train.progress": True}
    config = make_config({**change, "train.steps": 1})
    assert train(config).step == 1
    told = capfd.readouterr().out
    assert "Evaluation beside training has ended with status 2" in told
    assert "--device='cuda:77': torch sees" in told
    assert f"attamba follow {config.out}" in told


def test_the_other_process_leaves_when_training_is_killed(make_config):
    config = make_config({"eval.mode": "job"})
    os.makedirs(config.out)
    command = [sys.executable, "-m", "attamba", "follow", config.out, "--device", "cpu"]
    child = subprocess.Popen([*command, "--until-eof"], stdin=subprocess.PIPE)
    try:
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(60) == 0
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)


def test_results_of_checkpoints_that_are_written_anew_are_cut(make_config):
    config = make_config({"eval.mode": "job", "train.keep": 1})
    with pytest.raises(TrainingInterrupted):
        asked = []
        train(config, should_stop=lambda: asked.append(1) or len(asked) == 4)
    with open(f"{config.out}/eval.jsonl", "w") as file:
        for step in (4, 8):
            file.write(json.dumps({"kind": "valid", "step": step}) + "\n")
    train(config)
    assert list(of(results(config), "valid")) == [4]


@pytest.mark.parametrize("whole", ["", '{"kind": "valid", "step": 4}\n'])
def test_a_result_that_a_kill_cut_short_is_scored_again(make_config, whole):
    config = make_config({"eval.mode": "job", "train.keep": 9})
    train(config)
    with open(f"{config.out}/eval.jsonl", "w") as file:
        file.write(whole + '{"kind": "valid", "st')
    assert follow(config.out, device="cpu", say=lambda text: None) == 0
    assert list(of(results(config), "valid")) == [4, 8, 12]
    train(config)  # reads the file, and leaves it as it is
    assert list(of(results(config), "valid")) == [4, 8, 12]


def test_a_device_without_a_process_to_use_it_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"eval\.device='cuda:1' is that of eval\.mode=process"):
        train(make_config({"eval.device": "cuda:1"}))


def test_what_tasks_lack_shows_before_training(make_config):
    config = make_config({"eval.mode": "process", "eval.tasks": ["wikitext2_local"]})
    with pytest.raises(DataError, match="no path was given; say wikitext2_local=PATH"):
        train(config)
