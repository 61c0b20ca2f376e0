import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from ranks import train_until

import attamba
from attamba.config import ConfigError, RunConfig
from attamba.data import load_tokenizer, prepare, train_bpe
from attamba.models import build_model
from attamba.train import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load,
    save_checkpoint,
    train,
)
from attamba.train.storage import MANIFEST, seal


@pytest.fixture
def saved(make_config):
    """save(step, ...) -> (model, checkpoint folder) of a fresh model and the byte tokenizer."""

    def save(step=1, model_changes=None, tokenizer=None):
        config = make_config(model_changes)
        model = build_model(config.model)
        folder = save_checkpoint(
            config.out,
            step=step,
            model=model,
            config=config,
            tokenizer=tokenizer or load_tokenizer("bytes"),
        )
        return model, folder

    return save


def logits(model, ids=None):
    ids = torch.arange(1, 41)[None] if ids is None else ids
    with torch.no_grad():
        return model.eval()(ids)


def reseal(folder):
    """Make the manifest true again, as somebody who assembles a folder by hand would."""
    (folder / MANIFEST).unlink()
    seal(folder, step=1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_model_is_the_saved_one(saved, tied):
    model, folder = saved(model_changes={"model.tie_embeddings": tied})
    state = torch.get_rng_state()
    for path in (folder, str(folder.parent.parent)):
        loaded, tokenizer = attamba.load(path)
        assert torch.equal(logits(loaded), logits(model))
        assert not loaded.training
        assert loaded.config == model.config
        assert tokenizer.encode("hi") == [104, 105]
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing from the caller's
    assert (loaded.head.weight is loaded.embed.weight) == tied


def test_a_checkpoint_holds_no_pickle_and_is_sealed(make_config):
    result = train(make_config({"train.steps": 4}))
    folder = find_checkpoint(result.run_dir)
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {*manifest["files"], MANIFEST}
    assert {"model.safetensors", "optimizer.safetensors", "state.json", "config.json"} < files
    assert {os.path.splitext(name)[1] for name in files} == {".json", ".safetensors"}
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["tokens"]) == (4, 4 * 4 * 64)


def test_a_compiled_model_is_saved_under_its_own_names(make_config, tmp_path):
    config = make_config()
    model = build_model(config.model)
    compiled = torch.compile(model, backend="eager")
    tokenizer = load_tokenizer("bytes")
    save_checkpoint(tmp_path / "c", step=0, model=compiled, config=config, tokenizer=tokenizer)
    loaded, _ = load(tmp_path / "c")
    assert torch.equal(logits(loaded), logits(model))


def test_the_model_s_own_config_is_saved(tmp_path):
    model = build_model(attamba.ModelConfig(dim=16, n_layers=1, mixer={"type": "transformer"}))
    tokenizer = load_tokenizer("bytes")
    save_checkpoint(tmp_path, step=0, model=model, config=RunConfig(), tokenizer=tokenizer)
    assert load(tmp_path)[0].config == model.config


def test_a_step_is_chosen_and_named_when_it_is_not_there(saved):
    first, _ = saved(step=5)
    second, folder = saved(step=10)
    run_dir = folder.parent.parent
    assert torch.equal(logits(load(run_dir, step=5)[0]), logits(first))
    assert torch.equal(logits(load(run_dir)[0]), logits(second))
    with pytest.raises(CheckpointError, match=r"step=7 is not in .*; it holds steps 5, 10"):
        load(run_dir, step=7)
    with pytest.raises(CheckpointError, match="is one checkpoint; give the run folder"):
        load(folder, step=5)


def test_steps_sort_as_numbers(saved):
    for step in (99_999_999, 100_000_000, 5):
        saved(step=step)
    _, folder = saved(step=6)
    steps = [int(c.name.split("-")[1]) for c in list_checkpoints(folder.parent.parent)]
    assert steps == [5, 6, 99_999_999, 100_000_000]


def test_folders_without_a_checkpoint_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder; give a run folder"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {"dim": 32}}')
    with pytest.raises(CheckpointError, match="a run that has written no checkpoint yet; train it"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "attamba"}')
    with pytest.raises(CheckpointError, match="looks like a folder of transformers; read it"):
        load(tmp_path)


def test_a_step_is_not_written_twice(saved):
    saved(step=5)
    with pytest.raises(CheckpointError, match="step-00000005 exists already"):
        saved(step=5)


