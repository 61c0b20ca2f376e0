"""`attamba demo`: train Attamba and a transformer of its size, compare them, write a report.

    OUT/settings.json    what is done; decides when the demo goes on after an interruption
    OUT/data/            the text, prepared
    OUT/attamba, OUT/transformer    the runs, as `attamba train` writes them
    OUT/results.json     every figure
    OUT/report.html      the page

The same command goes on where it was stopped. After a finished demo it trains nothing again, but
measures and reports anew; delete OUT (or name another) to train from scratch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba.config import ConfigError
from attamba.demo.settings import MODELS, DemoSettings, fit_steps, run_config

if TYPE_CHECKING:
    from attamba.data import TokenDataset

Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `attamba demo`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="(default: runs/demo)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=5.0,
        help="time for everything; decides the steps (default: 5)",
    )
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of each model, instead of --minutes"
    )
    parser.add_argument("--seed", type=int, default=0, help="weights, order, samples (default: 0)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its table. Returns the exit status."""
    from attamba.bench.common import set_up

    if args.steps is not None and args.steps < 1:
        raise ConfigError(f"--steps={args.steps} must be at least 1")
    if not args.minutes > 0:
        raise ConfigError(f"--minutes={args.minutes} must be above 0")
    set_up("cpu", args.threads)
    settings = DemoSettings(seed=args.seed, steps=args.steps)
    demo(settings, args.out, minutes=args.minutes)
    return 0


def demo(
    settings: DemoSettings,
    out: Path,
    *,
    minutes: float = 5.0,
    corpus: Path | None = None,
    progress: bool = True,
    say: Say = print,
) -> dict[str, Any]:
    """The demo, on the CPU. Writes the files named above and returns the content of results.json.

    minutes: decides the steps where settings.steps is None. corpus: a folder of .py files instead
    of the standard library. Raises ConfigError if `out` holds a demo with other settings.
    """
    from attamba.data import load_tokenizer
    from attamba.data.files import write_json
    from attamba.demo import measure, report
    from attamba.plots import pyplot
    from attamba.train import train
    from attamba.train.checkpoint import load

    pyplot()  # a missing package shows now, not after minutes of training
    begin = time.perf_counter()
    settings = _settle(settings, out, minutes, say)
    trained_on, held_out = _prepare(out / "data", corpus)
    say(
        f"{trained_on.n_documents} files of Python's standard library to train on "
        f"({trained_on.n_bytes / 1e6:.1f} MB), {held_out.n_documents} held out"
    )
    models, curves = {}, {}
    for name in MODELS:
        say(f"Training {name}: {settings.steps} steps ...")
        config = run_config(settings, name, out, progress=progress)
        curves[name] = train(config).metrics
        models[name] = load(config.out)[0]
    results = {
        "settings": asdict(settings),
        "environment": _environment(),
        "data": {
            "train_bytes": trained_on.n_bytes,
            "train_files": trained_on.n_documents,
            "held_out_bytes": held_out.n_bytes,
            "held_out_files": held_out.n_documents,
        },
        "curves": curves,
        **measure.measure(models, load_tokenizer("bytes"), held_out, settings, say),
    }
    results["seconds"] = time.perf_counter() - begin
    write_json(out / "results.json", results)
    report.write_report(results, out / "report.html")
    _show(results, out, say)
    return results


def _settle(settings: DemoSettings, out: Path, minutes: float, say: Say) -> DemoSettings:
    """Settings with a number of steps: that of a demo begun in `out`, or as many as fit."""
    from attamba.data.files import write_json

    path = out / "settings.json"
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        wanted = replace(settings, steps=settings.steps or begun["steps"])
        differing = [
            f"{key}={now} (there: {begun.get(key)})"
            for key, now in json.loads(json.dumps(asdict(wanted))).items()
            if begun.get(key) != now
        ]
        if differing:
            raise ConfigError(
                f"--out={out} holds a demo with other settings: {', '.join(differing)}; delete "
                f"that folder, or name another with --out"
            )
        return wanted
    if settings.steps is None:
        say("Timing a few steps of both models ...")
        settings = replace(settings, steps=fit_steps(settings, minutes))
    write_json(path, asdict(settings))
    return settings


def _prepare(out: Path, corpus: Path | None) -> tuple[TokenDataset, TokenDataset]:
    """The text to train on and the held-out text as prepared folders below `out`."""
    from attamba.data import TokenDataset, is_prepared, load_tokenizer, prepare
    from attamba.demo.corpus import stdlib_files

    folders = out / "train", out / "held-out"
    if not all(map(is_prepared, folders)):
        for files, folder in zip(stdlib_files(corpus), folders):
            prepare(list(map(str, files)), folder, load_tokenizer("bytes"))
    return TokenDataset.open(folders[0]), TokenDataset.open(folders[1])


def _environment() -> dict[str, Any]:
    import torch

    from attamba.bench.common import environment

    return environment(torch.device("cpu"))


def _show(results: dict[str, Any], out: Path, say: Say) -> None:
    """The table, the samples, and where the report is."""
    from attamba.bench.common import Table
    from attamba.demo.measure import table

    headers, rows = table(results)
    title = f"Attamba (P={results['settings']['chunk_size']}) and a transformer of its size"
    say(f"\n{Table(title, headers, rows)}")
    for name, text in results["samples"].items():
        say(f"\n--- {name} writes ---\n{text.rstrip()}")
    say(f"\n{results['seconds'] / 60:.1f} minutes. Report: {out / 'report.html'}")
