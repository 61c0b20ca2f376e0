"""`attamba bench train` on a GPU: whole training steps of the paper's model, side by side.

Compiled forward and backward under bfloat16 autocast, clipping and AdamW, as `attamba train` does
them, of 65,536 tokens a step. The contenders live in one process and take steps in turns. The
transformer gets the backend of scaled_dot_product_attention that is fastest at its shape.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from attamba.bench import common
from attamba.bench.library import BACKENDS
from attamba.config import ConfigError, ModelConfig, OptimConfig
from attamba.display import format_bytes
from attamba.models import build_model
from attamba.models.accounting import flops_per_token, n_parameters
from attamba.train import losses
from attamba.train.optim import build_optimizer

if TYPE_CHECKING:
    import argparse

TOKENS = 65536
VOCABULARY = 32000
IN_A_ROW = 10
"""Steps between two readings of the clock: in training the host runs ahead of the device."""
CONTENDERS = ("cyclic", "head_cyclic", "shared_heads", "transformer")
"""See common.mixer_config."""


def run(args: argparse.Namespace, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """Measure at every length; returns the record."""
    for option in ("batch_size", "dtype"):
        if getattr(args, option) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')}={getattr(args, option)}: on CUDA a training step "
                f"has {TOKENS} tokens in bfloat16 autocast; leave it out"
            )
    record: dict[str, Any] = {
        "benchmark": "train_gpu",
        "settings": {
            "dim": args.dim,
            "layers": args.layers,
            "chunk_size": args.chunk_size,
            "vocabulary": VOCABULARY,
            "tokens_per_step": TOKENS,
            "dtype": "bfloat16 autocast",
            "repeats": args.repeats,
            "steps_in_a_row": IN_A_ROW,
        },
        "environment": common.environment(device),
        "rows": [],
    }
    for length in lengths:
        print(f"train: {length} tokens a row ...", flush=True)
        record["rows"].append(measure(length, args, device))
        common.save(args.json, record)
        torch.compiler.reset()
    return record


def measure(length: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row: for each contender the median step (ms), its peak memory, and ratios."""
    batch = max(1, TOKENS // length)
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (batch, length + 1), device=device)
    row: dict[str, Any] = {"length": length, "batch_size": batch}
    steps: dict[str, Callable[[], None]] = {}
    for name in CONTENDERS:
        config = model_config(name, args)
        held = torch.cuda.memory_allocated(device)
        row[name] = {"parameters": n_parameters(config)}
        kernel = None
        if name == "transformer":
            kernel = fastest_library(batch, length, args.dim, device)
            row[name]["attention"] = kernel
        steps[name] = _stepper(config, tokens, kernel)
        for _ in range(3):
            steps[name]()
        torch.cuda.reset_peak_memory_stats(device)
        steps[name]()
        row[name]["peak_bytes"] = torch.cuda.max_memory_allocated(device) - held
        row[name]["flops"] = flops_per_token(config, length) * batch * length
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(event_ms(step, IN_A_ROW))
    theirs = statistics.median(times["transformer"])
    for name, taken in times.items():
        row[name]["step_ms"] = statistics.median(taken)
        row[name]["step_ms_worst"] = max(taken)
        row[name]["speedup"] = theirs / row[name]["step_ms"]
        row[name]["memory_ratio"] = row[name]["peak_bytes"] / row["transformer"]["peak_bytes"]
    return row


def model_config(name: str, args: argparse.Namespace) -> ModelConfig:
    """The paper's model with the mixer that the bench calls `name`."""
    mixer = common.mixer_config(name, args.dim, args.chunk_size)
    return ModelConfig(vocab_size=VOCABULARY, dim=args.dim, n_layers=args.layers, mixer=mixer)  # type: ignore[arg-type]


def tables(record: dict[str, Any]) -> list[common.Table]:
    """A record that run() made, as tables: time, memory. Older records lack some contenders."""
    times, sizes = [], []
    names = [name for name in CONTENDERS if name in record["rows"][0]]
    ours = names[:-1]
    for row in record["rows"]:
        tokens = f"{row['batch_size']} x {row['length']:,}"
        cells = [f"{row[n]['step_ms']:.1f} ms" for n in names]
        rates = [f"{row[n]['speedup']:.2f}" for n in ours]
        times.append([tokens, *cells, *rates, row["transformer"]["attention"]])
        memory = [format_bytes(row[n]["peak_bytes"]) for n in names]
        sizes.append([tokens, *memory, *(f"{row[n]['memory_ratio']:.2f}" for n in ours)])
    first = ["tokens", *names]
    faster = [f"{n}: times faster" for n in ours]
    return [
        common.Table("one training step", [*first, *faster, "library attention"], times),
        common.Table("peak memory", [*first, *(f"{n}: of transformer's" for n in ours)], sizes),
    ]


def fastest_library(batch: int, length: int, dim: int, device: torch.device) -> str:
    """The SDPA backend whose forward and backward take least time at this shape."""
    heads = common.n_heads(dim)
    q, k, v = (
        torch.randn(
            batch, heads, length, dim // heads, device=device, dtype=torch.bfloat16,
            requires_grad=True,
        )
        for _ in range(3)
    )  # fmt: skip
    taken = {}
    for name, kernel in BACKENDS.items():

        def step(kernel: Any = kernel) -> None:
            with torch.nn.attention.sdpa_kernel(kernel):
                F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        with contextlib.suppress(RuntimeError):  # one that this card or build does not have
            step()
            taken[name] = min(event_ms(step) for _ in range(5))
    return min(taken, key=taken.__getitem__)


def event_ms(step: Callable[[], object], calls: int = 1) -> float:
    """Milliseconds on the device of one call, of so many in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def _stepper(config: ModelConfig, tokens: torch.Tensor, kernel: str | None) -> Callable[[], None]:
    model = build_model(config).to(tokens.device)
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-4))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        optimizer.zero_grad()
        with contextlib.ExitStack() as stack:
            if kernel is not None:
                stack.enter_context(torch.nn.attention.sdpa_kernel(BACKENDS[kernel]))
            with torch.autocast(tokens.device.type, torch.bfloat16):
                logits = compiled(inputs)
            (_nats(logits, targets) / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


_nats = torch.compile(losses.nats, dynamic=False)
