"""Tiny texts in the places that studies look at, and a recipe over them."""

import json
import random
from functools import partial

import pytest

from attamba.data import load_tokenizer, prepare
from attamba.studies.engine import Place
from attamba.studies.recipe import load_study

WORDS = ["red", "tree", "the", "a", "river,", "sees.", "under", "cat", "then\n"]

BASE = {
    "model": {"dim": 32, "n_layers": 1, "mixer": {"type": "attamba", "n_heads": 2, "ssm_heads": 2}},
    "data": {"seq_len": 32, "batch_size": 2},
    "train": {"device": "cpu", "steps": 6, "log_every": 1, "eval_every": 3, "save_every": 0},
}
RECIPE = {
    "question": "Does it run?",
    "report": ["main"],
    "base": BASE,
    "seeds": [0, 1],
    "variants": {"chunks": {"mixer.chunk_size": 4}, "full": {"mixer": {"type": "transformer"}}},
    "scores": {"books": {"kind": "text", "data": "valid", "context": 32, "max_tokens": 200}},
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder with prepared train, valid and wikitext2, of bytes."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("train", "valid", "wikitext2")):
        draw = random.Random(seed)
        path = folder / f"{name}.txt"
        path.write_text(" ".join(draw.choice(WORDS) for _ in range(600)), encoding="utf-8")
        prepare(path, folder / name, load_tokenizer("bytes"))
    return folder


@pytest.fixture(scope="session")
def study_in():
    """study_in(folder, name="little", **changes): RECIPE with keys replaced, read from a file."""

    def make(folder, name="little", **changes):
        path = folder / "recipes" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**RECIPE, **changes}), encoding="utf-8")
        return load_study(path)

    return make


@pytest.fixture
def make_study(study_in, tmp_path):
    """make_study(name="little", **changes): study_in for tmp_path."""
    return partial(study_in, tmp_path)


@pytest.fixture(scope="session")
def place_in(texts):
    """place_in(folder): where its runs and results go."""
    return lambda folder: Place(data=texts, out=folder / "runs", results=folder / "results")


@pytest.fixture
def place(place_in, tmp_path):
    return place_in(tmp_path)


class Limited(Place):
    """A place whose time is up after so many questions: one before training, one at each step."""

    steps = 0

    def left(self):
        asked = getattr(self, "_asked", 0)
        object.__setattr__(self, "_asked", asked + 1)
        return 100.0 if asked < self.steps else -1.0


@pytest.fixture
def limited(place):
    """limited(steps): the place, with so little time."""

    def make(steps):
        there = Limited(place.data, place.out, place.results)
        object.__setattr__(there, "steps", steps)
        return there

    return make
