"""`python -m attamba.bench.report RESULT.json ...`: benchmark results as Markdown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from attamba.bench import common, data, decode, hf, kernels, loop, train, tune


def markdown(record: dict[str, Any]) -> str:
    """The settings, tables and environment of a result file."""
    machine = record["environment"]
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    blocks = [f"### {record['benchmark']}: {settings}"]
    blocks += [table.markdown() for table in tables(record)]
    if "growth" in record:
        blocks += [f"- {line}" for line in train.growth_lines(record)]
    blocks.append(
        f"`{_typed(machine['command'])}` on {machine['date'][:10]}: {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}."
    )
    return "\n\n".join(blocks)


def tables(record: dict[str, Any]) -> list[common.Table]:
    """The tables of a result file, as the benchmark that wrote it prints them."""
    if record["benchmark"] == "train_gpu":
        from attamba.bench import train_gpu  # needs torch

        return train_gpu.tables(record)
    own = {
        "data": data,
        "decode": decode,
        "hf": hf,
        "kernels": kernels,
        "loop": loop,
        "train": train,
        "tune": tune,
    }
    return own[record["benchmark"]].tables(record)


def _typed(command: str) -> str:
    """A recorded command line as it can be typed: `python -m attamba` is recorded by its file."""
    return command.replace("__main__.py", "python -m attamba", 1)


def main() -> None:
    """Print the result files named on the command line."""
    parser = argparse.ArgumentParser(description="print benchmark results as Markdown")
    parser.add_argument("results", nargs="+", type=Path, help="files that --json wrote")
    for path in parser.parse_args().results:
        print(markdown(json.loads(path.read_text(encoding="utf-8"))) + "\n")


if __name__ == "__main__":
    main()
