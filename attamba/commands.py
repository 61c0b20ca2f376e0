"""What the commands of attamba.cli do. Each takes its arguments and returns an exit status."""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba.config import ConfigError, RunConfig, load_run_config, parse_overrides
from attamba.data import (
    DataError,
    Document,
    TokenDataset,
    TokenizedDocument,
    Tokenizer,
    is_prepared,
    load_tokenizer,
    prepare,
    read_documents,
    train_bpe,
)
from attamba.data.files import write_json
from attamba.data.workers import usable_cores
from attamba.display import columns, format_bytes

if TYPE_CHECKING:
    from attamba.dial import SweepRow
    from attamba.evaluate import EvalResult
    from attamba.generation import GenerationStats
    from attamba.models import Decoder


def train(args: argparse.Namespace) -> int:
    """`attamba train [CONFIG] [key=value ...]`."""
    from attamba.train import train

    files = [word for word in args.overrides if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"{' and '.join(files)}: give one CONFIG file at most")
    overrides = [word for word in args.overrides if "=" in word]
    result = train(load_run_config(files[0] if files else None, overrides), resume=args.resume)
    if result.is_main:
        told = f"{result.run_dir}: {result.step} steps are done; "
        print(f"{told}score it: attamba eval {result.run_dir}")
    return 0


def follow(args: argparse.Namespace) -> int:
    """`attamba follow RUN`."""
    from attamba.train.follow import follow

    failures = follow(
        args.run,
        device=args.device,
        batch_size=args.batch_size,
        idle=args.idle,
        no_more=_stdin_closed if args.until_eof else None,
        say=lambda text: print(text, flush=True),
    )
    return 1 if failures else 0


def _stdin_closed() -> bool:
    """Has the other end of standard input been closed?"""
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


# --------------------------------------------------------------------------------------------
# eval
# --------------------------------------------------------------------------------------------


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
    folder, config, model, tokenizer = _load(args)
    documents = _documents(args, folder, config, tokenizer)
    options: dict[str, Any] = {
        "context": _context(args.context, config.data.seq_len),
        "stride": args.stride,
        "batch_size": args.batch_size,
        "max_tokens": args.max_tokens,
    }
    record: dict[str, Any] = {
        "checkpoint": str(folder),
        "overrides": args.overrides,
        "data": args.data or "held out by the run",
    }
    if args.sweep is None:
        result = evaluate(model, tokenizer, documents, progress=_counter("tokens"), **options)
        record["result"] = result.to_dict()
        print(_report(result))
    else:
        field, values = _sweep(args.sweep)
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
    folder, config, model, tokenizer = _load(args)
    context = _context(args.context, config.data.seq_len)
    assert context is not None
    lm = AttambaLM(model, tokenizer, context=context, batch_size=args.batch_size)
    results = run_tasks(lm, tasks, limit=args.limit)
    print(table(results))
    if args.json is not None:
        kept = ("results", "groups", "versions", "n-shot", "n-samples")
        record = {"checkpoint": str(folder), "overrides": args.overrides, "context": context}
        write_json(Path(args.json), record | {k: results[k] for k in kept if k in results})
    return 0


