import json
import math

import numpy as np
import pytest
import torch

from attamba.config import ConfigError, from_dict
from attamba.data import Batch, DataError, OrderedRows, load_tokenizer, prepare, train_bpe
from attamba.models import Decoder
from attamba.train import TrainingDiverged, list_checkpoints, load, read_metrics, train
from attamba.train import run as run_module
from attamba.train.distributed import Ranks
from attamba.train.run import Run
from attamba.train.sources import open_sources
from attamba.train.watchdog import Watchdog


def losses(result):
    return [r["loss"] for r in result.metrics if r["kind"] == "train"]


def run_of(config, tmp_path):
    """A run, ready for its first step."""
    sources = open_sources(config, tmp_path / "sources", fresh=True, say=lambda text: None)
    ranks = Ranks(torch.device("cpu"))
    return Run(config, sources, ranks, Watchdog(ranks, 1))


TRANSFORMER = {"type": "transformer", "n_heads": 2}


@pytest.mark.parametrize("mixer", [None, TRANSFORMER])
def test_loss_goes_down_on_a_tiny_text(make_config, mixer):
    overrides = {
        "model.n_layers": 2,
        "train.steps": 40,
        "train.save_every": 0,
        "train.eval_every": 0,
    }
    config = make_config(overrides | ({"model.mixer": mixer} if mixer else {}))
    result = train(config)
    curve = losses(result)
    assert result.step == len(curve) == 40
    assert curve[0] == pytest.approx(math.log(256), abs=1.5)
    assert curve[-1] < 0.6 * curve[0]
    last = result.metrics[-1]
    assert last["kind"] == "valid"  # of the last step, though eval_every is 0
    assert last["valid_loss"] < 0.6 * curve[0]
    bits = last["valid_loss"] / math.log(2)
    assert last["valid_bits_per_byte"] == pytest.approx(bits, rel=1e-3)  # bytes, but for the eos
    assert [c.name for c in list_checkpoints(result.run_dir)] == ["step-00000040"]


def test_records_say_what_happened_and_go_to_on_log(make_config):
    seen = []
    config = make_config({"train.log_every": 3, "train.steps": 8, "train.eval_every": 5})
    result = train(config, on_log=seen.append)
    assert seen == result.metrics == read_metrics(result.run_dir / "metrics.jsonl")
    kinds = [(r["kind"], r["step"]) for r in seen]
    assert kinds == [
        ("train", 3),
        ("valid", 5),
        ("train", 6),
        ("train", 8),
        ("valid", 8),
    ]
    first = seen[0]
    assert first["tokens"] == 3 * 4 * 64
    assert first["lr"] == pytest.approx(3e-3 * 3 / 4)
    assert first["grad_norm"] > 0
    assert first["tokens_per_second"] == pytest.approx(first["tokens"] / first["seconds"])
    assert json.loads((result.run_dir / "config.json").read_text())["train"]["log_every"] == 3


def test_validation_reads_the_same_rows_each_time(make_config, tmp_path):
    run = run_of(make_config({"train.accumulate": 2}), tmp_path)
    assert run.sources.valid_windows(4) == run.sources.valid_windows(4)
    n = run.sources.valid.n_windows
    assert run.sources.valid_windows(10**6) == list(range(n))
    assert max(run.sources.valid_windows(4)) >= n // 2  # spread, not the first ones
    before = run.validate()
    assert before == run.validate()
    assert run.model.training
    assert all(p.grad is None for p in run.model.parameters())


def test_held_out_tokens_are_not_trained_on(make_config, tmp_path):
    sources = run_of(make_config(), tmp_path).sources
    dataset = sources.train.dataset
    trained = sources.train._first + sources.train.n_windows * 64
    assert trained < sources.valid._first + 1 <= dataset.n_tokens
    assert sources.valid._first == int(0.9 * dataset.n_tokens)


