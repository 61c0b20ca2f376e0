"""`attamba bench hf`: what transformers' generate() costs per step over attamba.generate.

Both run the same weights greedily from the same prompts and must give the same tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba.bench import common
from attamba.config import ConfigError

if TYPE_CHECKING:
    import torch

    from attamba.models import Decoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `attamba bench hf`."""
    parser.add_argument("--dim", type=int, default=512, help="model width (default: 512)")
    parser.add_argument("--layers", type=int, default=8, help="layers (default: 8)")
    parser.add_argument("--chunk-size", type=int, default=8, help="P (default: 8)")
    parser.add_argument("--batch-sizes", default="1,8", help="rows (default: 1,8)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--steps", type=int, default=64, help="new tokens (default: 64)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed generations of each (default: 7)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write --json. Returns the exit status."""
    import attamba

    sizes = args.batch_sizes.split(",")
    if not all(size.isdigit() and int(size) for size in sizes):
        raise ConfigError(f"--batch-sizes={args.batch_sizes} must be numbers such as 1,8")
    device = common.set_up(args.device, args.threads)
    names = ("dim", "layers", "chunk_size", "prompt", "steps", "repeats")
    settings = {name: getattr(args, name) for name in names}
    config = common.model_config(
        "attamba", dim=args.dim, layers=args.layers, chunk_size=args.chunk_size
    )
    decoder = attamba.build_model(config).to(device).eval()
    rows = [measure(decoder, int(size), args.prompt, args.steps, args.repeats) for size in sizes]
    record = {
        "benchmark": "hf",
        "settings": settings,
        "environment": common.environment(device),
        "rows": rows,
    }
    for table in tables(record):
        print(table)
    common.save(args.json, record)
    return 0


def measure(
    decoder: Decoder, batch_size: int, prompt: int, steps: int, repeats: int
) -> dict[str, Any]:
    """One row: median milliseconds per new token of either, the prompt's reading included."""
    import torch

    import attamba
    from attamba.hf import AttambaForCausalLM

    device = decoder.embed.weight.device
    model = AttambaForCausalLM.from_decoder(decoder)
    ids = torch.randint(decoder.config.vocab_size, (batch_size, prompt)).to(device)
    results: dict[str, torch.Tensor] = {}

    def ours() -> None:
        out = attamba.generate(decoder, ids, max_new_tokens=steps)
        assert isinstance(out, torch.Tensor)
        results["attamba"] = out

    def theirs() -> None:
        results["transformers"] = model.generate(ids, max_new_tokens=steps, do_sample=False)

    runs: dict[str, Callable[[], object]] = {"attamba": ours, "transformers": theirs}
    taken = common.interleaved_seconds(runs, repeats, device, warm_up=1)
    row: dict[str, Any] = {"batch_size": batch_size}
    row |= {f"{name}_ms": common.median_ms(times) / steps for name, times in taken.items()}
    row["overhead"] = row["transformers_ms"] / row["attamba_ms"] - 1
    row["same_tokens"] = torch.equal(results["attamba"], results["transformers"])
    return row


def tables(record: dict[str, Any]) -> list[common.Table]:
    """A record that run() made, as a table."""
    cells = [
        [
            f"{row['batch_size']}",
            f"{row['attamba_ms']:.2f} ms",
            f"{row['transformers_ms']:.2f} ms",
            f"{row['overhead']:+.1%}",
            "yes" if row["same_tokens"] else "NO",
        ]
        for row in record["rows"]
    ]
    head = ["rows", "attamba.generate", "transformers", "overhead", "same tokens"]
    return [common.Table("one step of generation", head, cells)]
