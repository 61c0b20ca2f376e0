"""Choose the demo's learning rate for each of its models, without the files that the demo scores.

    python -m attamba.demo.tune --json studies/demo-rates/results.json

The demo's training files are split as the demo splits all files: one in 32 are tuning files, the
others train. Each model is trained at every rate, as the demo trains it, and scored on the tuning
files, as the demo scores its held-out files. The best two rates are repeated with other seeds; of
these, the rate with the lowest mean is chosen. The demo's held-out files play no part.

A training that ends is written to the file at once; the same command skips what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from attamba.bench.common import Table
from attamba.config import ConfigError
from attamba.data import load_tokenizer, prepare
from attamba.data.files import write_json
from attamba.demo.corpus import split, stdlib_files
from attamba.demo.settings import MODELS, DemoSettings, run_config

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1)
REPEATED = 2
"""Rates of each model that are trained with every seed, the others with the first alone."""
STEPS = 830
"""Of each training; about what the demo does in five minutes on two cores."""
FIXED = (
    *("dim", "n_layers", "n_heads", "chunk_size", "leading_tokens"),
    *("seq_len", "batch_size", "steps", "eval_bytes_per_file"),
)
"""Settings of the demo that a score depends on, beside those of a Trial."""


@dataclass(frozen=True, order=True)
class Trial:
    """One training."""

    model: str
    lr: float
    seed: int


Scores = dict[Trial, float]
"""Bits per byte on the tuning files; infinite for a training that diverged."""


def tune(
    settings: DemoSettings,
    path: Path,
    *,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
    jobs: int = 1,
    corpus: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train what the file `path` does not hold yet, and return its content.

    settings: the demo's, with a number of steps. jobs: trainings at a time, each on one thread.
    corpus: a folder of .py files instead of the standard library. Raises ConfigError if the file
    holds trainings with other settings or on other text.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = _open(path, settings, _prepare(folder / "data", corpus))
        scores = _scores(record)
        first = [Trial(model, lr, seeds[0]) for model in MODELS for lr in rates]
        for choose in (lambda: first, lambda: _repeats(scores, seeds)):
            todo = [trial for trial in choose() if trial not in scores]
            for trial, score in _train_all(todo, settings, folder, jobs):
                scores[trial] = score
                _write(path, record, scores)
                say(f"{trial.model}, {trial.lr:g}, seed {trial.seed}: {score:.4f} bits per byte")
    record["chosen"] = {model: _best(scores, model, seeds) for model in MODELS}
    _write(path, record, scores)
    return record


def _open(path: Path, settings: DemoSettings, data: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or a new record of no trainings."""
    new = {"settings": {key: getattr(settings, key) for key in FIXED}, "data": data}
    if not path.exists():
        return {**new, "versions": _versions(), "trials": []}
    record = json.loads(path.read_text(encoding="utf-8"))
    for part in ("settings", "data"):
        for key, now in new[part].items():
            there = record[part].get(key)
            if there != now:
                raise ConfigError(
                    f"--json={path} holds trainings with {part}.{key}={there}, these have {now}; "
                    f"name another file, or delete that one"
                )
    return record


def _versions() -> dict[str, str]:
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__}


def _prepare(folder: Path, corpus: Path | None) -> dict[str, Any]:
    """Prepare the text below `folder`, the tuning files in the held-out files' place.

    Returns how much there is, which tells one version of the library from another.
    """
    tokenizer = load_tokenizer("bytes")
    train, tuning = (
        prepare(list(map(str, files)), folder / name, tokenizer)
        for files, name in zip(split(stdlib_files(corpus)[0]), ("train", "held-out"))
    )
    return {
        "train_files": train.n_documents,
        "train_bytes": train.n_bytes,
        "tuning_files": tuning.n_documents,
        "tuning_bytes": tuning.n_bytes,
    }


def _train_all(
    trials: Sequence[Trial], settings: DemoSettings, folder: Path, jobs: int
) -> Iterator[tuple[Trial, float]]:
    """Each training with its score, as they end."""
    # A forked process would inherit torch's threads by halves.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = {pool.submit(_train, trial, settings, folder): trial for trial in trials}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _train(trial: Trial, settings: DemoSettings, folder: Path) -> float:
    """Train as the demo does; bits per byte on the tuning files."""
    import torch

    from attamba.data import TokenDataset
    from attamba.demo.measure import beginnings
    from attamba.evaluate import evaluate
    from attamba.train import TrainingDiverged, load, train

    torch.set_num_threads(1)
    settings = replace(settings, lr={trial.model: trial.lr}, seed=trial.seed)
    config = run_config(settings, trial.model, folder, progress=False)
    config = replace(config, out=f"{config.out}-{trial.lr:g}-{trial.seed}")
    try:
        model, tokenizer = load(train(config).run_dir)
    except TrainingDiverged:
        return math.inf
    tuning = TokenDataset.open(folder / "data" / "held-out")
    texts = beginnings(tuning, tokenizer, settings.eval_bytes_per_file)
    return evaluate(model, tokenizer, texts, context=settings.seq_len).bits_per_byte


def _repeats(scores: Scores, seeds: Sequence[int]) -> list[Trial]:
    """Every seed of the rates that are best with the first."""
    repeats = []
    for model in MODELS:
        first = sorted(
            (trial for trial in scores if (trial.model, trial.seed) == (model, seeds[0])),
            key=lambda trial: scores[trial],
        )
        repeats += [replace(trial, seed=seed) for trial in first[:REPEATED] for seed in seeds]
    return repeats


def _best(scores: Scores, model: str, seeds: Sequence[int]) -> float:
    """The repeated rate with the lowest mean score."""
    rates = {trial.lr for trial in _repeats(scores, seeds) if trial.model == model}
    return min(rates, key=lambda lr: fmean(scores[Trial(model, lr, seed)] for seed in seeds))


def _scores(record: dict[str, Any]) -> Scores:
    scores = {}
    for row in record["trials"]:
        score = row["bits_per_byte"]
        trial = Trial(row["model"], row["lr"], row["seed"])
        scores[trial] = math.inf if score is None else score
    return scores


def _write(path: Path, record: dict[str, Any], scores: Scores) -> None:
    record["trials"] = [
        {**asdict(trial), "bits_per_byte": score if math.isfinite(score) else None}
        for trial, score in sorted(scores.items())
    ]
    write_json(path, record)


def table(record: dict[str, Any]) -> Table:
    """The scores: a row per rate, a column per model and seed."""
    scores = _scores(record)
    columns = sorted({(trial.model, trial.seed) for trial in scores})
    rows = []
    for lr in sorted({trial.lr for trial in scores}):
        cells = [scores.get(Trial(model, lr, seed)) for model, seed in columns]
        rows.append([f"{lr:g}", *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    headers = ["learning rate", *(f"{model}, seed {seed}" for model, seed in columns)]
    return Table("Bits per byte on the tuning files", headers, rows)


def main() -> int:
    """The command. Returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m attamba.demo.tune", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="the scores")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    args = parser.parse_args()
    try:
        if args.jobs < 1:
            raise ConfigError(f"--jobs={args.jobs} must be at least 1")
        record = tune(DemoSettings(steps=STEPS), args.json, jobs=args.jobs)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{table(record).markdown()}\n")
    for model, lr in record["chosen"].items():
        print(f"{model}: {lr:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