def test_accumulation_gives_the_gradient_of_the_mean_over_all_tokens(make_config, tmp_path):
    gradients = []
    for accumulate in (1, 2, 4):
        run = run_of(make_config({"train.accumulate": accumulate}), tmp_path)
        loss = run.gradients(run.send(run.sources.train.batch(0)))
        gradients.append((loss, [p.grad for p in run.model.parameters()]))
    (loss, whole), *others = gradients
    for other_loss, parts in others:
        assert torch.allclose(loss, other_loss, rtol=1e-6)
        for a, b in zip(whole, parts):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_order_of_the_data_does_not_depend_on_accumulation(make_config, monkeypatch):
    seen = {}
    parts = Run._loss_sum
    for accumulate in (1, 2):
        rows = seen[accumulate] = []

        def record(self, batch: Batch, rows=rows):
            if self.model.training:
                rows.extend(batch.inputs.tolist())
            return parts(self, batch)

        monkeypatch.setattr(Run, "_loss_sum", record)
        train(make_config({"train.accumulate": accumulate, "train.steps": 5}, out=f"{accumulate}"))
    assert len(seen[1]) == 5 * 4
    assert seen[1] == seen[2]


def test_what_is_wrong_with_a_boundary_is_said_before_texts_are_read(make_config, tmp_path):
    config = make_config({"model.mixer": {"type": "attamba", "boundary": "separator"}})
    config.out, config.data.train = str(tmp_path / "new"), str(tmp_path / "no such text")
    with pytest.raises(ValueError, match=r"boundary\.tokens=None must be a list"):
        train(config)
    assert not (tmp_path / "new").exists()


def test_rows_read_ahead_are_the_next_step_s(make_config, tmp_path, monkeypatch):
    found, asked = [], []
    for ahead in (False, True):
        run = run_of(make_config({"train.steps": 3}), tmp_path)
        batch = run.sources.train.batch
        monkeypatch.setattr(
            type(run.sources.train),
            "batch",
            lambda self, step, batch=batch: asked.append(step) or batch(step),
        )
        found.append([])
        while run.step < 3:
            run.take_step()
            if ahead:
                assert run.read_ahead()
                assert run.read_ahead()
            found[-1].append(run.read()["loss"])
        monkeypatch.undo()
    assert found[0] == found[1] and asked == [0, 1, 2] * 2


def test_rows_that_cannot_be_read_ahead_stop_the_step_that_needs_them(
    make_config, tmp_path, monkeypatch
):
    run = run_of(make_config({"train.steps": 3}), tmp_path)
    run.take_step()

    def fail(self, step):
        raise DataError("the shard is gone")

    monkeypatch.setattr(type(run.sources.train), "batch", fail)
    assert not run.read_ahead()
    assert run.read()["loss"] > 0
    with pytest.raises(DataError, match="the shard is gone"):
        run.take_step()


def test_what_came_before_rows_that_cannot_be_read_is_saved(make_config, monkeypatch):
    overrides = {"train.steps": 6, "train.save_every": 0, "train.eval_every": 0}
    straight = train(make_config(overrides, out="straight"))
    config = make_config(overrides, out="run")
    batch = OrderedRows.batch

    def gone(self, step):
        if step == 4:
            raise DataError("the shard is gone")
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(OrderedRows, "batch", gone)
        with pytest.raises(DataError, match="the shard is gone"):
            train(config)
    assert [c.name for c in list_checkpoints(config.out)] == ["step-00000004"]
    assert losses(train(config)) == losses(straight)


