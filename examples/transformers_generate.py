"""A checkpoint in transformers: export, load, stream, left-padded batches, a cache to go on from.

python examples/transformers_generate.py [--out runs/examples] [--steps 200]
"""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Thread

from train import arguments, trained
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from attamba.hf.export import export

PROMPTS = ['The "if" statement', "A class definition is an executable statement. It"]


def exported(run: Path) -> Path:
    """The run as a folder that transformers reads; `attamba export RUN FOLDER` does the same."""
    folder = run.with_name(f"{run.name}-hf")
    shutil.rmtree(folder, ignore_errors=True)
    return export(run, folder)


def main() -> None:
    args = arguments(__doc__)
    folder = exported(trained(args.out, args.steps))
    model = AutoModelForCausalLM.from_pretrained(folder)  # attamba.hf.export registered the classes
    tokenizer = AutoTokenizer.from_pretrained(folder)

    one = tokenizer(PROMPTS[0], return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    options = {"max_new_tokens": 40, "streamer": streamer}
    Thread(target=model.generate, kwargs={**one, **options}).start()
    print("streamed: ", end="")
    for text in streamer:
        print(text, end="", flush=True)

    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)  # padded on the left
    beams = model.generate(**batch, max_new_tokens=40, num_beams=3)
    for text in tokenizer.batch_decode(beams, skip_special_tokens=True):
        print(f"\nthree beams: {text!r}", end="")

    first = model.generate(**one, max_new_tokens=20, return_dict_in_generate=True)
    cache, tokens = first.past_key_values, first.sequences
    more = model.generate(tokens, past_key_values=cache, max_new_tokens=20)
    whole = model.generate(**one, max_new_tokens=40, use_cache=False)
    print(f"\n\ngoing on from a returned cache: the same tokens: {more.tolist() == whole.tolist()}")
    print(repr(cache))


if __name__ == "__main__":
    main()
