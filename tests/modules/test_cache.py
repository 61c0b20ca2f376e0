"""The decode cache: what it holds, what it weighs, and what leaves it alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attamba
from attamba.models import Decoder
from attamba.models.accounting import cache_bytes
from attamba.modules.cache import DecodeCache, KVCache
from attamba.ops.backends import interpreted
from attamba.ops.chunk_decode import PAGE, Blocks
from attamba.ops.chunking import make_span

CPU = torch.device("cpu")


def _model(mixer: Any = None, n_layers: int = 2, **changes: Any) -> Decoder:
    """A small model. Without a mixer: attamba with `changes`."""
    if mixer is None:
        mixer = {
            "type": "attamba",
            "n_heads": 2,
            "ssm_heads": 2,
            "state_dim": 4,
            "leading_tokens": 16,
            **changes,
        }
    config = attamba.ModelConfig(vocab_size=11, dim=16, n_layers=n_layers, ffn_dim=8, mixer=mixer)
    return attamba.build_model(config).eval().requires_grad_(False)


def _ids(batch: int, seq: int) -> Tensor:
    return torch.randint(11, (batch, seq))


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
    model = _model(boundary=boundary, ssm_scope=scope, chunk_size=8, leading_tokens=64)
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
        model(_ids(1, 1), cache=cache)
        grown = 0.0
        for layer in range(2):
            for head in range(2):
                phase = layer * 4 if boundary == "cyclic" else (layer * 4 + head * 4) % 8
                grown += 0.5 * ((t - 65 + 1 + phase) % 8 == 0)
        assert cache.nbytes(used=True) - before == grown * ENTRY
    assert cache.lengths.tolist() == [200_200]


def test_synthetic_tokens_weigh_what_real_ones_do():
    for boundary in ("uniform", "random", {"type": "budget", "max_chunks": 20}):
        model = _model(boundary=boundary)
        real, synthetic = model.new_cache(2), model.new_cache(2)
        model(_ids(2, 300), cache=real)
        synthetic.fill(300)
        assert real.nbytes(used=True) == synthetic.nbytes(used=True)
        assert real.nbytes() == synthetic.nbytes()
        assert real.lengths.tolist() == synthetic.lengths.tolist()
    _model(boundary={"type": "separator", "tokens": [1, 2]}).new_cache(1).fill(100)
    with pytest.raises(ValueError, match="boundary='given' needs ends="):
        _model(boundary="given").new_cache(1).fill(10)


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object."""
    leaves = (str, int, float, type(None), torch.dtype, torch.device, type)
    if id(thing) in seen or isinstance(thing, leaves):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from _tensors(value, seen)
    else:
        yield from _tensors(vars(thing), seen)


def _storages(cache: DecodeCache) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in _tensors(cache, set())}
    return sum(s.nbytes() for s in storages.values())


