"""A tiny text, prepared once, and a tiny run on it."""

import json
import random
from functools import partial

import pytest

from attamba.config import RunConfig, apply_overrides, from_dict
from attamba.data import load_tokenizer, prepare

TINY = {
    "model": {
        "dim": 32,
        "n_layers": 1,
        "mixer": {
            "type": "attamba",
            "n_heads": 2,
            "chunk_size": 4,
            "leading_tokens": 8,
            "state_dim": 8,
            "ssm_heads": 2,
        },
    },
    "data": {"seq_len": 64, "batch_size": 4, "valid_fraction": 0.1},
    "optim": {"warmup_steps": 4},
    "train": {
        "steps": 12,
        "device": "cpu",
        "log_every": 1,
        "eval_every": 4,
        "eval_rows": 4,
        "save_every": 4,
        "progress": False,
    },
}


WORDS = ["the", "a", "cat", "dog", "tree", "river", "sees", "eats", "under", "red", "and", "then"]


@pytest.fixture(scope="session")
def write_text():
    """write_text(path, seed): a file of about 13 kB, another one for another seed."""

    def write(path, seed):
        draw = random.Random(seed)
        path.write_text(" ".join(draw.choice(WORDS) for _ in range(3000)), encoding="utf-8")

    return write


@pytest.fixture(scope="session")
def texts(write_text, tmp_path_factory):
    """A folder of two text files, about 26 kB."""
    folder = tmp_path_factory.mktemp("texts")
    for seed in (0, 1):
        write_text(folder / f"{seed}.txt", seed)
    return folder


@pytest.fixture(scope="session")
def prepared(texts, tmp_path_factory):
    """The texts as bytes, prepared."""
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare(texts, folder, load_tokenizer("bytes"))
    return folder


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """Two prepared folders of 120 documents of 1 to 60 letters, each of an alphabet of its own."""
    folders = []
    for number, letters in enumerate(("abcdefgh ", "rstuvwxyz ")):
        draw = random.Random(number)
        folder = tmp_path_factory.mktemp("documents")
        texts = ["".join(draw.choices(letters, k=draw.randint(1, 60))) for _ in range(120)]
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        prepare(folder / "texts.jsonl", folder / "tokens", load_tokenizer("bytes"))
        folders.append(str(folder / "tokens"))
    return folders


@pytest.fixture(scope="session")
def config_in(prepared):
    """config_in(folder, {"optim.lr": 1e-3}, out="name") -> RunConfig of a tiny run there."""

    def make(folder, overrides=None, out="run"):
        tree = apply_overrides(TINY, {"data.train": str(prepared), **(overrides or {})})
        return from_dict(RunConfig, {**tree, "out": str(folder / out)})

    return make


@pytest.fixture
def make_config(config_in, tmp_path):
    """make_config({"optim.lr": 1e-3}, out="name") -> RunConfig of a tiny run in tmp_path."""
    return partial(config_in, tmp_path)


class Stop(Exception):
    """Ends a run from within, as a crash would."""


@pytest.fixture
def crash_at():
    """crash_at(step) -> an on_log that raises Stop at that step's training record."""

    def make(step):
        def on_log(record):
            if record["kind"] == "train" and record["step"] == step:
                raise Stop

        return on_log

    make.error = Stop
    return make
