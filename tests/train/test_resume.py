import fcntl
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attamba.config import ConfigError
from attamba.data import load_tokenizer, prepare, train_bpe
from attamba.models import build_model
from attamba.train import (
    CheckpointError,
    TrainingInterrupted,
    list_checkpoints,
    load,
    read_metrics,
    save_checkpoint,
    train,
)
from attamba.train.interrupt import StopRequest

JITTER = {"model.mixer.boundary": "jitter"}
TRANSFORMER = {"model.mixer": {"type": "transformer", "n_heads": 2}, "train.accumulate": 2}
TIED = {"model.tie_embeddings": True, "train.dtype": "bfloat16"}


def curve(metrics):
    keys = ("kind", "step", "tokens", "loss", "lr", "grad_norm", "valid_loss")
    return [{key: r[key] for key in keys if key in r} for r in metrics]


def assert_same_end(one, other):
    assert curve(one.metrics) == curve(other.metrics)
    a, b = (dict(load(r.run_dir)[0].named_parameters()) for r in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("change", [JITTER, TRANSFORMER, TIED], ids=["jitter", "plain", "tied"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(make_config, crash_at, change):
    change = change | {"model.n_layers": 2, "train.steps": 20, "train.save_every": 5}
    straight = train(make_config(change, out="straight"))
    config = make_config(change, out="resumed")
    with pytest.raises(crash_at.error):
        train(config, on_log=crash_at(13))
    assert [c.name[-2:] for c in list_checkpoints(config.out)] == ["05", "10"]
    torch.manual_seed(99)  # what the new process's random state was must not matter
    resumed = train(config)
    assert_same_end(straight, resumed)
    steps = [r["step"] for r in resumed.metrics if r["kind"] == "train"]
    assert steps == list(range(1, 21))  # those after step 10 were cut and written anew
    assert resumed.metrics == read_metrics(resumed.run_dir / "metrics.jsonl")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(make_config, number):
    straight = train(make_config(out="straight"))
    config = make_config()
    handler = signal.getsignal(number)

    def interrupt(record):
        if record["step"] == 6:
            os.kill(os.getpid(), number)

    with pytest.raises(TrainingInterrupted, match=r"Stopped after step 6 of 12 and saved .* same"):
        train(config, on_log=interrupt)
    assert signal.getsignal(number) is handler
    assert list_checkpoints(config.out)[-1].name == "step-00000006"
    assert_same_end(straight, train(config))


def test_a_second_signal_acts_at_once():
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_training_outside_the_main_thread_leaves_signals_alone(make_config):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(make_config({"train.steps": 1})).step)
    )
    thread.start()
    thread.join()
    assert results == [1]


def test_a_finished_run_is_returned_as_it_is(make_config):
    first = train(make_config())
    before = list_checkpoints(first.run_dir)
    again = train(make_config())
    assert again == first
    assert list_checkpoints(first.run_dir) == before


def test_a_run_without_a_checkpoint_starts_afresh(make_config, crash_at):
    with pytest.raises(crash_at.error):
        train(make_config(), on_log=crash_at(3))
    changed = make_config({"optim.lr": 1e-3})
    result = train(changed)
    assert [r["step"] for r in result.metrics if r["kind"] == "train"] == list(range(1, 13))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model.dim": 64}, r"  model\.dim: 32 there, 64 here"),
        ({"model.mixer": {"type": "transformer"}}, r"model\.mixer\.type: 'attamba' there, 'trans"),
        ({"mixer.chunk_size": 8}, r"  model\.mixer\.chunk_size: 4 there, 8 here"),
        ({"mixer.boundary": {"type": "random"}}, r"model\.mixer\.boundary\.type: None there"),
        ({"train.seed": 7}, r"  train\.seed: 0 there, 7 here"),
        ({"data.batch_size": 8}, r"  data\.batch_size: 4 there, 8 here"),
        ({"optim.lr": 1e-3}, r"  optim\.lr: 0\.003 there, 0\.001 here"),
        ({"train.steps": 24}, r"  train\.steps: 1 there, 24 here"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_another_configuration_is_refused_naming_every_difference(make_config, change, line):
    config = make_config({"train.steps": 1})
    train(config)
    before = sorted(os.listdir(config.out))
    with pytest.raises(ConfigError, match=line) as caught:
        train(make_config({"train.steps": 1} | change))
    text = str(caught.value)
    assert "set another out, or delete" in text
    assert config.out in text
    assert sorted(os.listdir(config.out)) == before


def test_what_changes_no_weight_may_change_on_resume(make_config, crash_at):
    straight = train(make_config(out="straight"))
    with pytest.raises(crash_at.error):
        train(make_config(), on_log=crash_at(6))
    free = {
        "train.log_every": 2,
        "train.eval_every": 6,
        "train.save_every": 3,
        "train.keep": 3,
        "train.progress": True,
        "train.device": "auto" if not torch.cuda.is_available() else "cpu",
    }
    resumed = train(make_config(free))
    assert [c.name[-2:] for c in list_checkpoints(resumed.run_dir)] == ["06", "09", "12"]
    assert [r["step"] for r in resumed.metrics if r["kind"] == "valid"] == [4, 6, 12]
    assert resumed.metrics[-1]["valid_loss"] == straight.metrics[-1]["valid_loss"]


def test_resume_can_be_refused(make_config):
    train(make_config({"train.steps": 1}))
    with pytest.raises(ConfigError, match="already holds a run and resume is off; set another out"):
        train(make_config({"train.steps": 1}), resume=False)


def test_other_tokens_behind_the_same_path_are_refused(make_config, texts, write_text, tmp_path):
    data = tmp_path / "data"
    prepare(texts, data, load_tokenizer("bytes"))
    config = make_config({"data.train": str(data), "train.steps": 1})
    train(config)
    write_text(tmp_path / "other.txt", seed=5)
    prepare(tmp_path / "other.txt", data, load_tokenizer("bytes"))
    with pytest.raises(ConfigError, match=r"data\.train: the tokens are not those that the run in"):
        train(config)


def test_data_of_another_tokenizer_is_refused(make_config, texts, tmp_path):
    data = tmp_path / "data"
    prepare(texts, data, load_tokenizer("bytes"))
    config = make_config({"data.train": str(data), "model.vocab_size": 512, "train.steps": 1})
    train(config)
    prepare(texts, data, train_bpe(texts, 300, tmp_path / "bpe"))
    with pytest.raises(ConfigError, match="tokenizer and checkpoint do not match: the data was"):
        train(config)


def test_a_prepared_folder_may_move(make_config, crash_at, prepared, tmp_path):
    with pytest.raises(crash_at.error):
        train(make_config(), on_log=crash_at(6))
    moved = shutil.copytree(prepared, tmp_path / "moved")
    assert train(make_config({"data.train": str(moved)})).step == 12


def test_text_prepared_on_the_fly_is_reused_on_resume(
    make_config, crash_at, texts, write_text, tmp_path
):
    text = shutil.copytree(texts, tmp_path / "text")
    change = {"data.train": str(text)}
    straight = train(make_config(change, out="straight"))
    with pytest.raises(crash_at.error):
        train(make_config(change), on_log=crash_at(6))
    write_text(text / "0.txt", seed=9)
    assert_same_end(straight, train(make_config(change)))
    # Without a checkpoint to go on from, changed text is read anew.
    shutil.rmtree(straight.run_dir / "checkpoints")
    assert curve(train(make_config(change, out="straight")).metrics) != curve(straight.metrics)


def test_leftovers_of_a_killed_run_are_removed(make_config):
    config = make_config({"train.steps": 1})
    result = train(config)
    leftovers = [
        result.run_dir / "checkpoints" / ".tmp-step-00000002",
        result.run_dir / "data" / ".train.123.old",
    ]
    for folder in leftovers:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    train(config)
    assert not any(folder.exists() for folder in leftovers)


def test_half_written_files_are_removed(make_config):
    config = make_config({"train.steps": 1})
    os.makedirs(config.out)
    mine = [".notes.jsonl.gz", ".settings.json.bak", "data/.mine.old/notes"]
    for name in (".config.json.123", ".metrics.jsonl.123", *mine):
        (Path(config.out) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(config.out) / name).write_text("{")
    train(config)
    assert sorted(path.name for path in Path(config.out).glob(".*")) == [".lock", *mine[:2]]
    assert (Path(config.out) / mine[2]).exists()


def test_a_file_in_the_place_of_out(make_config, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"out=.* a file that is no folder; set another out"):
            train(replace(make_config(), out=str(out)))


def test_two_processes_cannot_train_in_one_folder(make_config):
    config = make_config({"train.steps": 1})
    os.makedirs(config.out)
    with open(f"{config.out}/.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is training in this folder"):
            train(config)
    assert train(config).step == 1


def test_of_a_damaged_newest_checkpoint_the_one_before_is_used(make_config, crash_at, capsys):
    straight = train(make_config(out="straight"))
    config = make_config({"train.progress": True})
    with pytest.raises(crash_at.error):
        train(config, on_log=crash_at(10))
    older, newest = list_checkpoints(config.out)
    (newest / "optimizer.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert_same_end(straight, train(config))
    said = capsys.readouterr().out
    assert "optimizer.safetensors is truncated: 0 bytes of" in said
    assert f"the run goes on from {older.name}" in said
    assert (newest.parent / f"damaged-{newest.name}").is_dir()


def test_where_no_checkpoint_is_whole_none_is_touched(make_config, crash_at):
    config = make_config()
    with pytest.raises(crash_at.error):
        train(config, on_log=crash_at(10))
    checkpoints = list_checkpoints(config.out)
    for checkpoint in checkpoints:
        (checkpoint / "model.safetensors").write_bytes(b"")
    text = r"step-00000008/model\.safetensors is truncated: 0 bytes of \d+; .* step-00000004"
    with pytest.raises(CheckpointError, match=text):
        train(config)
    assert list_checkpoints(config.out) == checkpoints


def test_a_checkpoint_without_optimizer_cannot_be_resumed(make_config):
    config = make_config()
    save_checkpoint(
        config.out,
        step=3,
        model=build_model(config.model),
        config=config,
        tokenizer=load_tokenizer("bytes"),
    )
    with pytest.raises(CheckpointError, match=r"was saved without optimizer\.safetensors"):
        train(config)
