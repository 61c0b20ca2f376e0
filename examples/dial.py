"""One trained model, used at many chunk sizes and windows: cache bytes against quality.

It was trained at chunk_size 8 and leading_tokens 16; how well it takes other settings is measured
here. Settings are changed without any training.

python examples/dial.py [--out runs/examples] [--steps 200]
"""

from __future__ import annotations

from typing import Any

from train import arguments, texts, trained

import attamba
from attamba.dial import SweepRow, sweep
from attamba.display import format_bytes


def main() -> None:
    args = arguments(__doc__)
    model, tokenizer = attamba.load(trained(args.out, args.steps))
    files = sorted(texts(args.out)[1].iterdir())
    documents = [file.read_text(encoding="utf-8") for file in files]
    settings: dict[str, list[Any]] = {
        "mixer.chunk_size": [1, 2, 4, 8, 16, 32],
        "mixer.leading_tokens": [0, 16, 64, None],
    }
    for field, values in settings.items():
        print(f"\n{field:<22}{'bits per byte':>14}{'cache':>12}")

        def show(row: SweepRow) -> None:
            cache = format_bytes(row.cache_bytes)
            print(f"{row.value!s:<22}{row.bits_per_byte:>14.3f}{cache:>12}", flush=True)

        sweep(
            model, tokenizer, documents, field, values, context=1024, max_tokens=2048, on_row=show
        )


if __name__ == "__main__":
    main()
