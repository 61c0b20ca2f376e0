"""Layers of different kinds in one model: a list of mixers is cycled over the layers.

python examples/hybrid.py [--out runs/examples] [--steps 40]
"""

from __future__ import annotations

import torch
from train import arguments, texts

import attamba
from attamba.config import DataConfig, OptimConfig, TrainConfig
from attamba.display import format_bytes
from attamba.models.accounting import n_parameters
from attamba.train import train

CHUNKED = {"type": "attamba", "n_heads": 4, "chunk_size": 8, "leading_tokens": 16}
MODELS = {
    "attamba": CHUNKED,
    "full attention": {"type": "transformer", "n_heads": 4},
    "hybrid": [CHUNKED, CHUNKED, CHUNKED, {"type": "transformer", "n_heads": 4, "window": 64}],
}


def main() -> None:
    args = arguments(__doc__, steps=40)
    train_text, test_text = texts(args.out)
    print(f"{'model':<16}{'parameters':>12}{'nats per byte':>15}{'cache at 2,000 tokens':>24}")
    for name, mixer in MODELS.items():
        model = attamba.ModelConfig(vocab_size=256, dim=64, n_layers=4, mixer=mixer)
        config = attamba.RunConfig(
            out=str(args.out / f"{name.replace(' ', '-')}-{args.steps}"),
            model=model,
            data=DataConfig(train=str(train_text), valid=str(test_text), seq_len=256, batch_size=4),
            optim=OptimConfig(warmup_steps=10),
            train=TrainConfig(steps=args.steps, eval_every=0, eval_rows=16, progress=False),
        )
        result = train(config)
        valid = [record for record in result.metrics if record["kind"] == "valid"][-1]
        decoder, _ = attamba.load(result.run_dir)
        cache = decoder.new_cache()
        with torch.inference_mode():
            decoder(torch.zeros(1, 2000, dtype=torch.long), cache=cache)
        held = format_bytes(cache.nbytes(used=True))
        print(f"{name:<16}{n_parameters(model):>12,}{valid['valid_loss']:>15.3f}{held:>24}")


if __name__ == "__main__":
    main()
