"""Weighted sources: shares, order, resume, held-out rows."""

import numpy as np
import pytest

from attamba.data import Batches, DataError, MixedBatches, MixedHeldOut, load_tokenizer, prepare
from attamba.data import mixture as mixture_module
from attamba.data.mixture import quotas

SIZES = {"a": 9000, "b": 2500, "c": 400}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Texts of one letter each, so that a row tells where it is from."""
    folder = tmp_path_factory.mktemp("mixture")
    made = []
    for letter, n in SIZES.items():
        (folder / f"{letter}.txt").write_text(letter * (n - 1))
        made.append(prepare(folder / f"{letter}.txt", folder / letter, load_tokenizer("bytes")))
    return made


@pytest.fixture
def make(datasets, monkeypatch):
    monkeypatch.setattr(mixture_module, "BLOCK", 64)

    def make(weights=(6, 1, 1), batch_size=4, seed=0):
        rows = [Batches(d, seq_len=20, batch_size=1, seed=seed) for d in datasets]
        return MixedBatches(rows, weights, batch_size=batch_size, seed=seed)

    return make


def letters(batch):
    return "".join(chr(row[-1]) for row in batch.inputs)


def test_shares_are_exact_in_every_block(make):
    mixed = make()
    for block in range(5):
        drawn = "".join(letters(mixed.batch(step)) for step in range(16 * block, 16 * block + 16))
        assert [drawn.count(letter) for letter in "abc"] == [48, 8, 8]
        assert drawn != "".join(sorted(drawn))


def test_the_order_is_drawn_by_seed_and_block(make):
    def first(seed):
        return "".join(letters(make(seed=seed).batch(step)) for step in range(16))

    assert first(0) == first(0) != first(1)
    assert first(0) != "".join(letters(make().batch(step)) for step in range(16, 32))


def test_a_batch_is_a_function_of_the_step_alone(make):
    mixed = make()
    run = [mixed.batch(step).inputs for step in range(60)]
    for step in (59, 3, 16, 15):
        assert np.array_equal(make().batch(step).inputs, run[step])
        assert np.array_equal(mixed.batch(step).inputs, run[step])


def test_the_order_does_not_depend_on_the_batch_size(make):
    eight = make(batch_size=8).batch(9)
    twos = [make(batch_size=2).batch(step) for step in range(36, 40)]
    assert np.array_equal(eight.inputs, np.concatenate([batch.inputs for batch in twos]))


def test_every_source_is_gone_through_epoch_by_epoch(make):
    mixed = make(weights=(1, 2, 5))
    n = [source.n_windows for source in mixed.sources]
    seen = [[], [], []]
    for row in range(3000):
        source, number = mixed.place(row)
        assert number == len(seen[source])  # none left out, none twice
        seen[source].append(mixed.sources[source].window(number))
    for windows, size in zip(seen, n):
        for epoch in range(len(windows) // size):
            assert sorted(windows[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert len(seen[2]) > 2 * n[2]


def test_rows_of_all_sources_in_the_order_of_the_text(make):
    mixed = make()
    n = [source.n_windows for source in mixed.sources]
    assert mixed.n_windows == sum(n)
    assert letters(mixed.rows([0, n[0] - 1, n[0], n[0] + n[1], sum(n) - 1])) == "aabcc"
    for window in (-1, sum(n)):
        with pytest.raises(IndexError):
            mixed.rows([window])


def test_held_out_rows_are_as_many_as_weights_allow(datasets):
    rows = [Batches(d, seq_len=20, batch_size=1, seed=0) for d in datasets]
    held_out = MixedHeldOut(rows, (2, 1, 1))
    least = rows[2].n_windows
    drawn = letters(held_out.rows(range(held_out.n_windows)))
    assert [drawn.count(letter) for letter in "abc"] == [2 * least, least, least]
    ratio = [d.n_bytes / d.n_tokens for d in datasets]
    assert held_out.bytes_per_token == pytest.approx(np.dot(ratio, [0.5, 0.25, 0.25]))
    assert letters(held_out.batch(1)) == "a"
    with pytest.raises(IndexError):
        held_out.rows([held_out.n_windows])


@pytest.mark.parametrize(
    ("shares", "expected"), [([0.5, 0.5], [4, 3]), ([0.1, 0.9], [1, 6]), ([1 / 3] * 3, [3, 2, 2])]
)
def test_quotas(shares, expected):
    assert quotas(shares, 7) == expected


def test_weights_out_of_range(make):
    for weights in ((1, 1, 0), (1, -1, 1)):
        with pytest.raises(DataError, match=r"weights=\[1, .* must be above 0, one for each"):
            make(weights=weights)
    with pytest.raises(DataError, match=r"a share of 0\.001 is less than one row in 64; leave"):
        make(weights=(1, 998, 1))
    with pytest.raises(DataError, match="step=-1 must be at least 0"):
        make().batch(-1)
