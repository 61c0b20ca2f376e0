"""Training until told to stop, and training on generated tasks."""

import os
import signal

import pytest
import torch

import attamba
from attamba.cli import main
from attamba.config import ConfigError, RunConfig, from_dict
from attamba.train import TrainingInterrupted, TrainingPreempted, train
from attamba.train.progress import Lines

TASK = {"type": "recall", "pairs": 3, "n_keys": 6, "n_values": 6}


@pytest.fixture
def make_task_config(tmp_path):
    """make(steps=..., out=...) -> RunConfig of a tiny run on a recall task."""

    def make(out="task", task=TASK, **model):
        tree = {
            "out": str(tmp_path / out),
            "model": {
                "dim": 32,
                "n_layers": 2,
                "mixer": {"type": "transformer", "n_heads": 2},
                **model,
            },
            "data": {"generate": task, "seq_len": 16, "batch_size": 32},
            "optim": {"lr": 1e-2, "warmup_steps": 5},
            "train": {"steps": 30, "device": "cpu", "log_every": 1, "eval_every": 10},
        }
        tree["train"]["progress"] = False
        return from_dict(RunConfig, tree)

    return make


def test_told_to_stop_it_saves_and_goes_on(make_config):
    whole = train(make_config(out="whole"))
    config, asked = make_config(), []
    with pytest.raises(TrainingInterrupted, match="Stopped after step 5 of 12"):
        train(config, should_stop=lambda: asked.append(1) or len(asked) == 5)
    result = train(config)
    assert [r.get("loss") for r in result.metrics] == [r.get("loss") for r in whole.metrics]


def test_a_signal_while_should_stop_is_asked_is_not_lost(make_config):
    def should_stop():
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    with pytest.raises(TrainingPreempted, match="Stopped after step 1 of 12"):
        train(make_config(), should_stop=should_stop)


def test_told_to_stop_at_the_end_it_is_done(make_config):
    asked = []
    result = train(make_config(), should_stop=lambda: asked.append(1) or len(asked) == 12)
    assert result.step == 12


def test_a_task_trains_resumes_and_can_be_loaded(make_task_config, capsys):
    whole = train(make_task_config("whole"))
    config, asked = make_task_config(), []
    with pytest.raises(TrainingInterrupted):
        train(config, should_stop=lambda: asked.append(1) or len(asked) == 15)
    result = train(config)
    losses = [[r["loss"] for r in run.metrics if r["kind"] == "train"] for run in (whole, result)]
    assert losses[0] == losses[1] and len(losses[0]) == 30
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert main(["eval", config.out, "--device", "cpu"]) == 2
    assert "rows of its own making (data.generate)" in capsys.readouterr().err
    model, tokenizer = attamba.load(config.out)
    assert tokenizer.kind == "bytes" and model.config == config.model
    assert [r["valid_bits_per_byte"] for r in result.metrics if r["kind"] == "valid"] == [None] * 3


def test_the_loss_is_a_mean_over_answers(make_task_config):
    """At the start, that of a guess over the vocabulary, however few tokens are scored."""
    result = train(make_task_config())
    torch.manual_seed(0)
    first = next(r["loss"] for r in result.metrics if r["kind"] == "train")
    assert 4.5 < first < 8  # ln 256 = 5.5, and what a random head adds


def test_another_task_cannot_go_on(make_task_config):
    train(make_task_config())
    with pytest.raises(ConfigError, match=r"data\.generate"):
        train(make_task_config(task={**TASK, "pairs": 2}))


def test_a_small_vocabulary_is_named(make_task_config):
    with pytest.raises(ConfigError, match=r"set model\.vocab_size=13 or more"):
        train(make_task_config(vocab_size=12))


def test_text_beside_a_task_is_an_error(make_task_config):
    config = make_task_config()
    config.data.train = "book.txt"
    with pytest.raises(ConfigError, match=r"data\.train, data\.valid and data\.sources would have"):
        train(config)


def test_a_validation_without_bytes_can_be_shown(capsys):
    Lines().record({"kind": "valid", "step": 1, "valid_loss": 1.5, "valid_bits_per_byte": None})
    assert capsys.readouterr().out.strip().endswith("validation: 1.5000 nats/token")