def test_device_and_dtype(saved):
    _, folder = saved()
    assert load(folder)[0].embed.weight.dtype == torch.float32
    for dtype in ("bfloat16", torch.bfloat16):
        model, _ = load(folder, device="auto", dtype=dtype)
        assert model.embed.weight.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype='int8' must be one of: float32, bfloat16"):
        load(folder, dtype="int8")


# -- the test-time dial ----------------------------------------------------------------------


def test_overrides_that_keep_the_parameters_change_the_model(saved):
    model, folder = saved()
    loaded, _ = load(folder, overrides={"mixer.chunk_size": 2, "mixer.boundary": "uniform"})
    assert loaded.config.mixer.chunk_size == 2
    assert not torch.allclose(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("override", "tensor"),
    [
        ({"mixer.state_dim": 4}, r"layers\.0\.mixer\.compressors\.\S+ is \["),
        ({"model.vocab_size": 300}, r"embed\.weight is \[256, 32\] .* and \[300, 32\]"),
        ({"n_layers": 3}, None),
        ({"model.n_layers": 3}, r"layers\.2\.\S+ is not in .*model\.safetensors"),
        ({"model.n_layers": 1}, r"layers\.1\.\S+ of .* is not in the model"),
        ({"mixer.kv_proj": True}, r"layers\.0\.mixer\.\S+ is not in"),
    ],
    ids=str,
)
def test_overrides_that_change_the_parameters_are_refused(saved, override, tensor):
    _, folder = saved(model_changes={"model.n_layers": 2})
    if tensor is None:
        with pytest.raises(ConfigError, match="unknown key 'n_layers'"):
            load(folder, overrides=override)
        return
    (key, value), *_ = override.items()
    text = rf"tensor {tensor}.*: the override {key}={value} changes the model's parameters"
    with pytest.raises(CheckpointError, match=text):
        load(folder, overrides=override)


# -- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "config.json"])
def test_an_altered_byte_is_found(saved, name):
    _, folder = saved()
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    text = rf"{name} was altered after it was saved: .*; restore it from a copy, or delete {folder}"
    with pytest.raises(CheckpointError, match=text):
        load(folder)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_file_is_found(saved, size):
    saved(step=1)
    _, folder = saved(step=2)
    path = folder / "model.safetensors"
    full = path.stat().st_size
    os.truncate(path, size % full)
    text = rf"model\.safetensors is truncated: {size % full} bytes of {full}; .* from step-00000001"
    with pytest.raises(CheckpointError, match=text):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", MANIFEST, "tokenizer/tokenizer_meta.json"])
