"""The invariants of the architecture, on drawn models: every policy, P, L, phase, scope, mixer.

1 one truth, 2 prefix consistency, 3 limits, 4 locality, 5 bytes. (6, kernels = reference, is in
tests/ops.) 560 cases in all.
"""

from __future__ import annotations

import torch
from drawing import (
    LEADS,
    VOCAB,
    assert_close,
    at,
    attamba_mixers,
    build,
    cases,
    ends_for,
    mixers,
    pieces,
)
from hypothesis import given
from hypothesis import strategies as st

from attamba.models import accounting
from attamba.ops.chunking import make_span

lengths = st.integers(1, 60)
seeds = st.integers(0, 10_000)


def _setup(mixer, seq, seed, training=False, batch=3):
    model = build(mixer, training, seed)
    ids = torch.randint(VOCAB, (batch, seq))
    ends = ends_for(model, batch, seq)
    return model, ids, ends, torch.Generator().manual_seed(seed)


@cases(100)
@given(mixers(), lengths, seeds, st.booleans())
def test_one_truth_in_pieces_and_token_by_token(mixer, seq, seed, training):
    model, ids, ends, rng = _setup(mixer, seq, seed, training)
    full = model(ids, **at(ends))
    for cuts in (pieces(seq, rng), [slice(t, t + 1) for t in range(seq)]):
        cache = model.new_cache(3)
        parts = [model(ids[:, cut], cache=cache, **at(ends, columns=cut)) for cut in cuts]
        assert_close(torch.cat(parts, 1), full, f"{len(cuts)} pieces")
        assert cache.lengths.tolist() == [seq] * 3


