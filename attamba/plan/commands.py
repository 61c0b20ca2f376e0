"""Arguments of `attamba plan`; what it does is imported when it is run."""

from __future__ import annotations

import argparse
import math

from attamba.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to `parser`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, as for attamba train")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="keys that differ from it: data.seq_len=32768 parallel.gather_dtype=bfloat16",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="in all (default: those of parallel.*)"
    )
    parser.add_argument(
        "--tensor", type=int, metavar="N", help="ranks that share a layer (default: the config's)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="ranks that share a row (default: the config's)"
    )
    parser.add_argument(
        "--tflops", type=float, default=989.0, help="peak of a rank (default: 989, an H100's)"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak in model FLOPs (default: 0.4)"
    )
    parser.add_argument(
        "--decode-tokens",
        type=int,
        metavar="N",
        help="also a decode cache of so many tokens, in bfloat16",
    )


def run(args: argparse.Namespace) -> int:
    """`attamba plan CONFIG [key=value ...]`."""
    if not 0 < args.tflops < math.inf:
        raise ConfigError(f"--tflops={args.tflops} must be above 0 and finite")
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu={args.mfu} must be above 0 and at most 1, a share")
    if args.decode_tokens is not None and args.decode_tokens < 1:
        raise ConfigError(f"--decode-tokens={args.decode_tokens} must be at least 1")
    from attamba.config import load_run_config
    from attamba.plan.layout import make_layout
    from attamba.plan.report import Speed, render

    config = load_run_config(args.config, args.overrides)
    layout = make_layout(config, args.ranks, args.tensor, args.context)
    print(render(config, layout, Speed(args.tflops, args.mfu), args.decode_tokens))
    return 0