def test_a_missing_file_is_found(saved, name):
    _, folder = saved()
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing; restore it"):
        load(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"files": {}}', '{"format": 1, "files": {"a": {}}}']
)
def test_a_damaged_manifest_is_found(saved, content):
    _, folder = saved()
    (folder / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        load(folder)


def test_a_prepared_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    prepare(tmp_path / "a.txt", tmp_path / "out", load_tokenizer("bytes"))
    with pytest.raises(CheckpointError, match="is not the manifest of a checkpoint; give a run"):
        load(tmp_path / "out")


def test_a_checkpoint_of_a_later_format_says_so(saved):
    _, folder = saved()
    (folder / MANIFEST).write_text('{"format": 2, "files": {}}')
    with pytest.raises(CheckpointError, match="has format 2, this program reads format 1"):
        load(folder)


def test_weights_without_their_optimizer_load(make_config):
    folder = find_checkpoint(train(make_config({"train.steps": 1})).run_dir)
    (folder / "optimizer.safetensors").unlink()
    assert load(folder)[0].config.dim == 32


def test_weights_of_another_model_are_refused(saved, tmp_path):
    _, folder = saved()
    tree = json.loads((folder / "config.json").read_text())
    tree["model"]["dim"] = 64
    (folder / "config.json").write_text(json.dumps(tree))
    reseal(folder)
    text = r"tensor embed\.weight is \[256, 32\].*\[256, 64\] in the model: .* not of one model"
    with pytest.raises(CheckpointError, match=text):
        load(folder)


# -- tokenizer and checkpoint ----------------------------------------------------------------


@pytest.fixture
def bpe(texts, tmp_path):
    return train_bpe(texts, 300, tmp_path / "bpe")


def test_a_bpe_goes_with_its_checkpoint(saved, bpe):
    _, folder = saved(model_changes={"model.vocab_size": 320}, tokenizer=bpe)
    loaded = load(folder)[1]
    assert loaded.fingerprint == bpe.fingerprint
    assert loaded.decode(loaded.encode("the dog")) == "the dog"


def test_another_tokenizer_in_the_folder_is_refused(saved, bpe, texts, tmp_path):
    _, folder = saved(model_changes={"model.vocab_size": 320}, tokenizer=bpe)
    train_bpe(texts, 280, tmp_path / "other").save(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer and checkpoint do not match"):
        load(folder)
    reseal(folder)
    text = (
        r"tokenizer and checkpoint do not match: .* has fingerprint \w{12}, the model was trained"
    )
    with pytest.raises(CheckpointError, match=text):
        load(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(saved, bpe):
    _, folder = saved(tokenizer=bpe)
    text = f"do not match: the tokenizer has {bpe.vocab_size} entries, model.vocab_size is 256"
    with pytest.raises(CheckpointError, match=text):
        load(folder)


# -- a disk that is full ---------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train_until_the_disk_is_full(make_config, monkeypatch, fill):
    """The disk is full when step 8 is saved; step 4 must stay whole, and training go on later."""
    config = make_config({"train.eval_every": 0})

    def on_log(record):
        if record["step"] == 7:
            fill()

    with pytest.raises(CheckpointError) as caught:
        train(config, on_log=on_log)
    monkeypatch.undo()
    text = str(caught.value)
    assert "cannot save" in text
    assert "step-00000008" in text
    assert "If the disk is full, make room there" in text
    (older,) = list_checkpoints(config.out)
    assert f"{older} is whole, and the same command goes on from it" in text
    assert older.name == "step-00000004"
    assert sorted(os.listdir(older.parent)) == [older.name]  # nothing of the new one is left
    load(config.out)
    return config, text


@pytest.mark.parametrize(
    "function",
    [
        "safetensors.torch.save_file",
        "attamba.data.tokenizer.ByteTokenizer.save",
        "os.fsync",
        "os.rename",
        "os.mkdir",
    ],
)
def test_a_full_disk_leaves_the_older_checkpoint_whole(make_config, monkeypatch, function):
    def fill():
        monkeypatch.setattr("attamba.train.metrics.MetricsLog.sync", lambda self: None)
        monkeypatch.setattr(function, full)

    config, text = train_until_the_disk_is_full(make_config, monkeypatch, fill)
    assert "No space left on device" in text
    assert train(config).step == 12


def test_a_file_that_the_system_refuses_to_grow(make_config, monkeypatch):
    """The same by a limit that the kernel enforces: the error comes from the writer itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

    try:
        config, text = train_until_the_disk_is_full(make_config, monkeypatch, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in text
    assert train(config).step == 12


def test_an_old_checkpoint_that_cannot_be_deleted_ends_nothing(make_config, monkeypatch):
    """As on NFS, where a file that another program has open keeps its folder from going."""
    rmtree = shutil.rmtree

    def refuse(path, ignore_errors=False, **options):
        if ".tmp-step-" not in str(path):
            rmtree(path, ignore_errors=ignore_errors, **options)
        elif not ignore_errors:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    config = make_config({"train.save_every": 2, "train.keep": 1})
    monkeypatch.setattr(shutil, "rmtree", refuse)
    train_until(config, 6)
    assert [path.name for path in list_checkpoints(config.out)] == ["step-00000006"]
    left = [path.name for path in (Path(config.out) / "checkpoints").glob(".tmp-*")]
    assert len(left) == 2
    monkeypatch.undo()
    assert train(config).step == 12
    assert not list((Path(config.out) / "checkpoints").glob(".tmp-*"))


def test_an_old_checkpoint_that_cannot_be_renamed_is_named(make_config, monkeypatch):
    rename = os.rename

    def refuse(old, new):
        if ".tmp-step-" in str(new):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(old))
        rename(old, new)

    config = make_config({"train.save_every": 6, "train.keep": 1})
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(UserWarning, match="step-00000006 cannot be deleted .*; delete it by hand"):
        train(config)
    assert len(list_checkpoints(config.out)) == 2