@pytest.mark.parametrize(
    "change",
    [
        {"train.seed": 1},
        {"data.doc_mask": False},
        {"train.dtype": "bfloat16"},
        {"optim.grad_clip": 0},
        {"optim.weight_decay": 0.5},
        {"optim.betas": [0.5, 0.9]},
        {"optim.eps": 1.0},
        {"optim.lr": 1e-4},
        {"optim.warmup_steps": 0},
        {"optim.min_lr_ratio": 0.5, "optim.warmup_steps": 1},
        {"data.seq_len": 32},
        {"data.valid_fraction": 0.5},
    ],
    ids=str,
)
def test_every_option_changes_the_run(make_config, texts, tmp_path, change):
    # One short document per line, so that rows hold several.
    words = (texts / "0.txt").read_text().split()
    lines = [json.dumps({"text": " ".join(words[i : i + 4])}) for i in range(0, len(words), 4)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    base = {"data.train": str(tmp_path / "short.jsonl"), "train.steps": 3}
    plain = losses(train(make_config(base, out="plain")))
    changed = losses(train(make_config(base | change, out="changed")))
    assert plain != changed
    if change == {"train.dtype": "bfloat16"}:
        assert changed == pytest.approx(plain, rel=0.02)


def test_compiled_training_saves_clean_names(make_config, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="eager"))
    overrides = {"train.steps": 2, "model.mixer": TRANSFORMER}
    plain = losses(train(make_config(overrides, out="plain")))
    result = train(make_config(overrides | {"train.compile": True}, out="compiled"))
    assert losses(result) == pytest.approx(plain, rel=1e-4)
    model, _ = load(result.run_dir)
    assert sum(p.numel() for p in model.parameters()) > 0


def test_text_is_prepared_on_the_fly_for_train_and_valid(make_config, texts):
    overrides = {
        "data.train": [str(texts / "0.txt")],
        "data.valid": str(texts / "1.txt"),
        "train.steps": 2,
    }
    result = train(make_config(overrides))
    assert (result.run_dir / "data" / "train" / "manifest.json").is_file()
    assert (result.run_dir / "data" / "valid" / "manifest.json").is_file()
    assert result.metrics[-1]["kind"] == "valid"


def test_nothing_held_out_means_no_validation(make_config):
    result = train(make_config({"data.valid_fraction": 0, "train.steps": 2}))
    assert [r["kind"] for r in result.metrics] == ["train", "train"]


def test_a_padded_vocabulary_is_fine(make_config):
    assert train(make_config({"model.vocab_size": 320, "train.steps": 1})).step == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data.train": ""}, r"data\.train is not set; give text files"),
        (
            {"model.vocab_size": 200},
            r"model\.vocab_size=200 is smaller than the vocabulary of .*tokens, 256; "
            r"set model\.vocab_size=256 or more",
        ),
        ({"data.valid_fraction": 0.001}, r"data\.valid_fraction=0\.001 holds out too little"),
        ({"train.device": "gpu"}, r"train\.device='gpu' is not a device; give auto, cpu, cuda"),
        ({"train.device": "cuda:99"}, r"train\.device='cuda:99': torch sees \d+ CUDA devices"),
        ({"train.accumulate": 3}, r"train\.accumulate=3 does not divide data\.batch_size=4"),
        ({"train.steps": 0}, r"train\.steps=0 must be at least 1"),
    ],
)
def test_configurations_that_cannot_be_used_are_refused(make_config, change, text):
    with pytest.raises(ConfigError, match=text):
        train(make_config(change))


def test_a_prepared_folder_is_given_alone(make_config, prepared, texts):
    with pytest.raises(ConfigError, match=r"data\.train: .* is a prepared folder, which must be"):
        train(make_config({"data.train": [str(prepared), str(texts)]}))


def test_validation_data_of_another_tokenizer_is_refused(make_config, texts, tmp_path):
    bpe = train_bpe(texts, 300, tmp_path / "bpe")
    prepare(texts, tmp_path / "other", bpe)
    with pytest.raises(ConfigError, match=r"data\.valid: .*made with another tokenizer"):
        train(make_config({"data.valid": str(tmp_path / "other")}))


