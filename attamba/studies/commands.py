"""Arguments of `attamba study`; what the commands do is imported when one is run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from attamba.config import ConfigError

RECIPES, RESULTS, RUNS = Path("studies"), Path("studies/results"), Path("runs/studies")
TINY_RESULTS = RUNS / "tiny" / "results"
RESERVE, RESERVED_SHARE = 20.0, 0.1
"""Seconds, or share, of a time limit that is kept for writing a checkpoint."""
FAILED = 1
"""Exit status where a run could not be."""

Leaf = Callable[..., argparse.ArgumentParser]


def add_commands(commands: argparse._SubParsersAction, leaf: Leaf) -> None:
    """Add run, list, report, solve, attention and prepare to `commands`. leaf: attamba.cli's."""
    _run(leaf(commands, "run", "train and score the runs of a study", run))
    _list(leaf(commands, "list", "studies, or the runs of one, and what is done", show))
    _report(leaf(commands, "report", "tables and plots from result files", report))
    _solve(leaf(commands, "solve", "transformers that cost what an Attamba costs", solve))
    _attention(leaf(commands, "attention", "pictures of a checkpoint's attention", attention))
    _prepare(leaf(commands, "prepare", "tokenizer and texts of the studies", prepare))


# --------------------------------------------------------------------------------------------
# run, list
# --------------------------------------------------------------------------------------------


def _study(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", choices=("tiny", "full"), default="full", help="default: full")
    parser.add_argument(
        "--only", metavar="GLOB", help="variants or runs whose names match: 'transformer*', '*-s0'"
    )
    _folders(parser)


def _folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipes", type=Path, default=RECIPES, metavar="DIR", help=f"default: {RECIPES}"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help=f"of result files (default: {RESULTS}; at tiny scale {TINY_RESULTS})",
    )


def _results(args: argparse.Namespace) -> Path:
    return args.results or (TINY_RESULTS if args.scale == "tiny" else RESULTS)


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help="a study, or a recipe file")
    _study(parser)
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="prepared texts (default: data/study)"
    )
    parser.add_argument(
        "--out", type=Path, default=RUNS, metavar="DIR", help=f"of run folders (default: {RUNS})"
    )
    parser.add_argument("--device", help="auto, cpu, cuda, ... (default: the recipe's)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="save and stop by then; the same command goes on",
    )


