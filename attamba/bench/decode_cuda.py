"""`attamba bench decode` on CUDA: steps as CUDA graphs, against the device's own copy rate.

One model at a time, since a card does not drift as a shared CPU does and long caches fill it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attamba.bench import common

if TYPE_CHECKING:
    from attamba.models import Decoder

LOOP = 16
"""Steps in a row for one reading of the clock; the host runs ahead of the device meanwhile."""


def measure(
    models: dict[str, Decoder], length: int, batch_size: int, repeats: int, rate: float
) -> dict[str, Any]:
    """One row: step time (ms), cache bytes, bandwidth floor and tokens/s of every model.

    rate: bytes per second of a copy on the device, see kernels.copy_rate. The floor is the time in
    which it copies as many bytes as a step must read: weights and held entries.
    """
    import torch

    row: dict[str, Any] = {"length": length}
    with torch.inference_mode():
        for name, model in models.items():
            row[name] = _own_step(model, length, batch_size, repeats)
            free_memory()
        row["library"] = _library_steps(models["transformer"], length, batch_size, repeats)
    for name, model in models.items():
        result = row[name]
        result["bytes_read"] = result["bytes_used"] + _weight_bytes(model)
        result["floor_ms"] = result["bytes_read"] / rate * 1e3
        result["share_of_floor"] = result["floor_ms"] / result["step_ms"]
        result["tokens_per_second"] = batch_size / result["step_ms"] * 1e3
    times = {name: ms for name, ms in row["library"].items() if isinstance(ms, float)}
    times["own kernel"] = row["transformer"]["step_ms"]
    row["fastest_transformer"] = min(times, key=lambda name: times[name])
    row["transformer_best_ms"] = times[row["fastest_transformer"]]
    for name in models:
        row[name]["speedup"] = row["transformer_best_ms"] / row[name]["step_ms"]
    row["speedup"] = row["attamba"]["speedup"]
    row["bytes_ratio"] = row["transformer"]["bytes_used"] / row["attamba"]["bytes_used"]
    return row


def _own_step(model: Decoder, length: int, batch_size: int, repeats: int) -> dict[str, Any]:
    import torch

    from attamba.models.graph import CapturedStep

    cache = model.new_cache(batch_size)
    cache.fill(length, torch.Generator().manual_seed(length))
    result = {"bytes_used": cache.nbytes(used=True), "bytes_allocated": cache.nbytes()}
    step = CapturedStep(model, cache)
    ids = torch.zeros(batch_size, 1, dtype=torch.long, device=cache.lengths.device)
    return {**result, **_timed(lambda: step(ids), repeats)}


def _library_steps(
    model: Decoder, length: int, batch_size: int, repeats: int
) -> dict[str, float | str]:
    """Step time (ms) of the transformer with each attention of PyTorch, or why it did not run."""
    from attamba.bench.library import BACKENDS, LibraryStep, captured

    found: dict[str, float | str] = {}
    for name, backend in BACKENDS.items():
        try:
            step = captured(LibraryStep(model, length, batch_size, backend))
            found[name] = _timed(step, repeats)["step_ms"]
            del step
        except RuntimeError as error:  # a card, a shape or a memory that this attention is not for
            found[name] = str(error).splitlines()[0][:200]
        free_memory()
    return found


def _timed(step: Callable[[], object], repeats: int) -> dict[str, float]:
    import torch

    for _ in range(4):  # the first runs eagerly, the second captures
        step()
    readings = []
    for _ in range(max(2, repeats // LOOP + 2)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(LOOP):
            step()
        torch.cuda.synchronize()
        readings.append((time.perf_counter() - start) / LOOP)
    return {"step_ms": common.median_ms(readings), "step_ms_p90": sorted(readings)[-1] * 1e3}


def longest_context(model: Decoder, batch_size: int, itemsize: int) -> dict[str, Any]:
    """The most tokens whose cache fits in the device's free memory, and a step taken there.

    By the formula of the cache, less a twentieth of the memory for the step itself.
    """
    import torch

    from attamba.models.accounting import cache_bytes

    device = model.embed.weight.device
    free_memory()
    budget = int(0.95 * torch.cuda.mem_get_info(device)[0])
    low, high = 1 << 16, 1 << 17
    at_low, at_high = (cache_bytes(model.config, n, itemsize, batch_size) for n in (low, high))
    per_token = (at_high - at_low) / (high - low)
    tokens = low + int((budget - at_low) / per_token)
    return {"tokens": tokens, "bytes": budget, "step_ms": _step_at(model, tokens, batch_size)}


def _step_at(model: Decoder, tokens: int, batch_size: int) -> float | None:
    """Step time (ms) with room for so many tokens really taken, or None where it does not fit."""
    import torch

    from attamba.models.graph import CapturedStep

    with torch.inference_mode():
        try:
            cache = model.new_cache(batch_size)
            for layer in cache.layers:
                kv, boundary = layer.kv, layer.boundary
                assert kv is not None
                if kv.window is None or boundary is None:
                    kv.reserve(tokens)
                else:
                    past = (tokens - kv.window) // boundary.chunk_size
                    kv.reserve(kv.window + past)
                    kv.n_past.fill_(past)
            cache.lengths.fill_(tokens)
            step = CapturedStep(model, cache)
            ids = torch.zeros(batch_size, 1, dtype=torch.long, device=cache.lengths.device)
            return _timed(lambda: step(ids), LOOP)["step_ms"]
        except torch.cuda.OutOfMemoryError:
            return None


def free_memory() -> None:
    """Give back what finished measurements held."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _weight_bytes(model: Decoder) -> int:
    """Bytes of the weights that a step reads: all but the embeddings of tokens not asked for."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embed = model.embed.weight
    return total if model.head.weight is embed else total - embed.numel() * embed.element_size()
