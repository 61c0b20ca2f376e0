"""The choice of the demo's learning rates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from attamba.config import ConfigError
from attamba.data import TokenDataset
from attamba.demo import tune
from attamba.demo.corpus import stdlib_files
from attamba.demo.settings import LEARNING_RATES, MODELS, SEED_SPREAD, DemoSettings, run_config
from attamba.demo.tune import Trial

SETTINGS = DemoSettings(
    dim=16,
    n_layers=1,
    n_heads=2,
    chunk_size=4,
    leading_tokens=8,
    seq_len=32,
    steps=3,
    eval_bytes_per_file=64,
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    root.mkdir()
    for i in range(6):
        (root / f"m{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    return root


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[tuple[float, int], float]], list]:
    """pretend({(lr, seed): score}) replaces training; returns the trials that are asked for."""

    def replace_training(score: dict[tuple[float, int], float]) -> list[Trial]:
        asked: list[Trial] = []

        def train_all(trials: list[Trial], *_: Any) -> Iterator[tuple[Trial, float]]:
            for trial in trials:
                asked.append(trial)
                yield trial, score[trial.lr, trial.seed]

        monkeypatch.setattr(tune, "_train_all", train_all)
        return asked

    return replace_training


def run(path: Path, corpus: Path, **options: Any) -> dict[str, Any]:
    settings = options.pop("settings", SETTINGS)
    return tune.tune(settings, path, corpus=corpus, say=lambda _: None, **options)


def test_the_best_mean_of_the_repeated_rates_is_chosen(tmp_path, corpus, pretend):
    path = tmp_path / "results.json"
    first = {(1.0, 0): 3.0, (2.0, 0): 2.0, (4.0, 0): 2.1, (8.0, 0): math.inf}
    asked = pretend({**first, (2.0, 1): 2.4, (4.0, 1): 2.1})
    record = run(path, corpus, rates=(1.0, 2.0, 4.0, 8.0))
    assert record["chosen"] == {"attamba": 4.0, "transformer": 4.0}
    assert len(asked) == 2 * (4 + 2)
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written == record
    assert [t["bits_per_byte"] for t in written["trials"] if t["lr"] == 8.0] == [None, None]
    assert "| 8 | inf |  | inf |  |" in tune.table(record).markdown()


def test_what_is_there_is_not_trained_again(tmp_path, corpus, pretend):
    path = tmp_path / "results.json"
    pretend({(1.0, 0): 2.0, (2.0, 0): 1.0})
    with pytest.raises(KeyError):  # the first repeat
        run(path, corpus, rates=(1.0, 2.0))
    assert len(json.loads(path.read_text())["trials"]) == 4
    asked = pretend({(1.0, 1): 2.0, (2.0, 1): 1.0})
    assert run(path, corpus, rates=(1.0, 2.0))["chosen"]["attamba"] == 2.0
    assert asked == [Trial(model, lr, 1) for model in MODELS for lr in (2.0, 1.0)]


def test_scores_of_other_settings_or_text_are_not_mixed(tmp_path, corpus, pretend):
    path = tmp_path / "results.json"
    pretend({(1.0, 0): 2.0})
    run(path, corpus, rates=(1.0,), seeds=(0,))
    with pytest.raises(ConfigError, match=r"settings\.steps=3, these have 5; name another file"):
        run(path, corpus, settings=replace(SETTINGS, steps=5))
    (corpus / "more.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"data\.train_files=4, these have 5"):
        run(path, corpus)


def test_tuning_files_are_cut_from_the_files_to_train_on(tmp_path, corpus):
    counts = tune._prepare(tmp_path / "data", corpus)
    assert (counts["train_files"], counts["tuning_files"]) == (4, 1)
    train, held_out = stdlib_files(corpus)
    used = [
        {Path(document.source) for document in TokenDataset.open(tmp_path / "data" / n).documents()}
        for n in ("train", "held-out")
    ]
    assert not used[0] & used[1]
    assert used[0] | used[1] == set(train)
    assert not set(held_out) & set(train)


def test_a_training_is_the_demos(tmp_path, corpus):
    record = run(tmp_path / "results.json", corpus, rates=(1e-3,), seeds=(5,))
    scores = [trial["bits_per_byte"] for trial in record["trials"]]
    assert len(scores) == 2 and all(0 < score < 20 for score in scores)
    tune._prepare(tmp_path / "data", corpus)
    again = tune._train(Trial("attamba", 1e-3, 5), SETTINGS, tmp_path)
    assert again == pytest.approx(scores[0], abs=1e-6)
    assert tune._train(Trial("attamba", 1e38, 5), SETTINGS, tmp_path) == math.inf


def test_each_model_of_the_demo_has_its_rate(tmp_path):
    settings = replace(SETTINGS, lr={"attamba": 1e-3, "transformer": 2e-3})
    rates = [run_config(settings, name, tmp_path).optim.lr for name in MODELS]
    assert rates == [1e-3, 2e-3]
    assert DemoSettings().lr == LEARNING_RATES


def test_the_demos_rates_are_those_of_the_study():
    results = Path(__file__).parents[2] / "studies" / "demo-rates" / "results.json"
    record = json.loads(results.read_text(encoding="utf-8"))
    assert record["chosen"] == LEARNING_RATES
    demo = DemoSettings(steps=tune.STEPS)
    assert record["settings"] == {key: getattr(demo, key) for key in tune.FIXED}
    scores = tune._scores(record)
    spreads = [
        abs(scores[Trial(name, lr, 0)] - scores[Trial(name, lr, 1)])
        for name, lr in LEARNING_RATES.items()
    ]
    assert round(fmean(spreads), 2) == SEED_SPREAD


def test_bad_option(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["tune", "--json", str(tmp_path / "a.json"), "--jobs", "0"])
    assert tune.main() == 1
    assert "--jobs=0 must be at least 1" in capsys.readouterr().err
