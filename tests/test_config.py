"""Defaults < YAML < key=value, and what is refused, with its message."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from attamba.config import (
    AttambaMixer,
    ConfigError,
    ModelConfig,
    RunConfig,
    TransformerMixer,
    from_dict,
    load_run_config,
    override_model,
    parse_overrides,
    to_dict,
)


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def _mixer(config: RunConfig | ModelConfig, layer: int = 0) -> Any:
    model = config.model if isinstance(config, RunConfig) else config
    return model.layer_mixers()[layer]


# --------------------------------------------------------------------------------------------
# Where a value comes from
# --------------------------------------------------------------------------------------------


def test_defaults_alone():
    assert load_run_config(None) == RunConfig()


def test_a_file_goes_before_the_defaults_and_arguments_before_the_file(tmp_path):
    path = _write(tmp_path, "out: runs/a\nmodel: {dim: 64}\noptim: {lr: 1e-3}\n")
    config = load_run_config(path, ["optim.lr=2e-3", "data.train=texts"])
    assert (config.out, config.model.dim, config.model.n_layers) == ("runs/a", 64, 8)
    assert (config.optim.lr, config.data.train) == (2e-3, "texts")


def test_without_yaml_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'attamba[train]'")):
        load_run_config(None, ["out=x"])


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_run_config(_write(tmp_path, "# nothing\n")) == RunConfig()


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_run_config(tmp_path / "none.yaml")


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder; give a configuration's file"):
        load_run_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"is not valid YAML: .* line 1, column 5: [^\n]*$"),
        ("- a\n- b\n", "must hold keys and values, not list"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(_write(tmp_path, text))


def test_a_text_that_is_given_as_the_configuration(tmp_path):
    (tmp_path / "book.txt").write_text("It was: a dark\nand stormy night")
    with pytest.raises(ConfigError, match=r"a text is named by data\.train=.*book\.txt$"):
        load_run_config(tmp_path / "book.txt")


@pytest.mark.parametrize(
    ("key", "whole"),
    [
        ("steps", "train.steps"),
        ("seed", "train.seed"),
        ("lr", "optim.lr"),
        ("seq_len", "data.seq_len"),
        ("chunk_size", "mixer.chunk_size"),
        ("n_layers", "model.n_layers"),
    ],
)
def test_a_key_without_its_section(key, whole):
    with pytest.raises(ConfigError, match=f"unknown key '{key}'; did you mean '{whole}'"):
        load_run_config(None, [f"{key}=5"])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("x=1", 1),
        ("x=1e-3", 1e-3),
        ("x=true", True),
        ("x=null", None),
        ("x=", ""),
        ("x=a=b", "a=b"),
        ("x=[10, 32]", [10, 32]),
        ("x={type: budget, max_chunks: 64}", {"type": "budget", "max_chunks": 64}),
        ("x=runs/7", "runs/7"),
    ],
)
def test_arguments_are_read_as_yaml(argument, value):
    assert parse_overrides([argument]) == {"x": value}


@pytest.mark.parametrize("argument", ["x", "=1"])
def test_an_argument_without_a_key_or_value(argument):
    with pytest.raises(ConfigError, match=r"is not of the form key=value$"):
        parse_overrides([argument])


def test_a_second_file_among_the_keys(tmp_path):
    with pytest.raises(ConfigError, match="not of the form key=value; give one file or folder"):
        parse_overrides([str(_write(tmp_path, "a: 1"))])


def test_an_argument_that_is_no_yaml():
    with pytest.raises(ConfigError, match=re.escape("mixer.boundary: cannot read '{type'")):
        parse_overrides(["mixer.boundary={type"])


# --------------------------------------------------------------------------------------------
# Dotted keys, mixers, boundaries
# --------------------------------------------------------------------------------------------


def test_mixer_is_short_for_model_mixer():
    config = load_run_config(None, ["mixer.chunk_size=4"])
    assert config == load_run_config(None, ["model.mixer.chunk_size=4"])
    assert _mixer(config).chunk_size == 4


def test_a_mixer_of_another_type():
    config = load_run_config(None, ["mixer={type: transformer, window: 64}"])
    assert _mixer(config) == TransformerMixer(window=64)


def test_a_key_goes_to_each_mixer_of_a_list_that_has_it(tmp_path):
    path = _write(
        tmp_path, "model:\n  mixer:\n  - {type: transformer}\n  - {type: attamba}\n  - {}\n"
    )
    config = load_run_config(path, ["mixer.chunk_size=4", "mixer.n_heads=4", "mixer.0.window=9"])
    transformer, first, second = (_mixer(config, i) for i in range(3))
    assert transformer == TransformerMixer(n_heads=4, window=9)
    assert first == second == AttambaMixer(n_heads=4, chunk_size=4)
    assert _mixer(config, 3) == transformer  # the list is cycled over the layers


def test_a_key_that_no_mixer_of_a_list_has():
    with pytest.raises(ConfigError, match=r"'mixer.chunk_sise'; did you mean 'chunk_size'\?"):
        load_run_config(None, ["mixer=[{type: transformer}, {}]", "mixer.chunk_sise=4"])


def test_an_entry_that_the_list_of_mixers_lacks():
    with pytest.raises(ConfigError, match=r"mixer.2.window: the list has 2 entries, counted from"):
        load_run_config(None, ["mixer=[{type: transformer}, {}]", "mixer.2.window=4"])


def test_options_of_a_boundary():
    given = {"type": "separator", "tokens": [10, 32], "max_chunk": 16}
    arguments = [
        "mixer.boundary=separator",
        "mixer.boundary.tokens=[10, 32]",
        "mixer.boundary.max_chunk=16",
    ]
    assert _mixer(load_run_config(None, arguments)).boundary == given
    assert _mixer(ModelConfig(mixer={"boundary": given})).boundary == given  # type: ignore[arg-type]


def test_override_model_leaves_the_original_alone():
    config = ModelConfig(dim=64, mixer=AttambaMixer(n_heads=4))
    other = override_model(config, {"mixer.chunk_size": 2, "model.dim": 32})
    assert (_mixer(other).chunk_size, other.dim) == (2, 32)
    assert config == ModelConfig(dim=64, mixer=AttambaMixer(n_heads=4))


@pytest.mark.parametrize(
    "mixer, name",
    [({}, "n_heads"), ({}, "ssm_heads"), ({"type": "hawk"}, "n_blocks"), ({}, "ssm_init")],
)
def test_override_model_keeps_what_weights_were_made_for(mixer, name):
    config = ModelConfig(dim=64, mixer={"type": "attamba", **mixer})
    with pytest.raises(
        ConfigError, match=rf"mixer\.{name}=2(\.0)? cannot be set on trained weights"
    ):
        override_model(config, {f"mixer.{name}": 2})


def test_override_model_takes_keys_of_the_model_alone():
    with pytest.raises(ConfigError, match="unknown key 'optim'"):
        override_model(ModelConfig(), {"optim.lr": 1.0})


# --------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.learning_rat=1", "unknown key 'optim.learning_rat'"),
        ("optim.weigth_decay=1", "did you mean 'weight_decay'?"),
        ("modle.dim=64", "unknown key 'modle'; did you mean 'model'?"),
        ("mixer.chunksize=8", "unknown key 'model.mixer.chunksize'; did you mean 'chunk_size'?"),
        ("train.zzz=8", "known: steps, accumulate,"),
        (
            "mixer.type=atamba",
            "is not a mixer (there are: attamba, transformer, mamba2, mingru, minlstm, hawk)"
            "; did you mean 'attamba'?",
        ),
        (
            "mixer.ssm_scope=chunks",
            "must be one of: chunk, sequence, strided; did you mean 'chunk'?",
        ),
        ("mixer.boundary={max_chunk: 4}", 'needs a "type"'),
        ("mixer=transformer", 'must be a dictionary with a "type"'),
        ("model.mixer=[]", "mixer=[] is empty"),
    ],
)
def test_unknown_names(key, nearest):
    with pytest.raises(ConfigError, match=re.escape(nearest)):
        load_run_config(None, [key])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.dim=wide", "model.dim='wide' must be a whole number"),
        ("model.dim=64.5", "model.dim=64.5 must be a whole number"),
        ("model.dim=true", "model.dim=True must be a whole number"),
        ("optim.lr=fast", "optim.lr='fast' must be a number"),
        ("optim.lr=1e999", "must be a number"),
        ("optim.weight_decay=nan", "must be a number"),
        ("optim.grad_clip=inf", "must be a number"),
        ("train.compile=1", "train.compile=1 must be true or false"),
        ("out=3", "out=3 must be text"),
        ("data=3", "data=3 must be a dictionary"),
        ("data.train=[1]", "data.train=[1] must be text or a list, [a, b, ...], each text"),
        ("mixer.leading_tokens=all", "must be a whole number or null"),
        ("optim.betas=0.9", "optim.betas=0.9 must be a list, [a, b, ...], each a number"),
    ],
)
def test_wrong_types(argument, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run_config(None, [argument])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mixer.chunk_size=0"], "mixer.chunk_size=0 must be at least 1"),
        (["mixer.leading_tokens=-1"], "mixer.leading_tokens=-1 must be at least 0; null means all"),
        (["mixer.state_dim=0"], "mixer.state_dim=0 must be at least 1"),
        (["mixer.ssm_dim=0"], "mixer.ssm_dim=0 must be at least 1"),
        (["mixer.ssm_heads=7"], "mixer.ssm_heads=7 does not divide ssm_dim=256"),
        (["mixer.n_heads=0"], "mixer.n_heads=0 must be at least 1"),
        (
            ["mixer.n_heads=7"],
            "n_heads=7 does not divide dim=512; set mixer.head_dim and mixer.kv_proj=true, or",
        ),
        (
            ["mixer.type=transformer", "mixer.sink=false"],
            "give the mixer whole: 'model.mixer={type",
        ),
        (["mixer.n_kv_heads=3"], "mixer.n_kv_heads=3 does not divide n_heads=8"),
        (["mixer.n_kv_heads=2"], "2 * 64 = 128 must equal dim = 512 when kv_proj is false"),
        (["mixer.head_dim=16"], "8 * 16 = 128 must equal dim = 512 when kv_proj is false"),
        (["mixer.head_dim=0"], "mixer.head_dim=0 must be even and at least 2"),
        (["mixer.n_heads=512"], "mixer.head_dim=1 must be even and at least 2"),
        (["mixer.boundary=head_cyclic"], "needs mixer.ssm_scope=sequence"),
        (["mixer={type: transformer, window: 0}"], "mixer.window=0 must be at least 1"),
        (["mixer=[{}, {chunk_size: 0}]"], "mixer.1.chunk_size=0 must be at least 1"),
        (["model.dim=0"], "dim=0 must be at least 1"),
        (["model.vocab_size=0"], "vocab_size=0 must be at least 1"),
        (["model.ffn_dim=0"], "ffn_dim=0 must be at least 1"),
        (["model.rope_theta=0"], "rope_theta=0.0 must be above 0"),
        (["model.norm_eps=-1"], "norm_eps=-1.0 must not be negative"),
        (["data.seq_len=0"], "data.seq_len=0 must be at least 1"),
        (["data.valid_fraction=1"], "data.valid_fraction=1.0 must be in [0, 1)"),
        (["optim.lr=0"], "optim.lr=0.0 must be above 0"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9] must be two numbers in [0, 1)"),
        (["optim.grad_clip=-1"], "optim.grad_clip=-1.0 must not be negative"),
        (["train.steps=0"], "train.steps=0 must be at least 1"),
        (["optim.eps=0"], "optim.eps=0.0 must be above 0"),
        (["train.seed=-1"], "train.seed=-1 must be at least 0"),
        (
            ["train.accumulate=3"],
            "train.accumulate=3 does not divide data.batch_size=16",
        ),
    ],
)
def test_bounds(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run_config(None, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["mixer.leading_tokens=null"],
        ["mixer.leading_tokens=0"],
        ["mixer.chunk_size=1"],
        ["mixer.kv_proj=true", "mixer.n_kv_heads=2"],
        ["mixer.kv_proj=true", "mixer.head_dim=16"],
        ["mixer.boundary=head_cyclic", "mixer.ssm_scope=sequence"],
        ["mixer={type: transformer, n_kv_heads: 1, head_dim: 2}"],
    ],
)
def test_what_lies_at_the_edge_is_fine(arguments):
    load_run_config(None, arguments)


# --------------------------------------------------------------------------------------------
# There and back
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(),
        ModelConfig(mixer=TransformerMixer(window=8, head_dim=16)),
        ModelConfig(mixer=[AttambaMixer(boundary={"type": "budget", "max_chunks": 9})]),
        ModelConfig(mixer=[TransformerMixer(), AttambaMixer(leading_tokens=None)], n_layers=3),
    ],
)
def test_a_configuration_survives_the_way_through_dictionaries(model):
    config = RunConfig(model=model)
    tree = to_dict(config)
    assert from_dict(RunConfig, tree) == config
    assert _plain(tree)


def test_every_field_survives():
    changed = {int: 96, float: 0.5, bool: True, str: "x"}
    for section in ("data", "optim", "train"):
        for field in dataclasses.fields(getattr(RunConfig(), section)):
            default = getattr(getattr(RunConfig(), section), field.name)
            if type(default) in changed and field.name not in ("dtype", "float8", "packing"):
                tree = {section: {field.name: changed[type(default)]}}
                config = from_dict(RunConfig, tree)
                assert getattr(getattr(config, section), field.name) == changed[type(default)]
                assert from_dict(RunConfig, to_dict(config)) == config


def _plain(tree: Any) -> bool:
    if isinstance(tree, dict):
        return all(isinstance(k, str) and _plain(v) for k, v in tree.items())
    if isinstance(tree, list):
        return all(map(_plain, tree))
    return tree is None or isinstance(tree, (bool, int, float, str))
