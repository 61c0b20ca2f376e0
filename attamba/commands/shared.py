"""What several commands do alike."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from attamba.config import RunConfig, parse_overrides
from attamba.data import Tokenizer

if TYPE_CHECKING:
    from attamba.models import Decoder


def load_checkpoint(args: argparse.Namespace) -> tuple[Path, RunConfig, Decoder, Tokenizer]:
    """The checkpoint's folder, the configuration it was trained with, its model and tokenizer."""
    from attamba.train import find_checkpoint, load
    from attamba.train.checkpoint import read_config

    folder = find_checkpoint(args.checkpoint)
    overrides = parse_overrides(args.overrides) if args.overrides else None
    model, tokenizer = load(folder, overrides=overrides, device=args.device, dtype=args.dtype)
    return folder, read_config(folder), model, tokenizer


def counter(what: str) -> Callable[[int], None]:
    """Shows a growing count on standard error where that is a terminal; nothing elsewhere."""

    def show(count: int) -> None:
        if sys.stderr.isatty():
            # The cursor goes back, so that what is printed next takes the line.
            print(f"{count:,} {what}\r", end="", file=sys.stderr, flush=True)

    return show