MIXERS: dict[str, Any] = {
    "attamba": None,
    "separator": {
        "type": "attamba",
        "n_heads": 2,
        "ssm_heads": 2,
        "boundary": {"type": "separator", "tokens": [1]},
        "leading_tokens": 3,
    },
    "per head": {
        "type": "attamba",
        "n_heads": 4,
        "n_kv_heads": 2,
        "kv_proj": True,
        "ssm_heads": 2,
        "boundary": "head_cyclic",
        "ssm_scope": "sequence",
        "leading_tokens": 0,
        "chunk_size": 3,
    },
    "unbounded": {"type": "attamba", "n_heads": 2, "ssm_heads": 2, "leading_tokens": None},
    "transformer": {"type": "transformer", "n_heads": 2},
    "window": {"type": "transformer", "n_heads": 2, "window": 20, "head_dim": 4},
    "mean": {"type": "attamba", "n_heads": 2, "compressor": "mean", "leading_tokens": 3},
    "gated": {"type": "attamba", "n_heads": 2, "compressor": "gated", "leading_tokens": 3},
    "mamba2": {"type": "mamba2", "head_dim": 8, "state_dim": 4},
    "mingru": {"type": "mingru"},
    "minlstm": {"type": "minlstm", "conv_width": 1},
    "hawk": [{"type": "hawk", "n_blocks": 2}, {"type": "transformer", "n_heads": 2}],
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocated_bytes_are_those_of_every_tensor_in_reach(name, dtype):
    model = _model(MIXERS[name])
    cache = model.new_cache(2, dtype=dtype)
    assert cache.nbytes() == _storages(cache)
    for seq in (1, 40, 1, 700, 1, 1):
        model(_ids(2, seq), cache=cache)
        assert cache.nbytes() == _storages(cache)
    cache.reorder(torch.tensor([1, 0, 1]))
    assert cache.nbytes() == _storages(cache)
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
    model = _model(MIXERS[name])
    for dtype in (torch.float32, torch.bfloat16):
        cache = model.new_cache(3, dtype=dtype)
        model(_ids(3, 50), cache=cache)
        want = cache_bytes(model.config, 50, itemsize=dtype.itemsize, batch_size=3)
        assert cache.nbytes(used=True) == want


def test_a_bfloat16_cache_has_half_the_bytes_but_for_the_float32_state():
    model = _model()
    full, half = model.new_cache(1), model.new_cache(1, dtype=torch.bfloat16)
    for cache in (full, half):
        cache.fill(400)
    state = sum(layer.state.h.nbytes for layer in full.layers)
    assert all(layer.state.h.dtype == torch.float32 for layer in half.layers)
    assert full.nbytes(used=True) - state == 2 * (half.nbytes(used=True) - state)
    assert model.bfloat16().new_cache(1).layers[0].kv.k.dtype == torch.bfloat16


def test_the_transformer_holds_every_token_or_a_ring():
    full, ring = _model(MIXERS["transformer"]), _model(MIXERS["window"])
    caches = [full.new_cache(1), ring.new_cache(1)]
    for length in range(1, 41):
        for model, cache in zip((full, ring), caches):
            model(_ids(1, 1), cache=cache)
        assert caches[0].nbytes(used=True) == 2 * length * ENTRY
        assert caches[1].nbytes(used=True) == 2 * min(length, 20) * ENTRY // 2
    caches[1].fill(2_000)
    assert caches[1].layers[0].kv.k.shape[2] == PAGE, "a ring does not grow"


# --------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------


def test_growth_moves_nothing_and_keeps_blocks_few():
    model = _model(MIXERS["transformer"])
    cache = model.new_cache(1)
    model(_ids(1, 300), cache=cache)
    blocks = cache.layers[0].kv.blocks
    first, before = blocks.k[0].data_ptr(), blocks.k[0][0, :, :300].clone()
    for _ in range(230):
        model(_ids(1, 1), cache=cache)
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


@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", ["attamba", "per head"])
def test_a_model_steps_in_kernels(name):
    pytest.importorskip("triton")
    model = _model(MIXERS[name])
    ids = _ids(2, 13)
    full, cache = model(ids), model.new_cache(2)
    parts = [model(ids[:, :9], cache=cache)]
    for layer, held in zip(model.layers, cache.layers):
        held.kv.backend = layer.mixer.compressors.backend = "triton"
        held.stacked = layer.mixer.stacked_projections()
    assert cache.by_kernel
    parts += [model(ids[:, t : t + 1], cache=cache) for t in range(9, 13)]
    assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)
    before = _row(cache, 1)
    model(ids[:, :1], cache=cache, attention_mask=torch.tensor([[True], [False]]))
    assert all(torch.equal(tensor, before[key]) for key, tensor in _row(cache, 1).items())
    assert cache.nbytes() == _storages(cache) - sum(h.stacked.nbytes for h in cache.layers)


# --------------------------------------------------------------------------------------------
# Reset, reorder, frozen rows
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
def test_reset_gives_memory_back_and_forgets_everything(name):
    model = _model(MIXERS[name])
    cache, fresh = model.new_cache(2), model.new_cache(2)
    empty = fresh.nbytes()
    model(_ids(2, 400), cache=cache)
    assert cache.nbytes() >= empty
    if any(layer.kv is not None for layer in cache.layers):
        assert cache.nbytes() > empty
    cache.reset()
    assert cache.nbytes() == _storages(cache) == empty
    assert cache.lengths.tolist() == [0, 0] and cache.batch_size == 2
    ids = _ids(2, 33)
    assert torch.equal(model(ids, cache=cache), model(ids, cache=fresh))


