"""`attamba eval`: text, sweeps and tasks of the harness."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba.commands.shared import counter, load_checkpoint
from attamba.config import ConfigError, RunConfig, override_model, parse_overrides
from attamba.data import (
    DataError,
    Document,
    TokenDataset,
    TokenizedDocument,
    Tokenizer,
    is_prepared,
    read_documents,
)
from attamba.data.files import write_json
from attamba.display import columns, format_bytes
from attamba.train.storage import weights_digest

if TYPE_CHECKING:
    from attamba.dial import SweepRow
    from attamba.evaluate import EvalResult


def evaluate(args: argparse.Namespace) -> int:
    """`attamba eval CKPT [key=value ...]`."""
    if args.tasks is not None:
        return _evaluate_tasks(args)
    if args.limit is not None:
        raise ConfigError(f"--limit={args.limit} is for --tasks; --max-tokens limits text")
    from attamba.dial import sweep
    from attamba.evaluate import evaluate

    if args.json is not None:
        _make_folder(Path(args.json))
    folder, config, model, tokenizer = load_checkpoint(args)
    documents = _documents(args, folder, config, tokenizer)
    options: dict[str, Any] = {
        "context": _context(args.context, config.data.seq_len),
        "stride": args.stride,
        "batch_size": args.batch_size,
        "max_tokens": args.max_tokens,
    }
    record: dict[str, Any] = {
        "checkpoint": str(folder),
        "weights": weights_digest(folder),
        "overrides": args.overrides,
        "data": args.data or "held out by the run",
        "max_tokens": args.max_tokens,
        "dtype": args.dtype,
    }
    if args.sweep is None:
        result = evaluate(model, tokenizer, documents, progress=counter("tokens"), **options)
        record["result"] = result.to_dict()
        print(_report(result))
    else:
        field, values = parse_sweep(args.sweep)
        for value in values:  # before anything is scored
            override_model(model.config, {field: value})
        print(_sweep_line(field, "perplexity", "bits per byte", "cache", "after"))
        rows = sweep(model, tokenizer, documents, field, values, on_row=_print_row, **options)
        record |= {"field": field, **options, "rows": [row.to_dict() for row in rows]}
    if args.json is not None:
        write_json(Path(args.json), record)
    return 0


def _evaluate_tasks(args: argparse.Namespace) -> int:
    """`attamba eval CKPT --tasks NAME,...`."""
    for name in ("data", "split_on", "text_key", "stride", "max_tokens", "sweep"):
        if getattr(args, name) != args.parser.get_default(name):
            raise ConfigError(
                f"--{name.replace('_', '-')} does not go with --tasks, whose text and windows are "
                f"the tasks'; leave it out"
            )
    if args.context == "all":
        raise ConfigError("--context=all does not go with --tasks; give a number of tokens")
    from attamba.harness import AttambaLM, load_tasks, run_tasks, table

    tasks = load_tasks(args.tasks.split(","))
    if args.json is not None:
        _make_folder(Path(args.json))
    folder, config, model, tokenizer = load_checkpoint(args)
    context = _context(args.context, config.data.seq_len)
    assert context is not None
    lm = AttambaLM(model, tokenizer, context=context, batch_size=args.batch_size)
    results = run_tasks(lm, tasks, limit=args.limit)
    print(table(results))
    if args.json is not None:
        kept = ("results", "groups", "versions", "n-shot", "n-samples")
        record = {
            "checkpoint": str(folder),
            "weights": weights_digest(folder),
            "overrides": args.overrides,
            "context": context,
        }
        write_json(Path(args.json), record | {k: results[k] for k in kept if k in results})
    return 0


def _make_folder(path: Path) -> None:
    """The folder of --json: one that cannot be shows now, not after the scoring."""
    if path.is_dir():
        raise ConfigError(f"--json={path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--json={path}: {error.strerror}; name another file") from error


def _context(text: str | None, default: int) -> int | None:
    if text is None:
        return default
    if text == "all":
        return None
    if not text.isdecimal():
        raise ConfigError(f"--context={text} must be a number of tokens, or all")
    return int(text)


def _report(result: EvalResult) -> str:
    context = (
        "whole documents as one context"
        if result.context is None
        else f"context {result.context:,}, stride {result.stride:,}"
    )
    scores = [
        ["nats per token", f"{result.nats_per_token:.4f}"],
        ["perplexity per token", f"{result.perplexity:.4f}"],
        ["perplexity per word", f"{result.word_perplexity:.4g}"],
        ["bits per byte", f"{result.bits_per_byte:.4f}"],
    ]
    positions = [["position in document", "tokens", "nats per token"]]
    for bucket in result.by_position:
        name = f"{bucket.start:,} to {bucket.stop - 1:,}"
        positions.append([name, f"{bucket.n:,}", f"{bucket.nats:.4f}"])
    counts = (
        f"{result.n_documents:,} documents, {result.n_tokens:,} tokens, {result.n_words:,} words, "
        f"{result.n_bytes:,} bytes; {context}"
    )
    return f"{counts}\n\n{columns(scores)}\n\n{columns(positions)}"


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """ "chunk_size=1,2" -> ("mixer.chunk_size", [1, 2])."""
    field, equals, values = text.partition("=")
    if not equals or not field or not values:
        raise ConfigError(f"--sweep {text!r} is not of the form FIELD=A,B,... (chunk_size=1,2,4)")
    parsed = [parse_overrides([f"{field}={value}"])[field] for value in values.split(",")]
    return field if "." in field else f"mixer.{field}", parsed


def _sweep_line(*cells: str) -> str:
    return f"{cells[0]:<24}" + "".join(f"{cell:>16}" for cell in cells[1:])


def _print_row(row: SweepRow) -> None:
    cells = (f"{row.perplexity:.4f}", f"{row.bits_per_byte:.4f}", format_bytes(row.cache_bytes))
    print(_sweep_line(str(row.value), *cells, f"{row.cache_tokens:,} tokens"), flush=True)


def _documents(
    args: argparse.Namespace, folder: Path, config: RunConfig, tokenizer: Tokenizer
) -> Iterable[Document | TokenizedDocument]:
    """What --data names, or what the run held out."""
    from attamba.evaluate import held_out_documents

    ready = [path for path in args.data or () if is_prepared(path)]
    if args.data and not ready:
        return read_documents(args.data, split_on=args.split_on, text_key=args.text_key)
    if args.split_on is not None:
        raise ConfigError(
            f"--split-on={args.split_on} splits text, and these are prepared documents; leave it "
            f"out, or give the text with --data PATH"
        )
    if ready:
        if len(args.data) > 1:
            raise ConfigError(f"--data: {ready[0]} is a prepared folder, which must be given alone")
        return _open(ready[0], tokenizer).documents()
    run_dir = folder.resolve().parent.parent
    if config.data.generate is not None:
        raise ConfigError(
            f"{run_dir} was trained on rows of its own making (data.generate), not on text; give "
            f"--data PATH"
        )
    if config.data.valid:
        return _prepared(config.data.valid, run_dir / "data" / "valid", tokenizer).documents()
    if config.data.valid_fraction == 0:
        raise ConfigError(f"{run_dir} held out no text (data.valid_fraction=0); give --data PATH")
    names = [f"source-{i}" for i in range(len(config.data.sources))] or ["train"]
    datasets = [
        _prepared(path, run_dir / "data" / name, tokenizer)
        for path, name in zip(config.data.training_paths(), names)
    ]
    start = 1.0 - config.data.valid_fraction
    return chain.from_iterable(held_out_documents(d, tokenizer, start) for d in datasets)


def _prepared(given: str | list[str], of_run: Path, tokenizer: Tokenizer) -> TokenDataset:
    """The prepared folder that a run used: the one it was given, or the one it made."""
    if isinstance(given, str) and is_prepared(given):
        return _open(given, tokenizer)
    if is_prepared(of_run):
        return _open(of_run, tokenizer)
    raise DataError(f"the run's data are neither in {given} nor in {of_run}; give --data PATH")


def _open(path: str | Path, tokenizer: Tokenizer) -> TokenDataset:
    dataset = TokenDataset.open(path)
    if dataset.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"tokenizer and checkpoint do not match: {path} was prepared with another tokenizer "
            f"than the checkpoint's; give the text itself, or prepare it with that tokenizer"
        )
    return dataset
