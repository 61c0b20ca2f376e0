"""Train a small model from Python. The other examples use the model that this one leaves.

python examples/train.py [--out runs/examples] [--steps 200]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import attamba
from attamba.config import DataConfig, OptimConfig, TrainConfig
from attamba.evaluate import evaluate
from attamba.train import train


def arguments(description: str, steps: int = 200) -> argparse.Namespace:
    """What every example takes."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="folder to fill")
    parser.add_argument("--steps", type=int, default=steps, help="of training")
    return parser.parse_args()


def texts(out: Path) -> tuple[Path, Path]:
    """Folders of English to train on and to test on: the language reference in every Python."""
    for i, (name, text) in enumerate(sorted(topics.items())):
        file = out / "text" / ("test" if i % 8 == 7 else "train") / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return out / "text" / "train", out / "text" / "test"


def trained(out: Path, steps: int) -> Path:
    """The folder of a run of so many steps; what an earlier call trained is not trained again."""
    train_text, test_text = texts(out)
    mixer = {"type": "attamba", "n_heads": 4, "chunk_size": 8, "leading_tokens": 16}
    config = attamba.RunConfig(
        out=str(out / f"model-{steps}"),
        model=attamba.ModelConfig(vocab_size=256, dim=128, n_layers=2, mixer=mixer),
        data=DataConfig(train=str(train_text), valid=str(test_text), seq_len=256, batch_size=4),
        optim=OptimConfig(warmup_steps=20),
        train=TrainConfig(steps=steps, log_every=50, eval_every=0, eval_rows=8, progress=False),
    )
    return train(config, on_log=show).run_dir


def show(record: dict[str, Any]) -> None:
    """One line for some steps: a record of the run's metrics.jsonl."""
    if record["kind"] == "train":
        print(f"step {record['step']}: loss {record['loss']:.3f} nats per byte")


def main() -> None:
    args = arguments(__doc__)
    run = trained(args.out, args.steps)
    model, tokenizer = attamba.load(run)
    documents = [file.read_text(encoding="utf-8") for file in sorted(texts(args.out)[1].iterdir())]
    score = evaluate(model, tokenizer, documents, context=256, max_tokens=10_000)
    print(f"{run}: {score.bits_per_byte:.3f} bits per byte of unseen text")


if __name__ == "__main__":
    main()
