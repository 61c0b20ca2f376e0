"""From text to an answer: train, score, export, load, the harness, serve, ask.

python examples/end_to_end.py [--out runs/end-to-end] [--steps 300] [--write PAGE.md]

A few minutes on two cores; no network. --write keeps commands, code and output as a page.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

from page import Page
from train import texts

PROMPT = 'The "try" statement'


def load_and_generate(folder: str, prompt: str) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import attamba.hf  # registers the architecture

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, attamba.hf.AttambaForCausalLM)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def complete(url: str, folder: str, prompt: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = str(Path(folder).resolve())
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0)
    return answer.choices[0].text


def chat(url: str, folder: str, question: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=str(Path(folder).resolve()),
        messages=[{"role": "user", "content": question}],
        max_tokens=24,
        temperature=0,
        stream=True,
    )
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


def measured(folder: str) -> str:
    card = Path(folder, "README.md").read_text(encoding="utf-8")
    return "## Measured" + card.partition("## Measured")[2].partition("\n## Decode cache")[0]


def run(page: Page, out: Path, steps: int) -> None:
    train_text, test_text = texts(out)
    tokenizer, model, exported = out / "tokenizer", out / "model", f"{out}/exported"

    page.heading("Train")
    page.command(f"attamba data tokenizer {tokenizer} {train_text} --vocab-size 512")
    page.command(
        f"attamba train out={model} data.train={train_text} data.valid={test_text} "
        f"data.tokenizer={tokenizer} data.seq_len=256 data.batch_size=8 "
        f"model.vocab_size=512 model.dim=128 model.n_layers=4 mixer.n_heads=4 mixer.chunk_size=8 "
        f"mixer.leading_tokens=16 optim.warmup_steps=50 train.steps={steps} "
        f"train.eval_every=0 train.log_every={max(steps // 4, 1)}"
    )
    page.heading("Score")
    page.command(f"attamba eval {model} --data {test_text} --stride 256 --json {out}/text.json")
    page.command(f"attamba eval {model} --tasks books_bpb={test_text} --json {out}/tasks.json")

    page.heading("Export, with the scores in the model card")
    page.command(
        f"attamba export {model} {exported} --eval {out}/text.json --eval {out}/tasks.json"
    )
    page.python(measured, exported)

    page.heading("Load with AutoModelForCausalLM")
    said = page.python(load_and_generate, exported, PROMPT)

    page.heading("Score with lm_eval's own command line")
    page.command(
        f"attamba-lm-eval --model attamba --model_args pretrained={model} --tasks books_bpb "
        f"--metadata books_bpb={test_text} --device cpu --batch_size 16"
    )
    page.heading("Serve, and ask through OpenAI's client")
    with page.server(f"attamba serve {exported}", log=out / "serve.log") as url:
        answer = page.python(complete, url, exported, PROMPT)
        page.python(chat, url, exported, "What is a statement?")
    if answer != said:
        sys.exit(f"the server said {answer!r}, generate() {said!r}")
    print("\nThe server and generate() said the same.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/end-to-end"), help="a new folder")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="keep all that is shown")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out={args.out} exists; delete it, or name another folder")
    page = Page()
    run(page, args.out, args.steps)
    if args.write is not None:
        page.write(args.write, shlex.join(["python", *sys.argv]))


if __name__ == "__main__":
    main()
