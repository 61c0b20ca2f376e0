"""One training step of one model, measured in this very process; see attamba.bench.train.

`python -m attamba.bench.probe REQUEST` reads a JSON object and prints one:

    peak_bytes         peak memory of a step above the model's weights and gradients
    step_ms            forward and backward of the whole model, median
    attention_ms       forward and backward of its attention alone, all layers, median
    attention_entries  scores that a forward pass computes, by accounting
    loss               of the last step
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from attamba.bench.common import median_ms, seconds, set_up
from attamba.config import AttambaMixer, ModelConfig, from_dict
from attamba.mixers import attends
from attamba.models import build_model
from attamba.models.accounting import attention_entries, layer_ends
from attamba.ops import chunk_attention


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Measure what the request asks for; its keys are those that attamba.bench.train sends."""
    device = set_up(request["device"], request["threads"])
    config = from_dict(ModelConfig, request["model"])
    length, batch, repeats = request["length"], request["batch_size"], request["repeats"]
    dtype = getattr(torch, request["dtype"])
    torch.manual_seed(0)
    model = build_model(config).to(device).train()
    losses: list[float] = []

    def step(tokens: int) -> None:
        ids = torch.randint(config.vocab_size, (batch, tokens + 1), device=device)
        model.zero_grad(set_to_none=False)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())

    step(min(length, 64))  # allocates gradients and starts threads, which belong to the baseline
    peak = _peak_bytes(lambda: step(length), device)
    times = [seconds(lambda: step(length), device) for _ in range(repeats)]
    attention = _attention(config, batch, length, dtype, device)
    attention()
    attention_times = [seconds(attention, device) for _ in range(repeats)]
    return {
        "peak_bytes": peak,
        "step_ms": median_ms(times),
        "attention_ms": median_ms(attention_times) * config.n_layers,
        "attention_entries": attention_entries(config, length),
        "loss": losses[-1],
    }


def _peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Peak memory during `step` less what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError):  # where there is no such file the peak so far is the start
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held
    before = _peak_resident()
    step()
    return _peak_resident() - before


def _peak_resident() -> int:
    """Largest resident size of this process so far, in bytes."""
    if sys.platform == "linux":
        # Unlike ru_maxrss, VmHWM does not take over the size of the process that started us.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _attention(
    config: ModelConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """Forward and backward of one layer's attention on random queries, keys and values."""
    mixer = config.layer_mixers()[0]
    assert attends(mixer)
    heads = mixer.n_heads
    width = mixer.head_dim or config.dim // heads
    kv_heads = mixer.n_kv_heads or heads
    q, k, v = (
        torch.randn(batch, length, n, width, dtype=dtype, device=device, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    ends = layer_ends(config, 0, length).to(device)[None]

    def step() -> None:
        if isinstance(mixer, AttambaMixer):
            out = chunk_attention(q, k, v, ends, mixer.leading_tokens)
        else:
            qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
            grouped = heads != kv_heads
            out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, enable_gqa=grouped)
        out.sum().backward()

    return step


if __name__ == "__main__":
    print(json.dumps(probe(json.loads(sys.argv[1]))))
