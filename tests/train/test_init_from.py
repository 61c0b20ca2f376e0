"""Runs that begin with the weights of another: train.init_from."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import Failed, on_ranks

from attamba.config import ConfigError
from attamba.data import train_bpe
from attamba.train import CheckpointError, list_checkpoints, load, train
from attamba.train.loop import open_loop

JITTER = {"model.mixer.boundary": "jitter"}


def weights_of(path):
    return {name: p.detach() for name, p in load(path)[0].named_parameters()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def before_the_first_step(config):
    """Weights, whole, and how far the run and its optimizer are."""
    with open_loop(config) as loop:
        run = loop.run
        weights = {
            name: getattr(p, "full_tensor", p.clone)().detach()
            for name, p in run.model.named_parameters()
        }
        return weights, run.step, run.tokens, len(run.optimizer.state)


@pytest.fixture(scope="module")
def first(config_in, tmp_path_factory):
    """A run of 12 steps with checkpoints after 8 and 12."""
    config = config_in(tmp_path_factory.mktemp("first"), {"train.steps": 12})
    train(config)
    return config


def test_weights_are_the_other_runs_and_all_else_begins_anew(make_config, first):
    longer = {"data.seq_len": 128, "model.mixer.chunk_size": 8, "train.seed": 7}
    config = make_config(longer | {"train.init_from": first.out})
    weights, *rest = before_the_first_step(config)
    assert_same_weights(weights, weights_of(first.out))
    assert rest == [0, 0, 0]
    trained = train(config)
    assert [r["step"] for r in trained.metrics if r["kind"] == "train"] == list(range(1, 13))


def test_a_checkpoint_can_be_named(make_config, first):
    early, last = list_checkpoints(first.out)
    weights, *_ = before_the_first_step(make_config({"train.init_from": str(early)}))
    assert_same_weights(weights, weights_of(early))
    assert any(not torch.equal(w, weights[name]) for name, w in weights_of(last).items())


def test_it_stops_and_goes_on_without_the_other_run(make_config, first, crash_at, tmp_path):
    """Which is not looked at again: the weights are this run's own."""
    given = shutil.copytree(first.out, tmp_path / "given")
    change = JITTER | {"train.init_from": str(given)}
    straight = train(make_config(change, out="straight"))
    config = make_config(change, out="stopped")
    with pytest.raises(crash_at.error):
        train(config, on_log=crash_at(6))
    shutil.rmtree(given)
    resumed = train(config)
    assert_same_weights(weights_of(resumed.run_dir), weights_of(straight.run_dir))


def test_on_resume_it_may_have_moved_but_not_changed(make_config, first, crash_at, tmp_path):
    given = shutil.copytree(first.out, tmp_path / "given")
    config = make_config(JITTER | {"train.init_from": str(given)}, out="stopped")
    with pytest.raises(crash_at.error):
        train(config, on_log=crash_at(6))
    early, last = list_checkpoints(first.out)
    with pytest.raises(ConfigError, match=r"train\.init_from: '.*given' there, '.*08' here"):
        train(make_config(JITTER | {"train.init_from": str(early)}, out="stopped"))
    with pytest.raises(ConfigError, match=r"train\.init_from: '.*given' there, None here"):
        train(make_config(JITTER, out="stopped"))
    moved = make_config(JITTER | {"train.init_from": str(last)}, out="stopped")
    assert train(moved).step == 12


@pytest.mark.parametrize("n, mesh", [(2, {"shard": 2}), (4, {"tensor": 2, "context": 2})])
def test_on_several_ranks(make_config, first, n, mesh):
    change = {"train.init_from": first.out} | {f"parallel.{k}": v for k, v in mesh.items()}
    for weights, *rest in on_ranks(n, before_the_first_step, make_config(change)):
        assert_same_weights(weights, weights_of(first.out))
        assert rest == [0, 0, 0]


def test_from_the_shards_of_several(make_config, first):
    config = make_config({"train.steps": 2, "parallel.shard": 2}, out="shards")
    on_ranks(2, train, config)
    assert (list_checkpoints(config.out)[-1] / "shards").is_dir()
    weights, *_ = before_the_first_step(make_config({"train.init_from": config.out}, out="one"))
    assert_same_weights(weights, weights_of(config.out))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model.dim": 64}, r"embed\.weight is \[256, 32\] there and \[256, 64\] here"),
        ({"model.n_layers": 2}, r"layers\.1\.\S+ is missing there and \[32\] here"),
        ({"model.tie_embeddings": True}, r"head\.weight is \[256, 32\] there and missing here"),
    ],
)
def test_a_model_of_other_shapes_is_refused_before_texts_are_prepared(
    make_config, first, texts, change, text
):
    init = {"data.train": str(texts), "train.init_from": first.out}
    config = make_config(change | init)
    with pytest.raises(ConfigError, match=rf"init_from=.* has no weights .*: {text}; change only"):
        train(config)
    assert not Path(config.out, "data").exists()


def test_weights_that_mean_something_else_are_refused(make_config, first):
    """Of other heads they have the same shapes. How weights once began is no matter."""
    n = first.model.mixer.n_heads
    told = f"has weights for mixer.n_heads={n}, .* mixer.n_heads={2 * n}; set mixer.n_heads={n}"
    with pytest.raises(ConfigError, match=told):
        train(make_config({"model.mixer.n_heads": 2 * n, "train.init_from": first.out}))
    train(make_config({"model.mixer.ssm_init": 0.5, "train.init_from": first.out}))


def test_another_tokenizer_is_refused(make_config, texts, tmp_path):
    train_bpe(texts, 300, tmp_path / "bpe")
    size = {"model.vocab_size": 300, "train.steps": 1}
    bytes_run = train(make_config(size, out="bytes"))
    change = size | {"data.train": str(texts), "data.tokenizer": str(tmp_path / "bpe")}
    config = make_config(change | {"train.init_from": str(bytes_run.run_dir)})
    with pytest.raises(ConfigError, match=r"its tokenizer is not the data's.*set data\.tokenizer="):
        train(config)


def test_what_is_not_there_is_told_before_anything_is_done(make_config, first, texts, tmp_path):
    change = {"data.train": str(texts)}
    for path, text in [
        (tmp_path / "none", "is not a folder"),
        (tmp_path, "holds no checkpoint"),
        (damaged(first.out, tmp_path / "damaged"), "is damaged|does not match|truncated"),
    ]:
        config = make_config(change | {"train.init_from": str(path)})
        with pytest.raises(CheckpointError, match=f"train.init_from={path}: .*({text})"):
            train(config)
        assert not Path(config.out, "data").exists()
    with pytest.raises(ConfigError, match=r"train\.init_from is empty"):
        train(make_config({"train.init_from": ""}))


def damaged(folder, to):
    """A copy of a run whose weights have lost their last byte."""
    shutil.copytree(folder, to)
    for checkpoint in list_checkpoints(to):
        path = checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    return to


def test_all_ranks_say_what_is_not_there(make_config, tmp_path):
    config = make_config({"train.init_from": str(tmp_path / "none"), "parallel.shard": 2})
    with pytest.raises(Failed, match=r"CheckpointError: train\.init_from=.*none: .* not a folder"):
        on_ranks(2, train, config)