def _make_folder(path: Path) -> None:
    """The folder of --json: one that cannot be shows now, not after the scoring."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--json={path}: {error.strerror}; name another file") from error


def _context(text: str | None, default: int) -> int | None:
    if text is None:
        return default
    if text == "all":
        return None
    if not text.isdigit():
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


def _sweep(text: str) -> tuple[str, list[Any]]:
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


# --------------------------------------------------------------------------------------------
# generate
# --------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    """`attamba generate CKPT [key=value ...]`."""
    from attamba.generation import GenerationStats, stream

    prompts = _prompts(args)
    _, _, model, tokenizer = _load(args)
    stats = GenerationStats()
    steps = stream(
        model,
        # As in training, the separator begins a document.
        [[tokenizer.eos_id, *tokenizer.encode(prompt)] for prompt in prompts],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
        tokenizer=tokenizer,
        stats=stats,
    )
    texts = list(prompts)
    alone = len(prompts) == 1
    if alone:
        print(prompts[0], end="", flush=True)
    with closing(steps):
        for step in steps:
            texts = [text + new for text, new in zip(texts, step.text)]
            if alone and step.text[0]:
                print(step.text[0], end="", flush=True)
    if alone:
        print()
    else:
        for number, text in enumerate(texts, start=1):
            print(f"--- {number} of {len(texts)} ---\n{text}")
    sys.stdout.flush()
    print(_speed(stats), file=sys.stderr)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        # Bytes that are no text come from the command line as lone surrogates.
        raw = [prompt.encode("utf-8", "surrogateescape") for prompt in args.prompt]
        return [_decoded(prompt, "--prompt") for prompt in raw]
    if args.prompt_file is not None:
        data, source = Path(args.prompt_file).read_bytes(), args.prompt_file
    elif sys.stdin.isatty():
        raise ConfigError(
            "there is no prompt: give --prompt TEXT or --prompt-file FILE, or pipe it in"
        )
    else:
        data, source = sys.stdin.buffer.read(), "standard input"
    # Files and echo end with a newline that is not meant.
    return [_decoded(data, source).removesuffix("\n")]


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text: {error}; convert it") from error


def _speed(stats: GenerationStats) -> str:
    return (
        f"{stats.new_tokens:,} tokens, {stats.tokens_per_second:,.1f} tokens/s after "
        f"{stats.prefill_seconds:.2f} s for a prompt of {stats.prompt_tokens:,}; cache "
        f"{format_bytes(stats.cache_bytes_used)} used, "
        f"{format_bytes(stats.cache_bytes_allocated)} allocated"
    )


# --------------------------------------------------------------------------------------------
# export, import, consolidate, serve
# --------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> int:
    """`attamba export CKPT DIR`."""
    _need_transformers()
    from attamba.hf.export import export

    out = export(
        args.checkpoint,
        args.out,
        evals=args.eval,
        max_shard_size=args.max_shard_size,
        remote_code=args.trust_remote_code,
    )
    how = "with trust_remote_code=True" if args.trust_remote_code else "after `import attamba.hf`"
    print(f"{out}: ready for AutoModelForCausalLM.from_pretrained, {how}")
    return 0


def import_folder(args: argparse.Namespace) -> int:
    """`attamba import DIR OUT`."""
    _need_transformers()
    from attamba.hf.export import import_folder

    checkpoint = import_folder(args.folder, args.out, tokenizer=args.tokenizer)
    print(f"{checkpoint}: try it: attamba generate {args.out}")
    return 0


def consolidate(args: argparse.Namespace) -> int:
    """`attamba consolidate CKPT OUT`."""
    from attamba.train.checkpoint import consolidate

    checkpoint = consolidate(args.checkpoint, args.out)
    print(f"{checkpoint}: weights in one file; try it: attamba generate {args.out}")
    return 0


def serve(args: argparse.Namespace) -> int:
    """`attamba serve CKPT`."""
    _need_transformers()
    from attamba.serve import serve

    return serve(args.checkpoint, host=args.host, port=args.port)


def _need_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers is not installed; it comes with: pip install 'attamba[hf]'")


# --------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------


def data_prepare(args: argparse.Namespace) -> int:
    """`attamba data prepare OUT SOURCES...`."""
    count = _counter("tokens")
    dataset = prepare(
        args.paths,
        args.out,
        load_tokenizer(args.tokenizer),
        split_on=args.split_on,
        text_key=args.text_key,
        shard_tokens=args.shard_tokens,
        max_tokens=args.max_tokens,
        skip_bad=args.skip_bad,
        workers=usable_cores() if args.workers is None else args.workers,
        progress=lambda documents, tokens, size: count(tokens),
    )
    bad = dataset.manifest["n_bad"]
    print(
        f"{args.out}: {dataset.n_documents:,} documents, {dataset.n_tokens:,} tokens, "
        f"{dataset.n_bytes:,} bytes, vocabulary {dataset.vocab_size:,}"
        + (f"; {bad:,} records that are no text were passed over" if bad else "")
    )
    return 0


def data_verify(args: argparse.Namespace) -> int:
    """`attamba data verify DIR`."""
    dataset = TokenDataset.open(args.folder)
    dataset.verify(_counter("bytes"))
    n_bytes = sum(entry["bytes"] for entry in dataset.manifest["files"].values())
    print(
        f"{args.folder}: {len(dataset.manifest['files']):,} files, {n_bytes:,} bytes, all as they "
        f"were written"
    )
    return 0


def data_tokenizer(args: argparse.Namespace) -> int:
    """`attamba data tokenizer OUT PATHS... --vocab-size N`."""
    tokenizer = train_bpe(
        args.paths, args.vocab_size, args.out, split_on=args.split_on, text_key=args.text_key
    )
    fewer = tokenizer.vocab_size < args.vocab_size
    asked = f", fewer than --vocab-size={args.vocab_size:,}: the text yields no more"
    print(f"{args.out}: a BPE of {tokenizer.vocab_size:,} tokens{asked if fewer else ''}")
    return 0


# --------------------------------------------------------------------------------------------
# Shared
# --------------------------------------------------------------------------------------------


def _load(args: argparse.Namespace) -> tuple[Path, RunConfig, Decoder, Tokenizer]:
    """The checkpoint's folder, the configuration it was trained with, its model and tokenizer."""
    from attamba.train import find_checkpoint, load
    from attamba.train.checkpoint import read_config

    folder = find_checkpoint(args.checkpoint)
    overrides = parse_overrides(args.overrides) if args.overrides else None
    model, tokenizer = load(folder, overrides=overrides, device=args.device, dtype=args.dtype)
    return folder, read_config(folder), model, tokenizer


def _counter(what: str) -> Callable[[int], None]:
    """Shows a growing count on standard error where that is a terminal; nothing elsewhere."""

    def show(count: int) -> None:
        if sys.stderr.isatty():
            # The cursor goes back, so that what is printed next takes the line.
            print(f"{count:,} {what}\r", end="", file=sys.stderr, flush=True)

    return show
