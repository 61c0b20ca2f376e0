"""What the benchmarks share: the models, timing side by side, a table, a record of the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    import torch

HEAD_DIM = 64
MODELS = ("attamba", "transformer")
DTYPES = ("float32", "bfloat16")


def add_common_arguments(parser: argparse.ArgumentParser, lengths: str) -> None:
    """The options of every benchmark. `lengths`: default of --lengths, e.g. "1k,2k"."""
    parser.add_argument("--dim", type=int, default=512, help="model width (default: 512)")
    parser.add_argument("--chunk-size", type=int, default=8, help="Attamba's P (default: 8)")
    parser.add_argument(
        "--lengths", default=lengths, help=f"tokens, comma-separated (default: {lengths})"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of benchmarks of whole models; see fill_in."""
    parser.add_argument("--layers", type=int, default=8, help="layers (default: 8)")
    parser.add_argument("--batch-size", type=int, help="rows (default: 1)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of weights (default: bfloat16 on CUDA, else float32)"
    )


def fill_in(args: argparse.Namespace, device: torch.device) -> None:
    """--batch-size and --dtype where they were not given."""
    if args.batch_size is None:
        args.batch_size = 1
    if args.dtype is None:
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"


def parse_choices(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """ "a,b" -> ["a", "b"], each of them known. Raises ConfigError."""
    words = text.split(",")
    for word in words:
        if word not in known:
            raise ConfigError(f"{option}: {word!r} is none of {', '.join(known)}")
    return words


def parse_lengths(text: str) -> list[int]:
    """ "1k,2k,100" -> [1024, 2048, 100]; k stands for 1024. Raises ConfigError."""
    lengths = []
    for word in text.lower().split(","):
        digits, unit = (word[:-1], 1024) if word.endswith("k") else (word, 1)
        if not digits.isdigit() or int(digits) == 0:
            raise ConfigError(f"--lengths: {word!r} is not a number of tokens such as 512 or 4k")
        lengths.append(int(digits) * unit)
    return lengths


def n_heads(dim: int) -> int:
    """Heads of a benchmark's model: 64 wide, or one narrower head."""
    return max(1, dim // HEAD_DIM)


def mixer_config(name: str, dim: int, chunk_size: int) -> dict[str, Any]:
    """The mixer that a benchmark calls `name`, with heads of 64:

    transformer
    cyclic         Attamba's default
    head_cyclic    each head its own chunk ends
    shared_heads   about as many keys and values, in chunks of 2 and fewer heads, with a longer
                   window: what the studies found best
    """
    heads = n_heads(dim)
    if name == "transformer":
        return {"type": "transformer", "n_heads": heads}
    made = {"type": "attamba", "n_heads": heads, "chunk_size": chunk_size, "boundary": name}
    if name == "cyclic":
        return {**made, "ssm_scope": "chunk"}
    made |= {"ssm_scope": "sequence", "boundary": "head_cyclic"}
    if name == "head_cyclic":
        return made
    most = max(1, 2 * heads // chunk_size)
    kv_heads = max(n for n in range(1, min(most, heads) + 1) if heads % n == 0)
    made |= {"chunk_size": 2, "n_kv_heads": kv_heads, "kv_proj": True, "leading_tokens": 256}
    return made


def model_config(name: str, *, dim: int, layers: int, chunk_size: int) -> ModelConfig:
    """A model of a byte vocabulary with the mixer `name`; "attamba" is "cyclic"."""
    mixer = mixer_config("cyclic" if name == "attamba" else name, dim, chunk_size)
    return ModelConfig(vocab_size=256, dim=dim, n_layers=layers, mixer=mixer)  # type: ignore[arg-type]


def set_up(device: str, threads: int | None) -> torch.device:
    """Apply --threads and resolve --device. Raises ConfigError for what is not there."""
    import torch

    from attamba.train.runtime import resolve_device

    if threads is not None:
        if threads < 1:
            raise ConfigError(f"--threads={threads} must be at least 1")
        torch.set_num_threads(threads)
    return resolve_device(device, "--device")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked, so that a clock can be read."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


TURN = 8
"""Steps that a contender takes in a row."""


def interleaved_seconds(
    steps: dict[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each step, taken in turns of TURN.

    In turns, because a machine's speed drifts: what slows one then slows the others as well. A
    turn begins with a call that does not count: the processor's caches hold another's data then.
    """
    for step in steps.values():
        for _ in range(warm_up):
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for begin in range(0, repeats, TURN):
        for name, step in steps.items():
            step()
            for _ in range(min(TURN, repeats - begin)):
                taken[name].append(seconds(step, device))
    return taken


def median_ms(times: Sequence[float]) -> float:
    """Median of seconds, in milliseconds."""
    return statistics.median(times) * 1e3


def save(path: Path | None, record: dict[str, Any]) -> None:
    """Write a record of figures, if a file was asked for: after every row, so that none is lost."""
    if path is not None:
        from attamba.data.files import write_json  # its package needs numpy

        write_json(path, record)


def environment(device: torch.device) -> dict[str, Any]:
    """Where and how figures were taken: versions, device, threads, date (UTC), command line."""
    import torch

    on_gpu = _gpu_environment(device) if device.type == "cuda" else {}
    return {
        "command": command_line(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        **on_gpu,
    }


def command_line() -> str:
    """What was typed, but for the file to write: it says nothing about the figures."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return shlex.join(word for word in words if not word.startswith("--json="))


def _gpu_environment(device: torch.device) -> dict[str, Any]:
    """Version of Triton; clocks (MHz), power (W) and driver, as nvidia-smi tells them."""
    found: dict[str, Any] = {}
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = importlib.metadata.version("triton")
    fields = ["clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "driver_version"]
    if shutil.which("nvidia-smi") is not None:
        command = ["nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={','.join(fields)}"]
        answer = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True
        )
        found |= dict(zip(fields, (word.strip() for word in answer.stdout.split(","))))
    return found


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU where the system tells it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass
class Table:
    """A titled table. str() is plain text, first column to the left and the others to the right."""

    title: str
    headers: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.headers, *self.rows)]

        def line(cells: list[str]) -> str:
            rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))
            return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, rule, line(self.headers), rule, *map(line, self.rows)])

    def markdown(self) -> str:
        """The same as Markdown."""
        cells = [self.headers, ["--:"] * len(self.headers), *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells)
