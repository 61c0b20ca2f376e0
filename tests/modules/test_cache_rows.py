"""The decode cache: resetting and reordering it, and what leaves its rows alone."""

from __future__ import annotations

import pytest
import torch
from caching import MIXERS, random_ids, row_of, small_model, storages

from attamba.ops.backends import interpreted


@pytest.mark.parametrize("name", MIXERS)
def test_reset_gives_memory_back_and_forgets_everything(name):
    model = small_model(MIXERS[name])
    cache, fresh = model.new_cache(2), model.new_cache(2)
    empty = fresh.nbytes()
    model(random_ids(2, 400), cache=cache)
    assert cache.nbytes() >= empty
    if any(layer.kv is not None for layer in cache.layers):
        assert cache.nbytes() > empty
    cache.reset()
    assert cache.nbytes() == storages(cache) == empty
    assert cache.lengths.tolist() == [0, 0] and cache.batch_size == 2
    ids = random_ids(2, 33)
    assert torch.equal(model(ids, cache=cache), model(ids, cache=fresh))


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("width", [1, 7])
def test_a_row_that_is_padding_alone_stays_as_it_is(name, width):
    model = small_model(MIXERS[name])
    cache = model.new_cache(3)
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[2, :29] = False
    model(random_ids(3, 30), cache=cache, attention_mask=mask)
    before = row_of(cache, 1)
    for seq in [300] + 20 * [width]:
        mask = torch.ones(3, seq, dtype=torch.bool)
        mask[1] = False
        model(random_ids(3, seq), cache=cache, attention_mask=mask)
    after = row_of(cache, 1)
    assert cache.lengths.tolist()[1] == 30 and cache.lengths[0] > 300
    for key, old in before.items():
        new = after[key]
        if key.endswith((".k", ".v")):  # the buffers have grown with the other rows
            new = new[:, : old.shape[1]]
        assert torch.equal(new, old), key
    ids = random_ids(3, 5)
    cache.reorder(torch.tensor([1, 1, 1]))
    logits = model(ids, cache=cache)
    assert torch.isfinite(logits).all()


def test_a_row_may_be_padding_from_the_start():
    model = small_model()
    cache, alone = model.new_cache(2), model.new_cache(1)
    for width in (1, 4):
        mask = torch.tensor([[True], [False]]).expand(2, width)
        ids = random_ids(2, width)
        logits = model(ids, cache=cache, attention_mask=mask)
        assert torch.allclose(logits[:1], model(ids[:1], cache=alone), atol=1e-5)
        assert logits.isfinite().all()
    assert cache.lengths.tolist() == [5, 0]
    nothing = model.new_cache(2)
    logits = model(random_ids(2, 1), cache=nothing, attention_mask=torch.zeros(2, 1))
    assert logits.isfinite().all() and nothing.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("name", MIXERS)
def test_reorder_copies_rows(name):
    model = small_model(MIXERS[name])
    cache = model.new_cache(2)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :7] = False
    model(
        torch.stack([torch.arange(40) % 11, torch.arange(40) % 9]), cache=cache, attention_mask=mask
    )
    rows = [row_of(cache, 0), row_of(cache, 1)]
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.batch_size == 3
    for new, old in enumerate((1, 1, 0)):
        for key, tensor in row_of(cache, new).items():
            assert torch.equal(tensor, rows[old][key]), key
    # copies share nothing: one goes on, the other stays
    mask = torch.tensor([[True], [False], [False]])
    model(random_ids(3, 1), cache=cache, attention_mask=mask)
    for key, tensor in row_of(cache, 1).items():
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
    cache = small_model().new_cache(2)
    with pytest.raises(ValueError, match=text):
        cache.reorder(index)


def test_a_cache_needs_a_row():
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        small_model().new_cache(0)


def test_a_call_that_fails_leaves_the_cache_as_it_was():
    model = small_model()
    cache = model.new_cache(2)
    model(random_ids(2, 20), cache=cache)
    before = row_of(cache, 0)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(torch.full((2, 1), 11), cache=cache)
    with pytest.raises(ValueError, match="right of a token"):
        mask = torch.tensor([[True, False], [True, True]])
        model(random_ids(2, 2), cache=cache, attention_mask=mask)
    for key, tensor in row_of(cache, 0).items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", ["attamba", "per head"])
def test_a_model_steps_in_kernels(name):
    pytest.importorskip("triton")
    model = small_model(MIXERS[name])
    ids = random_ids(2, 13)
    full, cache = model(ids), model.new_cache(2)
    parts = [model(ids[:, :9], cache=cache)]
    for layer, held in zip(model.layers, cache.layers):
        held.kv.backend = layer.mixer.compressors.backend = "triton"
        held.stacked = layer.mixer.stacked_projections()
    assert cache.by_kernel
    parts += [model(ids[:, t : t + 1], cache=cache) for t in range(9, 13)]
    assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)
    before = row_of(cache, 1)
    model(ids[:, :1], cache=cache, attention_mask=torch.tensor([[True], [False]]))
    assert all(torch.equal(tensor, before[key]) for key, tensor in row_of(cache, 1).items())
    assert cache.nbytes() == storages(cache) - sum(h.stacked.nbytes for h in cache.layers)
