"""The decode cache: what it holds, and what it weighs."""

from __future__ import annotations

import pytest
import torch
from caching import MIXERS, random_ids, small_model, storages
from torch import Tensor

from attamba.models.accounting import cache_bytes
from attamba.modules.cache import KVCache
from attamba.ops.chunk_decode import PAGE, Blocks
from attamba.ops.chunking import make_span

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------
# What is held
# --------------------------------------------------------------------------------------------


def _marked(positions: Tensor, groups: int, width: int = 2) -> Tensor:
    """Keys that hold their position's number, [B, T, G, D]."""
    return positions[..., None, None].expand(-1, -1, groups, width).float()


@pytest.mark.parametrize("window", [1, 5, 16, None])
@pytest.mark.parametrize("ends_of", ["all", "row", "head"])
@pytest.mark.parametrize("most", [1, 3, 40])
def test_the_window_and_earlier_chunk_ends_are_held_and_nothing_else(window, ends_of, most):
    """Positions come in calls of up to `most` tokens, of another number in every row."""
    batch, groups, total = 3, 2, 70
    shape = {"all": (1, 1), "row": (batch, 1), "head": (batch, groups)}[ends_of]
    all_ends = torch.rand(*shape, total) < 0.3
    kv = KVCache(batch, groups, 2, window, ends_of == "head", torch.float32, CPU)
    seen, rng = torch.zeros(batch, dtype=torch.long), torch.Generator().manual_seed(0)
    while (seen < total).any():
        new = torch.minimum(torch.randint(0, most + 1, (batch,), generator=rng), total - seen)
        if ends_of == "all":
            new[:] = new.max().clamp(min=1)
            new = torch.minimum(new, total - seen)
        width = max(int(new.max()), 1)
        mask = torch.arange(width) >= width - new[:, None]
        span = make_span(width, CPU, mask=mask, offsets=seen)
        at = span.positions.clamp(min=0)
        if ends_of == "all":
            ends = all_ends[..., at[0]]
        else:
            ends = all_ends.gather(2, at[:, None].expand(-1, shape[1], -1)) & mask[:, None]
        marks = _marked(span.positions, groups)
        kv.append(marks, -marks, ends, span)
        seen = seen + new
        for row, length in enumerate(seen.tolist()):
            for head in range(groups):
                here = all_ends.expand(batch, groups, -1)[row, head]
                first = 0 if window is None else max(0, length - window)
                want = [s for s in range(first) if here[s]] + list(range(first, length))
                n_past = int(kv.n_past.expand(-1, groups)[row, head])
                held = slice(length - first + n_past)
                assert sorted(kv.k[row, head, held, 0].tolist()) == want
                assert torch.equal(kv.v[row, head, held], -kv.k[row, head, held])
    entries = sum(
        (total if window is None else min(total, window))
        + (0 if window is None else int(all_ends.expand(batch, groups, -1)[b, g, :-window].sum()))
        for b in range(batch)
        for g in range(groups)
    )
    assert kv.used_bytes(seen) == 2 * entries * 2 * 4


def test_entries_are_counted_head_by_head():
    kv = KVCache(1, 2, 2, 4, True, torch.float32, CPU)
    ends = torch.zeros(1, 2, 20, dtype=torch.bool)
    ends[0, 0, :10] = True
    ends[0, 1, [3, 19]] = True
    span = make_span(20, CPU, offsets=torch.zeros(1, dtype=torch.long))
    marks = _marked(span.positions, 2)
    kv.append(marks, marks, ends, span)
    assert kv.n_past.tolist() == [[10, 1]]
    assert kv.used_bytes(torch.tensor([20])) == 2 * (4 + 10 + 4 + 1) * 2 * 4


# --------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------

ENTRY = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, float32


@pytest.mark.parametrize("boundary, scope", [("cyclic", "chunk"), ("head_cyclic", "sequence")])
def test_200_000_tokens_grow_the_cache_by_one_entry_per_chunk_and_nothing_else(boundary, scope):
    model = small_model(boundary=boundary, ssm_scope=scope, chunk_size=8, leading_tokens=64)
    cache, length = model.new_cache(1), 0
    ring, state = 2 * 65 * ENTRY, 2 * 2 * (8 * 4 * 4 + 3 * (8 + 8) * 4)
    for seq in (1_000, 10_001, 65_536, 200_000):
        cache.fill(seq - length)
        length = seq
        entries = 0.0
        for layer in range(2):
            for head in range(2):
                phase = layer * 4 if boundary == "cyclic" else (layer * 4 + head * 4) % 8
                older = range(seq - 65)
                # half an entry: one of the two heads
                entries += 0.5 * sum(t == 0 or (t + 1 + phase) % 8 == 0 for t in older)
        assert cache.nbytes(used=True) == ring + state + entries * ENTRY
        assert cache.nbytes(used=True) == cache_bytes(model.config, seq)
        assert cache.nbytes() <= cache.nbytes(used=True) + 2 * PAGE * ENTRY + 1_000
    # 8.3 times less than an entry per token
    assert 2 * 200_000 * ENTRY / cache.nbytes(used=True) > 7.9

    for t in range(200_000, 200_200):
        before = cache.nbytes(used=True)
        model(random_ids(1, 1), cache=cache)
        grown = 0.0
        for layer in range(2):
            for head in range(2):
                phase = layer * 4 if boundary == "cyclic" else (layer * 4 + head * 4) % 8
                grown += 0.5 * ((t - 65 + 1 + phase) % 8 == 0)
        assert cache.nbytes(used=True) - before == grown * ENTRY
    assert cache.lengths.tolist() == [200_200]


