"""Text from a model: streamed as it comes, and step by step with the decode cache in hand.

python examples/generate.py [--out runs/examples] [--steps 200]
"""

from __future__ import annotations

from pathlib import Path

import torch
from train import arguments, trained

import attamba
from attamba import Decoder
from attamba.data import Tokenizer
from attamba.display import format_bytes
from attamba.generation import Step

PROMPT = 'The "if" statement is used '


def streamed(model: Decoder, tokenizer: Tokenizer) -> None:
    """Print each piece of text when it is certain."""

    def show(step: Step) -> None:
        print(step.text[0], end="", flush=True)

    print(f"Sampled: {PROMPT}", end="")
    ids = [[tokenizer.eos_id, *tokenizer.encode(PROMPT)]]  # as in training, it begins a document
    options = {"max_new_tokens": 80, "temperature": 0.7, "top_p": 0.9, "seed": 0}
    attamba.generate(model, ids, tokenizer=tokenizer, on_token=show, **options)
    print("\n")


@torch.inference_mode()
def by_hand(model: Decoder, tokenizer: Tokenizer) -> None:
    """Greedy decoding with nothing but model(...) and its cache: the same tokens as without one."""
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(PROMPT)]])
    cache = model.new_cache(batch_size=1)
    for piece in ids.split(10, dim=1):  # a prompt may come in pieces of any size
        logits = model(piece, cache=cache)
    tokens = []
    while len(tokens) < 40:
        token = logits[:, -1:].argmax(-1)
        tokens.append(int(token))
        logits = model(token, cache=cache)
    print(f"Greedy:  {PROMPT}{tokenizer.decode(tokens)}")
    whole = attamba.generate(model, ids, max_new_tokens=40, use_cache=False)
    print(f"without a cache the same tokens: {whole[0, ids.shape[1] :].tolist() == tokens}\n")


@torch.inference_mode()
def cache_sizes(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Bytes in the cache as a text goes by; full attention would keep every token."""
    text = "".join(file.read_text(encoding="utf-8") for file in sorted(folder.iterdir()))
    ids = torch.tensor([tokenizer.encode(text[:4000])])
    cache = model.new_cache()
    per_token = 2 * model.config.n_layers * model.config.dim * 4  # float32 keys and values
    for begin, end in ((0, 100), (100, 1000), (1000, 4000)):
        model(ids[:, begin:end], cache=cache)
        used, full = cache.nbytes(used=True), end * per_token
        print(f"{end:>5} tokens: cache {format_bytes(used)}, full attention {format_bytes(full)}")


def main() -> None:
    args = arguments(__doc__)
    model, tokenizer = attamba.load(trained(args.out, args.steps))
    streamed(model, tokenizer)
    by_hand(model, tokenizer)
    cache_sizes(model, tokenizer, args.out / "text" / "test")


if __name__ == "__main__":
    main()
