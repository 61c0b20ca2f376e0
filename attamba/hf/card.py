"""The model card of an exported checkpoint; every figure is read from the run or computed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attamba.config import AttambaMixer, Mixer, ModelConfig, RunConfig, TransformerMixer
from attamba.data import Tokenizer
from attamba.display import format_bytes
from attamba.hf.scores import Scores, read_scores, score
from attamba.mixers import attends
from attamba.models import Decoder
from attamba.models.accounting import cache_bytes, n_parameters
from attamba.models.mixer_costs import kv_width
from attamba.train.checkpoint import read_config, read_state
from attamba.train.metrics import read_metrics
from attamba.train.storage import weights_digest

FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- attamba
---
"""

TASKS = "## Tasks of the lm-evaluation-harness\n\n"


def model_card(
    checkpoint: Path,
    decoder: Decoder,
    tokenizer: Tokenizer,
    evals: Sequence[str | Path],
    remote_code: bool,
) -> str:
    """The text of README.md. Raises ConfigError as read_scores does."""
    run, state = read_config(checkpoint), read_state(checkpoint)
    config = decoder.config
    scores = read_scores(state["step"], weights_digest(checkpoint), evals)
    itemsize = decoder.embed.weight.element_size()
    parts = [
        FRONT,
        f"# {Path(run.out).name}",
        "A language model of the architecture Attamba (attention over multi-token states, "
        "arXiv 2411.17685). It continues text and was not trained to follow instructions.",
        "## Use\n\n" + _usage(remote_code),
        "## Architecture\n\n" + _table(["", ""], _architecture(config, tokenizer)),
        "## Data and training\n\n" + _table(["", ""], _training(run, state)),
        "## Measured perplexity\n\n" + _perplexity(checkpoint, state["step"], scores),
        *([TASKS + _table(["task", "measure", "value", ""], scores.tasks)] if scores.tasks else []),
        "## Decode cache of one sequence\n\n" + _cache(config, itemsize),
    ]
    return "\n\n".join(parts) + "\n"


def _usage(remote_code: bool) -> str:
    first = "" if remote_code else "import attamba.hf  # registers the architecture\n"
    trust = ", trust_remote_code=True" if remote_code else ""
    return (
        f"```python\n{first}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'folder = "."  # where this file is\n'
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n"
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})\n"
        f'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```"
    )


def _architecture(config: ModelConfig, tokenizer: Tokenizer) -> list[list[str]]:
    mixers = config.mixer if isinstance(config.mixer, list) else [config.mixer]
    return [
        ["parameters", f"{n_parameters(config):,}"],
        ["layers, width", f"{config.n_layers}, {config.dim}"],
        *(["mixer", _describe(mixer, config.dim)] for mixer in mixers),
        ["vocabulary", f"{config.vocab_size:,} ({tokenizer.kind} tokenizer)"],
    ]


def _describe(mixer: Mixer, dim: int) -> str:
    if isinstance(mixer, TransformerMixer):
        seen = "all earlier tokens" if mixer.window is None else f"a window of {mixer.window}"
        return f"transformer: {_heads(mixer)}, {seen}"
    if isinstance(mixer, AttambaMixer):
        lead = "all" if mixer.leading_tokens is None else mixer.leading_tokens
        return (
            f"attamba: {_heads(mixer)}, P = {mixer.chunk_size} tokens per chunk, L = {lead} "
            f"leading tokens, boundary {json.dumps(mixer.boundary)}, compressor "
            f"{mixer.compressor}, state over the {mixer.ssm_scope}"
        )
    options = dataclasses.asdict(mixer)
    shown = [f"{k} {v}" for k, v in options.items() if k not in ("type", "backend") and v]
    return f"{mixer.type}: {', '.join([f'inner width {mixer.inner(dim)}', *shown])}"


def _heads(mixer: AttambaMixer | TransformerMixer) -> str:
    return f"{mixer.n_heads} query and {mixer.n_kv_heads or mixer.n_heads} key/value heads"


def _training(run: RunConfig, state: dict[str, Any]) -> list[list[str]]:
    given = run.data.training_paths()
    names = [name for path in given for name in ([path] if isinstance(path, str) else path)]
    return [
        ["trained on", ", ".join(Path(name).name or name for name in names)],
        ["steps, tokens", f"{state['step']:,}, {state['tokens']:,}"],
        ["rows of", f"{run.data.seq_len:,} tokens, {run.data.batch_size} per step"],
    ]


def _perplexity(checkpoint: Path, step: int, scores: Scores) -> str:
    rows = []
    metrics = checkpoint.resolve().parent.parent / "metrics.jsonl"
    if metrics.is_file():
        valid = [r for r in read_metrics(metrics) if r.get("kind") == "valid" and r["step"] <= step]
        if valid:
            last = valid[-1]
            cells = score(math.exp(last["valid_loss"]), last.get("valid_bits_per_byte"))
            rows.append([f"held out in training, at step {last['step']:,}", *cells])
    rows += scores.texts
    if not rows:
        return "None was measured (`attamba eval --json`, `attamba export --eval`)."
    return _table(["on", "perplexity per token", "bits per byte"], rows)


def _cache(config: ModelConfig, itemsize: int) -> str:
    full = _full_attention_bytes(config, itemsize)
    rows = []
    for tokens in (1_000, 10_000, 100_000):
        try:
            held = cache_bytes(config, tokens, itemsize)
        except ValueError:
            return (
                f"It depends on the text, whose tokens choose the chunks. Full attention with "
                f"the same heads holds {format_bytes(1000 * full)} per 1,000 tokens."
            )
        per = format_bytes(held * 1000 // tokens)
        rows.append([f"{tokens:,}", format_bytes(held), per, format_bytes(1000 * full)])
    head = ["tokens", "bytes", "per 1,000 tokens", "full attention, per 1,000 tokens"]
    return _table(head, rows)


def _full_attention_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes per token of keys and values that are all kept, in all layers.

    With the layers' own heads; a layer without any counts as wide as the model.
    """
    widths = [
        kv_width(mixer, config.dim) if attends(mixer) else config.dim
        for mixer in config.layer_mixers()
    ]
    return 2 * itemsize * sum(widths)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