def test_an_id_outside_the_vocabulary_is_refused_before_it_is_trained_on(
    make_config, texts, tmp_path
):
    bpe = train_bpe(texts, 300, tmp_path / "bpe")
    folder = tmp_path / "damaged"
    prepare(texts, folder, bpe)
    tokens = np.memmap(folder / "tokens-00000-000.bin", dtype="<u2", mode="r+")
    tokens[:] = 5000
    tokens.flush()
    prepare(texts, tmp_path / "good", bpe)
    for train_on, validate_on in (("damaged", "good"), ("good", "damaged")):
        data = {"data.train": str(tmp_path / train_on), "data.valid": str(tmp_path / validate_on)}
        config = make_config({**data, "model.vocab_size": 512}, out=train_on)
        with pytest.raises(DataError, match="holds the token id 5000, but its vocabulary has"):
            train(config)


@pytest.mark.parametrize("where", ["head.weight", "norm.weight"])
def test_divergence_stops_before_the_weights_and_names_step_and_checkpoint(
    make_config, monkeypatch, where
):
    models = []
    build = run_module.build_model
    monkeypatch.setattr(run_module, "build_model", lambda c: models.append(build(c)) or models[-1])

    def poison(record):
        if record["kind"] == "train" and record["step"] == 6:
            models[0].get_parameter(where).data.fill_(math.nan)

    config = make_config({"train.eval_every": 0, "spikes.max_in_a_row": 1})
    with pytest.raises(TrainingDiverged) as caught:
        train(config, on_log=poison)
    text = str(caught.value)
    last = list_checkpoints(config.out)[-1]
    assert caught.value.step == 7
    assert caught.value.checkpoint == last
    assert last.name == "step-00000004"
    why = "the loss is nan, and a step was left out (spikes.max_in_a_row=1)"
    assert text.startswith(f"step 7: {why}. The last good checkpoint is ")
    assert str(last) in text
    assert "lower optim.lr (now 0.003)" in text
    assert read_metrics(last.parent.parent / "metrics.jsonl")[-1]["step"] == 6
    model, _ = load(config.out)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make_config, tmp_path):
    run = run_of(make_config({"spikes.max_in_a_row": 1}), tmp_path)
    run.model.head.weight.register_hook(lambda grad: grad * math.inf)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.take_step()
    with pytest.raises(TrainingDiverged, match=r"step 1: the gradient norm is .*No checkpoint had"):
        run.read()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_weights_that_are_not_finite_are_not_saved(make_config, tmp_path):
    run = run_of(make_config(), tmp_path)
    run.take_step()
    run.model.norm.weight.data[3] = math.inf
    with pytest.raises(TrainingDiverged, match=r"step 1: norm\.weight is not finite"):
        run.save()
    assert list_checkpoints(run.config.out) == []


def test_a_huge_learning_rate_ends_in_an_error_or_in_finite_weights(make_config):
    """Whatever a mad setting does, no checkpoint that is written holds inf or nan."""
    config = make_config({"optim.lr": 1e38, "train.save_every": 1, "optim.grad_clip": 0})
    with pytest.raises(TrainingDiverged, match=r"lower optim\.lr \(now 1e\+38\)"):
        train(config)
    for checkpoint in list_checkpoints(config.out):
        model, _ = load(checkpoint)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_configs_written_by_a_run_read_back(make_config):
    result = train(make_config({"train.steps": 1}))
    tree = json.loads((result.run_dir / "config.json").read_text())
    config = from_dict(type(make_config()), tree)
    assert config == make_config({"train.steps": 1})
    assert load_tokenizer(config.data.tokenizer).vocab_size == 256


def test_cuda_graphs_are_refused_on_a_cpu(make_config):
    with pytest.raises(ConfigError, match=r"train\.cuda_graphs=true needs a CUDA device"):
        train(make_config({"train.cuda_graphs": True}))


def test_each_seed_has_random_boundaries_of_its_own(make_config, monkeypatch):
    draws = {}
    for seed in (0, 1):
        seen = draws.setdefault(seed, [])
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "set_draw", lambda model, draw, seen=seen: seen.append(draw))
            train(make_config({"train.seed": seed, "train.steps": 4}, out=str(seed)))
    assert [len(set(seen)) for seen in draws.values()] == [4, 4]
    assert not set(draws[0]) & set(draws[1])
