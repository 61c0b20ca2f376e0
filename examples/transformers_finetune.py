"""Train an exported model further with transformers' Trainer, and take it back as a checkpoint.

python examples/transformers_finetune.py [--out runs/examples] [--steps 200]
"""

from __future__ import annotations

import argparse
import inspect
import json.decoder
import json.encoder
import shutil
from typing import Any

from train import arguments, trained
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers_generate import exported

import attamba
from attamba.hf.export import import_folder

LENGTH = 128


def rows(tokenizer: Any, modules: list[Any]) -> list[dict[str, list[int]]]:
    """Python source in rows of equal length; the labels are the inputs."""
    ids = tokenizer("".join(inspect.getsource(module) for module in modules))["input_ids"]
    cut = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]
    return [{"input_ids": row, "labels": row} for row in cut]


def main() -> None:
    args = arguments(__doc__)
    folder = exported(trained(args.out, args.steps))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.out / "trainer"),
            max_steps=max(args.steps // 4, 1),
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows(tokenizer, [argparse, json.decoder, inspect]),
        eval_dataset=rows(tokenizer, [json.encoder]),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"nats per byte of json/encoder.py: {before:.3f} before, {after:.3f} after")

    tuned, back = args.out / "tuned-hf", args.out / "tuned"
    for old in (tuned, back):
        shutil.rmtree(old, ignore_errors=True)
    trainer.save_model(str(tuned))
    tokenizer.save_pretrained(tuned)
    import_folder(tuned, back, tokenizer="bytes")
    decoder, own = attamba.load(back)
    out = attamba.generate(decoder, [own.encode("def ")], max_new_tokens=60, tokenizer=own)
    print(f"as a checkpoint again: {own.decode(out[0].tolist())!r}")


if __name__ == "__main__":
    main()
