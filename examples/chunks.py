"""Where chunks end: by counting, at separators of the text, or wherever the caller says.

python examples/chunks.py [--out runs/examples] [--steps 200]
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from train import arguments, trained

import attamba
from attamba import Decoder
from attamba.dial import redial
from attamba.models.accounting import layer_ends

TEXT = 'The "else" clause, if present, is executed. The "if" statement selects exactly one suite.'
POLICIES = {
    "uniform": "uniform",
    "cyclic": "cyclic",
    "at spaces": {"type": "separator", "tokens": list(b" \n"), "max_chunk": 16},
    "ever longer": {"type": "budget", "max_chunks": 8},
}


def drawn(ends: torch.Tensor) -> str:
    """The text with a bar after each chunk. ends: bool [T]."""
    return "".join(char + "|" * bool(end) for char, end in zip(TEXT, ends))


def sentence_ends() -> torch.Tensor:
    """A rule of one's own: chunks are words, and sentences; bool [1, T]."""
    ends = torch.zeros(1, len(TEXT), dtype=torch.bool)
    for word in re.finditer(r"\w+\W*", TEXT):
        ends[0, word.end() - 1] = True
    return ends


@torch.inference_mode()
def loss(model: Decoder, ids: torch.Tensor, **options: torch.Tensor) -> float:
    """Nats per byte of the text."""
    logits = model(ids, **options)
    return float(F.cross_entropy(logits[0, :-1], ids[0, 1:]))


def main() -> None:
    args = arguments(__doc__)
    model, tokenizer = attamba.load(trained(args.out, args.steps))
    ids = torch.tensor([tokenizer.encode(TEXT)])  # bytes: one token per character
    for name, boundary in POLICIES.items():
        # One set of weights under every policy; a short window, so that chunks matter.
        other = redial(model, {"mixer.boundary": boundary, "mixer.leading_tokens": 4})
        print(f"{name}: {loss(other, ids):.3f} nats per byte")
        for layer in range(2):
            ends = layer_ends(other.config, layer, len(TEXT), tokens=ids)[0]
            print(f"  layer {layer}  {drawn(ends)}")
    other = redial(model, {"mixer.boundary": "given", "mixer.leading_tokens": 4})
    ends = sentence_ends()
    print(f"given, words: {loss(other, ids, ends=ends):.3f} nats per byte\n  {drawn(ends[0])}")
    cache = other.new_cache()
    other(ids, ends=ends, cache=cache)
    print(f"  the cache holds {cache.nbytes(used=True):,} bytes")


if __name__ == "__main__":
    main()
