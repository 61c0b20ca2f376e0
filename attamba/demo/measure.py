"""What the demo says about trained models: every figure of its table and report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from attamba.bench import decode
from attamba.data import TokenDataset, Tokenizer
from attamba.demo.settings import MODELS, DemoSettings
from attamba.dial import sweep
from attamba.evaluate import evaluate
from attamba.generation import generate
from attamba.models import Decoder
from attamba.models.accounting import n_parameters
from attamba.ops import chunk_attention
from attamba.ops.chunking import make_span
from attamba.plots import NOT_SEEN, key_kinds

if TYPE_CHECKING:
    from attamba.modules.attamba import ChunkAttention

TEMPERATURE, TOP_P = 0.8, 0.95
"""Of the samples."""


def measure(
    models: dict[str, Decoder],
    tokenizer: Tokenizer,
    held_out: TokenDataset,
    settings: DemoSettings,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All figures as plain numbers and text, for results.json."""
    say("Scoring held-out files ...")
    scores = score(models, tokenizer, held_out, settings)
    with _one_thread():
        say("Timing the decoder ...")
        decoding = [
            decode.measure(models, length, batch_size=1, repeats=settings.decode_repeats)
            for length in settings.lengths
        ]
        say("Writing samples ...")
        samples = {name: sample(model, tokenizer, settings) for name, model in models.items()}
    return {
        "parameters": {name: n_parameters(model.config) for name, model in models.items()},
        **scores,
        "decode": decoding,
        "samples": samples,
        "mask_pairs": verify_mask(models["attamba"], settings.mask_tokens),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """A step of a small model is too little work to share, and sharing it costs most on a busy
    machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def score(
    models: dict[str, Decoder],
    tokenizer: Tokenizer,
    held_out: TokenDataset,
    settings: DemoSettings,
) -> dict[str, Any]:
    """Scores of both models, and the one Attamba model's at every chunk size.

    All on the beginning of every held-out file, in windows of the training length that overlap by
    half; cache bytes are those of one such window.
    """
    texts = beginnings(held_out, tokenizer, settings.eval_bytes_per_file)
    rows = sweep(
        models["attamba"],
        tokenizer,
        texts,
        "mixer.chunk_size",
        settings.chunk_sizes,
        context=settings.seq_len,
    )
    reference = evaluate(models["transformer"], tokenizer, texts, context=settings.seq_len)
    cache = models["transformer"].new_cache()
    cache.fill(settings.seq_len)
    trained = next(row for row in rows if row.value == settings.chunk_size)
    return {
        "bits_per_byte": {
            "attamba": trained.bits_per_byte,
            "transformer": reference.bits_per_byte,
        },
        "dial": [row.to_dict() for row in rows],
        "dial_reference": {
            "perplexity": reference.perplexity,
            "cache_bytes": cache.nbytes(used=True),
        },
        "scored": {"bytes": reference.n_bytes, "files": reference.n_documents},
    }


def beginnings(held_out: TokenDataset, tokenizer: Tokenizer, length: int) -> list[str]:
    """The first `length` bytes of each document, less a character that would be torn apart.

    A share of every file: the first few files alone would be a poor sample.
    """
    return [
        tokenizer.decode(document.tokens[:length]).rstrip("\N{REPLACEMENT CHARACTER}")
        for document in held_out.documents()
    ]


def sample(model: Decoder, tokenizer: Tokenizer, settings: DemoSettings) -> str:
    """Text that the model writes after the prompt."""
    ids = generate(
        model,
        [tokenizer.encode(settings.prompt)],
        max_new_tokens=settings.sample_tokens,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=settings.seed,
        tokenizer=tokenizer,
    )[0]
    return tokenizer.decode(ids.tolist())


def verify_mask(model: Decoder, seq_len: int) -> int:
    """Compare the mask that is drawn with the keys that the model's own layers give weight to.

    Each Attamba layer's boundary policy and attention operator are run on queries and keys of
    zero, so that all visible keys have the same weight, and on values that name their position.
    Returns the number of (query, key) pairs compared; a difference is a bug.
    """
    pairs = 0
    for layer_idx, layer in enumerate(model.layers):
        mixer: ChunkAttention = layer.mixer  # type: ignore[assignment]
        ends, _ = mixer.boundary(make_span(seq_len, torch.device("cpu")))
        zeros = torch.zeros(1, seq_len, 1, seq_len)
        names = torch.eye(seq_len)[None, :, None]
        weights = chunk_attention(zeros, zeros, names, ends[:, :1], mixer.lead)[0, :, 0]
        drawn = key_kinds(model.config, layer_idx, seq_len) != NOT_SEEN
        assert bool(((weights > 0).numpy() == drawn).all()), f"layer {layer_idx}"
        pairs += seq_len * seq_len
    return pairs


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the table side by side."""
    from attamba.display import format_bytes

    def row(label: str, figures: dict[str, Any], show: Callable[[Any], str]) -> list[str]:
        return [label, *(show(figures[name]) for name in MODELS)]

    rows = [
        row("parameters", results["parameters"], lambda n: f"{n:,}"),
        row("bits per byte, held-out files", results["bits_per_byte"], lambda b: f"{b:.3f}"),
    ]
    for at in results["decode"]:
        rows.append(
            row(f"cache at {at['length']:,} tokens", at, lambda m: format_bytes(m["bytes_used"]))
        )
    for at in results["decode"]:
        rows.append(
            row(f"decoded tokens/s at {at['length']:,}", at, lambda m: f"{1e3 / m['step_ms']:,.0f}")
        )
    return ["", "Attamba", "transformer"], rows
