"""`attamba bench data`: MB/s of `attamba data prepare` against the package tokenizers alone.

Both have the same documents, vocabulary and cores. prepare starts processes, reads JSON lines,
counts bytes and words, and writes shards and checksums; tokenizers has the documents in memory and
throws the ids away. Beside the time there is the processors' time, on which other programs have
less influence.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attamba.bench import common
from attamba.config import ConfigError

METHODS = ("encode_batch", "encode_batch_fast")
"""Of tokenizers: with each token's place in the text, and without."""
TOGETHER = 1000
"""Documents that tokenizers is given at a time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `attamba bench data`."""
    parser.add_argument(
        "--text", metavar="PATH", help="files or a folder (default: Python's standard library)"
    )
    parser.add_argument(
        "--megabytes", type=float, default=64, help="of text, repeated if need be (default: 64)"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, help="of a BPE trained on it (default: 32000)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, cores (default: 2)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="measurements, taken in turns (default: 3)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write --json. Returns the exit status."""
    for name in ("megabytes", "workers", "repeats"):
        if getattr(args, name) <= 0:
            raise ConfigError(f"--{name}={getattr(args, name)} must be above 0")
    import torch

    with _cores(args.workers), tempfile.TemporaryDirectory() as folder:
        text, tokenizer = _make_text(args, Path(folder))
        row = measure(text, tokenizer, args.workers, args.repeats)
    record = {
        "benchmark": "data",
        "settings": {
            "megabytes": round(row["bytes"] / 1e6, 1),
            "documents": row["documents"],
            "vocab_size": args.vocab_size,
            "workers": args.workers,
            "repeats": args.repeats,
        },
        "environment": common.environment(torch.device("cpu")),
        "rows": [row],
    }
    for table in tables(record):
        print(table)
    common.save(args.json, record)
    return 0


@contextmanager
def _cores(n: int) -> Iterator[None]:
    """Only so many cores for this process and those that it starts, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:n])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _make_text(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Documents as JSON lines, and a tokenizer trained on them."""
    from attamba.data import read_documents, train_bpe

    if args.text is None:
        from attamba.demo.corpus import stdlib_files

        texts = [path.read_text(encoding="utf-8") for path in stdlib_files()[0]]
    else:
        texts = [document.text for document in read_documents(args.text)]
    (folder / "once").mkdir()
    for i, text in enumerate(texts):
        (folder / "once" / f"{i:06d}.txt").write_text(text, encoding="utf-8")
    train_bpe(folder / "once", args.vocab_size, folder / "tokenizer.json")
    left = args.megabytes * 1e6
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for text in itertools.cycle(texts):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            left -= len(text.encode())
            if left <= 0:
                break
    return folder / "text.jsonl", folder / "tokenizer.json"


def measure(text: Path, tokenizer: Path, workers: int, repeats: int) -> dict[str, Any]:
    """Median MB/s of each, and the ratios; 1 MB is 10^6 bytes of text as UTF-8."""
    seconds: dict[str, list[float]] = {name: [] for name in ("prepare", *METHODS)}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in seconds}
    size: dict[str, int] = {}
    for _ in range(repeats):
        *taken, size = _prepare(text, tokenizer, workers)
        for times, own in zip((seconds, cpu_seconds), taken):
            times["prepare"].append(own)
        for method in METHODS:
            plain = _tokenizers(text, tokenizer, workers, method)
            for times, its in zip((seconds, cpu_seconds), plain):
                times[method].append(its)
    row: dict[str, Any] = {**size, "seconds": seconds, "cpu_seconds": cpu_seconds}
    for name, values in seconds.items():
        row[f"{name}_mb_per_second"] = size["bytes"] / 1e6 / statistics.median(values)
    for method in METHODS:
        row[f"of_{method}"] = _ratio(seconds, method)
        row[f"cpu_of_{method}"] = _ratio(cpu_seconds, method)
    return row


def _ratio(taken: dict[str, list[float]], method: str) -> float:
    """Median over the turns: what slows the machine for a while slows all three."""
    return statistics.median(plain / own for own, plain in zip(taken["prepare"], taken[method]))


def _prepare(text: Path, tokenizer: Path, workers: int) -> tuple[float, float, dict[str, int]]:
    """Seconds, seconds of the processors, and how much there was."""
    from attamba.data import load_tokenizer, prepare

    begin, cpu_begin = time.perf_counter(), _cpu_seconds()
    dataset = prepare(text, text.with_name("prepared"), load_tokenizer(tokenizer), workers=workers)
    seconds, cpu_seconds = time.perf_counter() - begin, _cpu_seconds() - cpu_begin
    return (
        seconds,
        cpu_seconds,
        {
            "documents": dataset.n_documents,
            "bytes": dataset.n_bytes,
            "tokens": dataset.n_tokens,
        },
    )


def _cpu_seconds() -> float:
    """Of this process, its threads and the processes that it started and that have ended."""
    return sum(os.times()[:4])


PLAIN = """
import json, sys, time
import tokenizers
path, tokenizer, method, together = sys.argv[1:]
encode = getattr(tokenizers.Tokenizer.from_file(tokenizer), method)
texts = [json.loads(line)["text"] for line in open(path, encoding="utf-8")]
begin, cpu_begin = time.perf_counter(), time.process_time()
for i in range(0, len(texts), int(together)):
    encode(texts[i : i + int(together)], add_special_tokens=False)
print(time.perf_counter() - begin, time.process_time() - cpu_begin)
"""


def _tokenizers(text: Path, tokenizer: Path, threads: int, method: str) -> list[float]:
    """Seconds of tokenizers, and seconds of the processors that it takes.

    In a process of its own, which has so many threads from its start.
    """
    environment = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", PLAIN, str(text), str(tokenizer), method, str(TOGETHER)]
    answer = subprocess.run(
        command, env=os.environ | environment, check=True, capture_output=True, text=True
    )
    return [float(word) for word in answer.stdout.split()]


def tables(record: dict[str, Any]) -> list[common.Table]:
    """A record that run() made, as a table."""
    cells = []
    for row in record["rows"]:
        for name in ("prepare", *METHODS):
            label = "attamba data prepare" if name == "prepare" else f"tokenizers, {name}"
            times, cpu = row["seconds"][name], row["cpu_seconds"][name]
            shares = [f"{row[of + name]:.0%}" for of in ("of_", "cpu_of_") if name in METHODS]
            cells.append(
                [
                    label,
                    f"{row[f'{name}_mb_per_second']:.2f} MB/s",
                    f"{min(times):.1f} to {max(times):.1f} s",
                    f"{statistics.median(cpu):.1f} s",
                    *(shares or ["", ""]),
                ]
            )
    head = ["", "text", "time", "of the processors", "prepare's speed, of this", "by processors"]
    return [common.Table("tokenizing documents on the same cores", head, cells)]
