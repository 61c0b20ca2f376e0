"""What the commands of attamba.cli do. Each takes its arguments and returns an exit status."""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from attamba.commands.evaluation import evaluate
from attamba.commands.shared import counter, load_checkpoint
from attamba.config import ConfigError, load_run_config
from attamba.data import DataError, TokenDataset, load_tokenizer, prepare, train_bpe
from attamba.data.files import check_new_folder
from attamba.data.workers import usable_cores
from attamba.display import format_bytes

if TYPE_CHECKING:
    from attamba.generation import GenerationStats

__all__ = [
    "consolidate",
    "data_prepare",
    "data_tokenizer",
    "data_verify",
    "evaluate",
    "export",
    "follow",
    "generate",
    "import_folder",
    "serve",
    "train",
]


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


def generate(args: argparse.Namespace) -> int:
    """`attamba generate CKPT [key=value ...]`."""
    from attamba.generation import GenerationStats, stream

    prompts = _prompts(args)
    _, _, model, tokenizer = load_checkpoint(args)
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


def data_prepare(args: argparse.Namespace) -> int:
    """`attamba data prepare OUT SOURCES...`."""
    count = counter("tokens")
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
    dataset.verify(counter("bytes"))
    n_bytes = sum(entry["bytes"] for entry in dataset.manifest["files"].values())
    print(
        f"{args.folder}: {len(dataset.manifest['files']):,} files, {n_bytes:,} bytes, all as they "
        f"were written"
    )
    return 0


def data_tokenizer(args: argparse.Namespace) -> int:
    """`attamba data tokenizer OUT PATHS... --vocab-size N`."""
    check_new_folder(Path(args.out))  # data that were prepared with a tokenizer need just that one
    tokenizer = train_bpe(
        args.paths, args.vocab_size, args.out, split_on=args.split_on, text_key=args.text_key
    )
    fewer = tokenizer.vocab_size < args.vocab_size
    asked = f", fewer than --vocab-size={args.vocab_size:,}: the text yields no more"
    print(f"{args.out}: a BPE of {tokenizer.vocab_size:,} tokens{asked if fewer else ''}")
    return 0
