"""`attamba bench loop`: training as `attamba train` does it, against a bare step.

The loop runs with all it has: rows read from a prepared folder, documents apart, metrics to JSON
lines and TensorBoard, statistics of layers, steps that jump left out; on a GPU bfloat16 and
compiled. The bare step is forward, backward, clipping and AdamW of the same model on the same rows,
which lie on the device, launched as the loop launches its own (train.cuda_graphs). Both live in one
process and take the same steps in turns, the bare one from where the loop was before its own.
Statistics of layers are timed as often as `--layers-every` says.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from attamba.bench import common
from attamba.config import ConfigError, RunConfig, load_run_config
from attamba.display import format_bytes

if TYPE_CHECKING:
    import torch

    from attamba.bench.bare import BareStep
    from attamba.data import Batch
    from attamba.train.loop import Loop

PHASES = ("data", "forward", "backward", "optimizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `attamba bench loop`."""
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="CONFIG key=value",
        help="YAML files of runs, one after the other, then keys that differ from all of them",
    )
    parser.add_argument(
        "--lengths", default="2k,16k", help="tokens of a row, comma-separated (default: 2k,16k)"
    )
    parser.add_argument("--tokens", default="64k", help="tokens of a step (default: 64k)")
    parser.add_argument("--pass-tokens", default="32k", help="of a forward pass (default: 32k)")
    parser.add_argument(
        "--steps",
        type=int,
        default=100,
        help="timed, of each, rounded up to whole --layers-every (default: 100)",
    )
    parser.add_argument(
        "--layers-every", type=int, default=100, help="metrics.layers_every (default: 100)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write --json. Returns the exit status."""
    paths = [word for word in args.overrides if "=" not in word]
    overrides = [word for word in args.overrides if "=" in word]
    if not paths:
        raise ConfigError("name a CONFIG at least: configs/paper/attamba-p8.yaml")
    lengths = common.parse_lengths(args.lengths)
    configs = [
        (Path(path).stem, length, _config(path, overrides, length, args))
        for path in paths
        for length in lengths
    ]
    device = common.set_up(args.device, args.threads)
    record: dict[str, Any] = {
        "benchmark": "loop",
        "settings": {
            "tokens_per_step": common.parse_lengths(args.tokens)[0],
            "tokens_per_pass": common.parse_lengths(args.pass_tokens)[0],
            "steps": args.steps,
            "layers_every": args.layers_every,
        },
        "environment": common.environment(device),
        "rows": [],
    }
    for name, length, config in configs:
        print(f"loop: {name}, {length} tokens a row ...", flush=True)
        row = {"config": name, "length": length, "batch_size": config.data.batch_size}
        record["rows"].append(row | measure(config, device, args.steps))
        common.save(args.json, record)
    for table in tables(record):
        print(f"\n{table}")
    common.save(args.json, record)
    return 0


def _config(path: str, overrides: list[str], length: int, args: argparse.Namespace) -> RunConfig:
    """The run at `path` with rows of this length, and all that the loop can do."""
    tokens, part = (common.parse_lengths(text)[0] for text in (args.tokens, args.pass_tokens))
    rows = max(1, tokens // length)
    sinks = ["jsonl"]
    if importlib.util.find_spec("tensorboard") is not None:
        sinks.append("tensorboard")
    keys: dict[str, Any] = {
        "data.seq_len": length,
        "data.batch_size": rows,
        "data.valid_fraction": 0,
        "train.accumulate": -(-rows // max(1, part // length)),
        "train.steps": 10**9,
        "train.eval_every": 0,
        "train.save_every": 0,
        "train.progress": "false",
        "metrics.sinks": f"[{','.join(sinks)}]",
        "metrics.layers_every": args.layers_every,
        "spikes.threshold": 10,
    }
    return load_run_config(path, [*(f"{key}={value}" for key, value in keys.items()), *overrides])


def measure(config: RunConfig, device: torch.device, steps: int) -> dict[str, Any]:
    """Figures of one row; `config` gets the device, and a folder and a text for the time being."""
    import torch

    from attamba.bench.bare import BareStep, write_text
    from attamba.models.accounting import n_parameters
    from attamba.train.loop import open_loop

    on_cuda = device.type == "cuda"
    config.train.device = str(device)
    if on_cuda:
        config.train.dtype, config.train.compile = "bfloat16", True
        torch.cuda.reset_peak_memory_stats(device)
    turn = config.train.log_every
    period = math.lcm(turn, config.metrics.layers_every or 1)
    with TemporaryDirectory() as folder:
        config.out, config.data.train = f"{folder}/run", write_text(folder, config)
        held = torch.cuda.memory_allocated(device) if on_cuda else 0
        with open_loop(config) as loop:
            loop.run.step = period - turn  # statistics of layers too compile what they launch
            _, batches = _turn_of_loop(loop, turn, device)
            peak = torch.cuda.max_memory_allocated(device) - held if on_cuda else None
            bare = BareStep(config, device)
            _turn_of_bare(bare, batches, device)
            loop.metrics.records.clear()
            taken: dict[str, list[float]] = {"loop": [], "bare": []}
            for _ in range(-(-steps // period) * (period // turn)):
                bare.copy(loop.run)
                spent, batches = _turn_of_loop(loop, turn, device)
                taken["loop"].append(spent)
                taken["bare"].append(_turn_of_bare(bare, batches, device))
            records = [r for r in loop.metrics.records if r["kind"] == "train"]
            n_layers_records = sum(r["kind"] == "layers" for r in loop.metrics.records)
    if on_cuda:
        torch.compiler.reset()
    figures = {"parameters": n_parameters(config.model), "dtype": config.train.dtype}
    figures |= {"compile": config.train.compile, "layers_records": n_layers_records}
    return figures | {"peak_bytes": peak} | _summed(taken, records)


def _turn_of_loop(loop: Loop, steps: int, device: torch.device) -> tuple[float, list[Batch]]:
    """Milliseconds of a step, the mean of so many; and their rows."""
    batches: list[Batch] = []

    def turn() -> None:
        for _ in range(steps):
            loop.step()
            assert loop.run.batch is not None
            batches.append(loop.run.batch)

    return common.seconds(turn, device) / steps * 1e3, batches


def _turn_of_bare(bare: BareStep, batches: list[Batch], device: torch.device) -> float:
    """Milliseconds of a step, the mean over the batches."""
    sent = [(bare.parts(batch), batch.n_scored) for batch in batches]

    def turn() -> None:
        for parts, scored in sent:
            bare(parts, scored)

    return common.seconds(turn, device) / len(sent) * 1e3


def _summed(taken: dict[str, list[float]], records: list[dict[str, Any]]) -> dict[str, Any]:
    """What turns and training's own records say."""
    spent = {name: statistics.fmean(times) for name, times in taken.items()}
    rates = [1 / r["tokens_per_second"] for r in records]
    mean = {f"{n}_share": statistics.fmean(r[f"{n}_share"] for r in records) for n in PHASES}
    known = [r["mfu"] for r in records if r["mfu"] is not None]
    plain = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "tokens_per_second": 1 / statistics.fmean(rates),
        "mfu": statistics.fmean(known) if known else None,
        **mean,
        "loop_ms": spent["loop"],
        "bare_ms": spent["bare"],
        "overhead": spent["loop"] / spent["bare"] - 1,
        "overhead_median": plain["loop"] / plain["bare"] - 1,
        "turns_ms": taken,
    }


def tables(record: dict[str, Any]) -> list[common.Table]:
    """A record that run() made, as tables: speed, and the loop against the bare step."""
    speeds, against = [], []
    for row in record["rows"]:
        name = f"{row['config']}, {row['batch_size']} x {row['length']:,}"
        mfu, peak = row["mfu"], row["peak_bytes"]
        speeds.append(
            [name, f"{row['parameters'] / 1e6:.1f} M", f"{row['tokens_per_second']:,.0f}"]
            + ["-" if mfu is None else f"{mfu:.1%}", "-" if peak is None else format_bytes(peak)]
            + [f"{row[f'{phase}_share']:.1%}" for phase in PHASES]
        )
        against.append(
            [name, *(f"{row[f'{step}_ms']:.2f} ms" for step in ("loop", "bare"))]
            + [f"{row[figure]:+.1%}" for figure in ("overhead", "overhead_median")]
        )
    speed = ["run", "parameters", "tokens/s", "MFU", "peak memory", *PHASES]
    loop = ["run", "loop's step", "bare step", "overhead", "of the median turn"]
    return [
        common.Table("training, and the share of each part in its time", speed, speeds),
        common.Table("training against a bare step", loop, against),
    ]