def test_synthetic_tokens_weigh_what_real_ones_do():
    for boundary in ("uniform", "random", {"type": "budget", "max_chunks": 20}):
        model = small_model(boundary=boundary)
        real, synthetic = model.new_cache(2), model.new_cache(2)
        model(random_ids(2, 300), cache=real)
        synthetic.fill(300)
        assert real.nbytes(used=True) == synthetic.nbytes(used=True)
        assert real.nbytes() == synthetic.nbytes()
        assert real.lengths.tolist() == synthetic.lengths.tolist()
    small_model(boundary={"type": "separator", "tokens": [1, 2]}).new_cache(1).fill(100)
    with pytest.raises(ValueError, match="boundary='given' needs ends="):
        small_model(boundary="given").new_cache(1).fill(10)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocated_bytes_are_those_of_every_tensor_in_reach(name, dtype):
    model = small_model(MIXERS[name])
    cache = model.new_cache(2, dtype=dtype)
    assert cache.nbytes() == storages(cache)
    for seq in (1, 40, 1, 700, 1, 1):
        model(random_ids(2, seq), cache=cache)
        assert cache.nbytes() == storages(cache)
    cache.reorder(torch.tensor([1, 0, 1]))
    assert cache.nbytes() == storages(cache)
    block, books = 0, cache.lengths.nbytes
    for layer in cache.layers:
        if layer.kv is not None:
            block += PAGE * 2 * layer.kv.k[:, :, :1].numel() * dtype.itemsize
            books += sum(t.nbytes for t in layer.kv.tensors().values())
        books += 0 if layer.carry is None else layer.carry.nbytes
    if name == "separator":  # rows and layers hold different numbers of ends, the longest decides
        block *= 2
    assert cache.nbytes(used=True) < cache.nbytes() <= cache.nbytes(used=True) + block + books


@pytest.mark.parametrize("name", MIXERS)
def test_bytes_of_a_batch_are_those_of_its_rows(name):
    if name == "separator":
        pytest.skip("its rows hold different numbers of chunk ends")
    model = small_model(MIXERS[name])
    for dtype in (torch.float32, torch.bfloat16):
        cache = model.new_cache(3, dtype=dtype)
        model(random_ids(3, 50), cache=cache)
        want = cache_bytes(model.config, 50, itemsize=dtype.itemsize, batch_size=3)
        assert cache.nbytes(used=True) == want


def test_a_bfloat16_cache_has_half_the_bytes_but_for_the_float32_state():
    model = small_model()
    full, half = model.new_cache(1), model.new_cache(1, dtype=torch.bfloat16)
    for cache in (full, half):
        cache.fill(400)
    state = sum(layer.state.h.nbytes for layer in full.layers)
    assert all(layer.state.h.dtype == torch.float32 for layer in half.layers)
    assert full.nbytes(used=True) - state == 2 * (half.nbytes(used=True) - state)
    assert model.bfloat16().new_cache(1).layers[0].kv.k.dtype == torch.bfloat16


def test_the_transformer_holds_every_token_or_a_ring():
    full, ring = small_model(MIXERS["transformer"]), small_model(MIXERS["window"])
    caches = [full.new_cache(1), ring.new_cache(1)]
    for length in range(1, 41):
        for model, cache in zip((full, ring), caches):
            model(random_ids(1, 1), cache=cache)
        assert caches[0].nbytes(used=True) == 2 * length * ENTRY
        assert caches[1].nbytes(used=True) == 2 * min(length, 20) * ENTRY // 2
    caches[1].fill(2_000)
    assert caches[1].layers[0].kv.k.shape[2] == PAGE, "a ring does not grow"


# --------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------


def test_growth_moves_nothing_and_keeps_blocks_few():
    model = small_model(MIXERS["transformer"])
    cache = model.new_cache(1)
    model(random_ids(1, 300), cache=cache)
    blocks = cache.layers[0].kv.blocks
    first, before = blocks.k[0].data_ptr(), blocks.k[0][0, :, :300].clone()
    for _ in range(230):
        model(random_ids(1, 1), cache=cache)
    assert [b.shape[2] for b in blocks.k] == [2 * PAGE, PAGE]
    assert blocks.k[0].data_ptr() == first and torch.equal(blocks.k[0][0, :, :300], before)
    for entries in range(4 * PAGE, 400 * PAGE, PAGE):
        blocks.reserve(entries)
        assert blocks.capacity <= entries * 9 / 8 + PAGE
    assert len(blocks.k) < 50
    entry = 3 * PAGE + 5
    block, at = blocks.locate(entry)
    assert sum(b.shape[2] for b in blocks.k[:block]) + at == entry
    with pytest.raises(IndexError, match="beyond the capacity"):
        blocks.locate(blocks.capacity)


def test_the_page_table_tells_where_entries_lie():
    blocks = Blocks(2, 3, 4, torch.float32, CPU)
    blocks.reserve(2 * PAGE)
    blocks.page_table()
    blocks.reserve(3 * PAGE)
    for page, line in enumerate(blocks.page_table()[:3].tolist()):
        block, at = blocks.locate(page * PAGE)
        k, v = blocks.k[block], blocks.v[block]
        assert line == [k[:, :, at:].data_ptr(), v[:, :, at:].data_ptr(), k.stride(1)]