def run(args: argparse.Namespace) -> int:
    """`attamba study run NAME ...`: the studies' runs, one after the other, `--jobs` at a time."""
    for name, value in (("--jobs", args.jobs), ("--time-limit", args.time_limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    limit = args.time_limit
    deadline = None if limit is None else time.time() + limit
    reserve = 0.0 if limit is None else min(RESERVE, RESERVED_SHARE * limit)
    from attamba.studies.data import DATA, tiny_texts
    from attamba.studies.engine import Place
    from attamba.studies.jobs import run_all
    from attamba.studies.recipe import chosen_runs, find_study

    studies = [find_study(name, args.recipes) for name in args.names]
    runs = chosen_runs(studies, args.scale, args.only)
    data = args.data or DATA
    if args.data is None and args.scale == "tiny":
        data = args.out / "tiny" / "data"
        if any(run.tree["data"]["generate"] is None for run in runs):
            tiny_texts(data)
    place = Place(data, args.out, _results(args), args.device, deadline, reserve)
    outcomes = run_all(runs, place, jobs=args.jobs, say=lambda text: print(text, flush=True))
    counts = [sum(o.status == status for o in outcomes) for status in ("done", "there", "failed")]
    names = ", ".join(study.name for study in studies)
    print(
        f"{names} at {args.scale} scale: {counts[0] + counts[1]} of {len(runs)} runs are done "
        f"({counts[0]} now), {counts[2]} failed; results in {_results(args)}"
    )
    return FAILED if counts[2] else 0


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a study, or a recipe file")
    _study(parser)
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="write the recipe, base included, for NAME.json"
    )


def show(args: argparse.Namespace) -> int:
    """`attamba study list [NAME]`."""
    from attamba.studies.recipe import chosen_runs, find_study, save_json
    from attamba.studies.show import run_lines, study_lines

    if args.name is None:
        if args.json is not None:
            raise ConfigError(f"--json={args.json} writes one recipe; name a study")
        print("\n".join(study_lines(args.recipes, args.scale, _results(args))))
        return 0
    study = find_study(args.name, args.recipes)
    if args.json is not None:
        save_json(study, args.json)
    runs = chosen_runs([study], args.scale, args.only)
    print("\n".join(run_lines(study, runs, _results(args))))
    return 0


# --------------------------------------------------------------------------------------------
# report, solve
# --------------------------------------------------------------------------------------------


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", choices=("paper", "main", "ablations", "memory"))
    parser.add_argument("--scale", choices=("tiny", "full"), default="full", help="default: full")
    _folders(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="of tables and plots (default: studies/report; at tiny scale beside the results)",
    )


def report(args: argparse.Namespace) -> int:
    """`attamba study report GROUP`."""
    from attamba.studies.report import write_report

    out = args.out or (
        TINY_RESULTS.parent / "report" if args.scale == "tiny" else RECIPES / "report"
    )
    for path in write_report(args.group, args.recipes, _results(args), out, args.scale):
        print(path)
    return 0


def _solve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file with an attamba mixer")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="keys that differ from it: mixer.chunk_size=4",
    )
    parser.add_argument(
        "--match",
        choices=("kv", "flops", "params"),
        help="what is to be equal (default: each of them)",
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="T", help="tokens to count at (default: data.seq_len)"
    )


def solve(args: argparse.Namespace) -> int:
    """`attamba study solve CONFIG`."""
    from attamba.config import load_run_config
    from attamba.studies.solver import MATCHES, table

    config = load_run_config(args.config, args.overrides)
    if args.seq_len is not None and args.seq_len < 1:
        raise ConfigError(f"--seq-len={args.seq_len} must be at least 1")
    matches = MATCHES if args.match is None else (args.match,)
    print(table(config.model, args.seq_len or config.data.seq_len, matches))
    return 0


# --------------------------------------------------------------------------------------------
# attention, prepare
# --------------------------------------------------------------------------------------------


def _attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a run folder or a checkpoint folder")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="what it reads")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the pictures")
    parser.add_argument(
        "--tokens", type=int, default=128, help="of the text, from its begin (default: 128)"
    )
    parser.add_argument("--device", default="cpu", help="default: cpu")


def attention(args: argparse.Namespace) -> int:
    """`attamba study attention CKPT`."""
    if args.tokens < 2:
        raise ConfigError(f"--tokens={args.tokens} must be at least 2")
    from attamba.studies.pictures import draw_attention

    text = args.text.read_text(encoding="utf-8")
    for path in draw_attention(args.checkpoint, text, args.out, args.tokens, device=args.device):
        print(path)
    return 0


def _prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", required=True, metavar="PATH", help="training text")
    parser.add_argument("--valid", required=True, metavar="PATH", help="other text, to score on")
    parser.add_argument("--wikitext", metavar="PATH", help="WikiText-2 raw, the test set")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: data/study")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="default: 32000")
    parser.add_argument(
        "--documents", type=int, metavar="N", help="of the training text, the first (default: all)"
    )


def prepare(args: argparse.Namespace) -> int:
    """`attamba study prepare`."""
    if args.documents is not None and args.documents < 1:
        raise ConfigError(f"--documents={args.documents} must be at least 1")
    from attamba.studies.data import DATA, prepare_texts

    prepare_texts(
        args.out or DATA,
        args.train,
        args.valid,
        args.wikitext,
        vocab_size=args.vocab_size,
        documents=args.documents,
    )
    return 0