def _row(cache: DecodeCache, row: int) -> dict[str, Tensor]:
    out = {"length": cache.lengths[row].clone()}
    for i, layer in enumerate(cache.layers):
        tensors = {}
        if layer.kv is not None:
            tensors |= {"k": layer.kv.k, "v": layer.kv.v, **layer.kv.tensors()}
        if layer.state is not None:
            tensors |= layer.state.tensors()
        for name, tensor in tensors.items():
            out[f"{i}.{name}"] = tensor[row].clone()
        if layer.carry is not None:
            out[f"{i}.carry"] = layer.carry[row].clone()
    return out


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("width", [1, 7])
def test_a_row_that_is_padding_alone_stays_as_it_is(name, width):
    model = _model(MIXERS[name])
    cache = model.new_cache(3)
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[2, :29] = False
    model(_ids(3, 30), cache=cache, attention_mask=mask)
    before = _row(cache, 1)
    for seq in [300] + 20 * [width]:
        mask = torch.ones(3, seq, dtype=torch.bool)
        mask[1] = False
        model(_ids(3, seq), cache=cache, attention_mask=mask)
    after = _row(cache, 1)
    assert cache.lengths.tolist()[1] == 30 and cache.lengths[0] > 300
    for key, old in before.items():
        new = after[key]
        if key.endswith((".k", ".v")):  # the buffers have grown with the other rows
            new = new[:, : old.shape[1]]
        assert torch.equal(new, old), key
    ids = _ids(3, 5)
    cache.reorder(torch.tensor([1, 1, 1]))
    logits = model(ids, cache=cache)
    assert torch.isfinite(logits).all()


def test_a_row_may_be_padding_from_the_start():
    model = _model()
    cache, alone = model.new_cache(2), model.new_cache(1)
    for width in (1, 4):
        mask = torch.tensor([[True], [False]]).expand(2, width)
        ids = _ids(2, width)
        logits = model(ids, cache=cache, attention_mask=mask)
        assert torch.allclose(logits[:1], model(ids[:1], cache=alone), atol=1e-5)
        assert logits.isfinite().all()
    assert cache.lengths.tolist() == [5, 0]
    nothing = model.new_cache(2)
    logits = model(_ids(2, 1), cache=nothing, attention_mask=torch.zeros(2, 1))
    assert logits.isfinite().all() and nothing.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("name", MIXERS)
def test_reorder_copies_rows(name):
    model = _model(MIXERS[name])
    cache = model.new_cache(2)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7] = False
    model(
        torch.stack([torch.arange(40) % 11, torch.arange(40) % 9]), cache=cache, attention_mask=mask
    )
    rows = [_row(cache, 0), _row(cache, 1)]
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.batch_size == 3
    for new, old in enumerate((1, 1, 0)):
        for key, tensor in _row(cache, new).items():
            assert torch.equal(tensor, rows[old][key]), key
    # copies share nothing: one goes on, the other stays
    mask = torch.tensor([[True], [False], [False]])
    model(_ids(3, 1), cache=cache, attention_mask=mask)
    for key, tensor in _row(cache, 1).items():
        assert torch.equal(tensor, rows[1][key]), key


@pytest.mark.parametrize(
    "index, text",
    [
        (torch.tensor([[0]]), r"index must be int64 \[B'\], not torch.int64 \[1, 1\]"),
        (torch.tensor([0.0]), r"index must be int64 \[B'\], not torch.float32 \[1\]"),
        (torch.tensor([0], dtype=torch.int32), r"not torch.int32 \[1\]"),
        (torch.tensor([0, 2]), r"index=\[0, 2\] must name rows 0..1"),
        (torch.tensor([-1]), r"index=\[-1\] must name rows 0..1"),
    ],
)
def test_reorder_errors(index, text):
    cache = _model().new_cache(2)
    with pytest.raises(ValueError, match=text):
        cache.reorder(index)


def test_a_cache_needs_a_row():
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        _model().new_cache(0)


def test_a_call_that_fails_leaves_the_cache_as_it_was():
    model = _model()
    cache = model.new_cache(2)
    model(_ids(2, 20), cache=cache)
    before = _row(cache, 0)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(torch.full((2, 1), 11), cache=cache)
    with pytest.raises(ValueError, match="right of a token"):
        mask = torch.tensor([[True, False], [True, True]])
        model(_ids(2, 2), cache=cache, attention_mask=mask)
    for key, tensor in _row(cache, 0).items():
        assert torch.equal(tensor, before[key]), key