@cases(100)
@given(mixers(), lengths, seeds, st.booleans())
def test_one_truth_left_padded(mixer, seq, seed, through_cache):
    model, ids, ends, rng = _setup(mixer, seq, seed)
    full = model(ids, **at(ends))
    real = [seq, max(1, seq // 2), max(1, seq - 3)]
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    padded_ends = None if ends is None else torch.rand_like(ends.float()) < 0.5
    for row, n in enumerate(real):
        padded[row, seq - n :], mask[row, seq - n :] = ids[row, :n], True
        if ends is not None:
            padded_ends[:, row, :, seq - n :] = ends[:, row, :, :n]
    if through_cache:
        cache = model.new_cache(3)
        parts = [
            model(
                padded[:, c], attention_mask=mask[:, c], cache=cache, **at(padded_ends, columns=c)
            )
            for c in pieces(seq, rng)
        ]
        out = torch.cat(parts, 1)
        assert cache.lengths.tolist() == real
    else:
        out = model(padded, attention_mask=mask, **at(padded_ends))
    for row, n in enumerate(real):
        assert_close(out[row, seq - n :], full[row, :n], f"row of {n} in {seq}")


@cases(80)
@given(mixers(), lengths, seeds)
def test_one_truth_ragged_rows_that_go_on_at_their_own_pace(mixer, seq, seed):
    """Every call gives each row 0 to 9 more tokens; rows with fewer are padded on the left."""
    model, ids, ends, rng = _setup(mixer, seq, seed)
    full = model(ids, **at(ends))
    real, seen, got = [seq, max(1, seq // 2), max(1, seq - 3)], [0, 0, 0], [[], [], []]
    cache = model.new_cache(3)
    while seen != real:
        news = torch.randint(0, 10, (3,), generator=rng).tolist()
        news = [min(n, r - s) for n, r, s in zip(news, real, seen)]
        width = max(*news, 1)
        padded, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width).bool()
        now = None if ends is None else torch.zeros(*ends.shape[:3], width, dtype=torch.bool)
        for row, n in enumerate(news):
            new = slice(seen[row], seen[row] + n)
            padded[row, width - n :], mask[row, width - n :] = ids[row, new], True
            if ends is not None:
                now[:, row, :, width - n :] = ends[:, row, :, new]
        out = model(padded, attention_mask=mask, cache=cache, **at(now))
        for row, n in enumerate(news):
            got[row].append(out[row, width - n :])
            seen[row] += n
    for row, n in enumerate(real):
        assert_close(torch.cat(got[row]), full[row, :n], f"row {row}")


@cases(60)
@given(mixers(), lengths, seeds)
def test_one_truth_packed(mixer, seq, seed):
    model, ids, ends, _ = _setup(mixer, seq, seed)
    full = model(ids, **at(ends))
    real = [seq, max(1, seq // 2), 1]
    row = torch.cat([ids[i, :n] for i, n in enumerate(real)])
    doc_ids = torch.cat([torch.full((n,), i % 2) for i, n in enumerate(real)])
    packed_ends = None
    if ends is not None:
        packed_ends = torch.cat([ends[:, i : i + 1, :, :n] for i, n in enumerate(real)], -1)
    out = model(row[None], doc_ids=doc_ids[None], **at(packed_ends))[0]
    for i, part in enumerate(out.split(real)):
        assert_close(part, full[i, : real[i]], f"document {i}")


@cases(60)
@given(mixers(), st.integers(2, 60), seeds, st.data())
def test_prefix_consistency(mixer, seq, seed, data):
    """Logits at t do not change when tokens after t are added, removed or changed."""
    model, ids, ends, _ = _setup(mixer, seq, seed)
    keep = data.draw(st.integers(1, seq - 1))
    changed = torch.cat([ids[:, :keep], (ids[:, keep:] + 1) % VOCAB], 1)
    full = model(ids, **at(ends))[:, :keep]
    assert_close(model(changed, **at(ends))[:, :keep], full, "changed")
    assert_close(model(ids[:, :keep], **at(ends, columns=slice(keep))), full, "removed")


@cases(40)
@given(
    attamba_mixers(scopes=("chunk",), policies=["uniform", "cyclic", "random"], leads=LEADS[:-1]),
    lengths,
    seeds,
)
def test_limit_chunks_of_one_token_see_everything(mixer, seq, seed):
    mixer = {**mixer, "chunk_size": 1}
    model, ids, _, _ = _setup(mixer, seq, seed)
    unbounded = build({**mixer, "leading_tokens": None}, seed=seed)
    assert_close(model(ids), unbounded(ids), "P = 1")


@cases(40)
@given(attamba_mixers(leads=[None]), lengths, seeds, st.integers(0, 5))
def test_limit_long_windows_are_full_attention_over_states(mixer, seq, seed, more):
    model, ids, ends, _ = _setup(mixer, seq, seed)
    windowed = build({**mixer, "leading_tokens": seq + more}, seed=seed)
    assert_close(windowed(ids, **at(ends)), model(ids, **at(ends)), "L >= T")
    cut = seq // 2
    cache = windowed.new_cache(3)
    parts = [
        windowed(ids[:, c], cache=cache, **at(ends, columns=c))
        for c in (slice(0, cut), slice(cut, seq))
        if c.start < c.stop
    ]
    assert_close(torch.cat(parts, 1), model(ids, **at(ends)), "L >= T, cached")


@cases(40)
@given(
    attamba_mixers(
        scopes=("chunk",),
        policies=["uniform", "cyclic", "jitter", "random", {"type": "budget", "max_chunks": 6}],
    ),
    st.integers(2, 60),
    seeds,
    st.data(),
)
def test_locality(mixer, seq, seed, data):
    """Changing a token changes the keys and values of its own chunk alone, from it on."""
    model = build(mixer, seed=seed)
    layer = model.layers[data.draw(st.integers(0, 2))].mixer
    changed_at = data.draw(st.integers(0, seq - 1))
    u = torch.randn(1, seq, 32)
    other = u.clone()
    other[:, changed_at] += 1.0
    span = make_span(seq, u.device, tokens=torch.zeros(1, seq, dtype=torch.long))
    ends, _ = layer.boundary(span)
    _, k, v = layer.project(u, ends, span)
    _, k2, v2 = layer.project(other, ends, span)
    chunk_end = changed_at
    while chunk_end < seq - 1 and not ends[0, 0, chunk_end]:
        chunk_end += 1
    own = torch.zeros(seq, dtype=torch.bool)
    own[changed_at : chunk_end + 1] = True
    for a, b in ((k, k2), (v, v2)):
        difference = (a - b).abs().amax((0, 2, 3))
        assert (difference[~own] < 1e-5).all()
        assert difference[changed_at] > 1e-4


@cases(60)
@given(mixers(), st.integers(0, 150), seeds)
def test_bytes(mixer, seq, seed):
    """The cache holds what the formula says, to the byte, at any T."""
    model, ids, ends, rng = _setup(mixer, seq, seed, batch=1)
    if any(getattr(m, "boundary", "") == "given" for m in model.config.layer_mixers()):
        ends = torch.rand(3, 1, 1, seq) < 0.25
    cache = model.new_cache(1)
    for cut in pieces(seq, rng, 30):
        model(ids[:, cut], cache=cache, **at(ends, columns=cut))
    formula_ends = None if ends is None else ends[:, 0]
    want = accounting.cache_bytes(model.config, seq, 4, tokens=ids, ends=formula_ends)
    assert cache.nbytes(used=True) == want
    assert cache.nbytes() >= want


@cases(60)
@given(mixers(), lengths, seeds)
def test_forked_and_reordered_rows_go_on_as_their_own(mixer, seq, seed):
    """Beam search: rows are copied, dropped and swapped, then decoded further."""
    model, ids, ends, _ = _setup(mixer, seq + 5, seed)
    cache = model.new_cache(3)
    model(ids[:, :seq], cache=cache, **at(ends, columns=slice(seq)))
    rows = torch.tensor([2, 0, 0, 2])
    cache.reorder(rows)
    out = [
        model(ids[rows, t : t + 1], cache=cache, **at(ends, rows, slice(t, t + 1)))
        for t in range(seq, seq + 5)
    ]
    assert_close(torch.cat(out, 1), model(ids, **at(ends))[rows, seq:], "forked")
    cache.reset()
    again = model(ids[rows], cache=cache, **at(ends, rows))
    assert_close(again, model(ids, **at(ends))[rows], "after reset")
