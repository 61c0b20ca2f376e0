"""Best-fit packing: every token once, whole documents, and the bins of a plain best fit."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attamba.data import UNSCORED, DataError, PackedBatches, load_tokenizer, prepare
from attamba.data.packing import best_fit


def plain_best_fit(lengths, capacity):
    """Room left in each bin, by trying every bin for every item."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_bins_are_those_of_a_plain_best_fit(data):
    capacity = data.draw(st.integers(1, 30))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins = best_fit(np.array(lengths, dtype=np.int64), capacity)
    rooms = np.full(len(set(bins.tolist())), capacity)
    np.subtract.at(rooms, bins, lengths)
    assert (rooms >= 0).all()
    assert sorted(rooms.tolist()) == plain_best_fit(lengths, capacity)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Documents of 1 to 150 letters, in several shards."""
    folder = tmp_path_factory.mktemp("packing")
    draw = np.random.default_rng(0)
    lengths = [*draw.integers(1, 40, 60), 63, 64, 65, 150, *draw.integers(1, 20, 30)]
    lines = [json.dumps({"text": "".join(draw.choice(list("abcdefgh"), n))}) for n in lengths]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return prepare(folder / "a.jsonl", folder / "out", load_tokenizer("bytes"), shard_tokens=300)


@pytest.mark.parametrize("seq_len", [1, 7, 64, 200, 2000])
def test_every_token_is_an_input_once(dataset, seq_len):
    batches = PackedBatches(dataset, seq_len=seq_len, batch_size=2, seed=0)
    rows = batches.rows(range(batches.n_windows))
    scored = rows.targets != UNSCORED
    assert rows.n_scored == dataset.n_tokens - 1
    stream = dataset.tokens(0, dataset.n_tokens)
    pairs = np.stack([rows.inputs[scored], rows.targets[scored]], axis=1)
    expected = np.stack([stream[:-1], stream[1:]], axis=1)
    assert sorted(map(tuple, pairs)) == sorted(map(tuple, expected))
    assert batches.filling == pytest.approx(1 - scored.mean())
    assert (rows.inputs[~scored] == 0).all()
    for array in (rows.inputs, rows.targets, rows.doc_ids):
        assert array.shape == (batches.n_windows, seq_len) and array.dtype == np.int64


def test_documents_are_whole_where_they_fit(dataset):
    batches = PackedBatches(dataset, seq_len=64, batch_size=2, seed=0)
    n_pieces = n_begun = 0
    for row in range(batches.n_windows):
        batch = batches.row(row)
        inputs, scored, doc_ids = batch.inputs[0], batch.targets[0] != UNSCORED, batch.doc_ids[0]
        starts = np.flatnonzero(np.diff(doc_ids, prepend=-1))
        assert doc_ids[starts].tolist() == list(range(len(starts)))  # counted in the row
        assert scored.all() or doc_ids[scored].max() < doc_ids[-1]  # the filling is one more
        n_pieces += int(scored[starts].sum())
        n_begun += int((inputs[starts][scored[starts]] == 0).sum())
    lengths = np.diff(np.append(dataset.starts, dataset.n_tokens - 1))
    assert n_begun == dataset.n_documents
    assert n_pieces == sum(-(-int(length) // 64) for length in lengths)
    assert batches.filling < 0.1


def test_every_row_once_per_epoch_as_a_function_of_seed_and_step(dataset):
    def make(seed):
        return PackedBatches(dataset, seq_len=32, batch_size=1, seed=seed)

    first = make(5)
    n = first.n_windows
    run = [tuple(first.batch(step).inputs[0]) for step in range(2 * n)]
    rows = sorted(map(tuple, first.rows(range(n)).inputs))
    assert sorted(run[:n]) == sorted(run[n:]) == rows and run[:n] != run[n:]
    for step in (2 * n - 1, 0, n):
        assert tuple(make(5).batch(step).inputs[0]) == run[step]
    assert [tuple(make(6).batch(step).inputs[0]) for step in range(n)] != run[:n]


@settings(deadline=None, max_examples=40)
@given(fraction=st.floats(0.05, 0.95), seq_len=st.integers(1, 90))
def test_train_and_valid_share_no_token(dataset, fraction, seq_len):
    options = {"seq_len": seq_len, "batch_size": 1, "seed": 0}
    cut = int((1 - fraction) * dataset.n_tokens)
    train = PackedBatches(dataset, stop=1 - fraction, **options)
    valid = PackedBatches(dataset, start=1 - fraction, **options)
    stream = dataset.tokens(0, dataset.n_tokens)
    for batches, part in ((train, stream[:cut]), (valid, stream[cut:])):
        rows = batches.rows(range(batches.n_windows))
        scored = rows.targets != UNSCORED
        pairs = np.stack([rows.inputs[scored], rows.targets[scored]], axis=1)
        expected = np.stack([part[:-1], part[1:]], axis=1)
        assert sorted(map(tuple, pairs)) == sorted(map(tuple, expected))


def test_arguments(dataset):
    with pytest.raises(DataError, match="seq_len=0 must be at least 1"):
        PackedBatches(dataset, seq_len=0, batch_size=1, seed=0)
    with pytest.raises(DataError, match=r"fraction \[0, 0\.0001\) of its \d+ tokens holds no two"):
        PackedBatches(dataset, seq_len=8, batch_size=1, seed=0, stop=0.0001)
    batches = PackedBatches(dataset, seq_len=8, batch_size=1, seed=0)
    for window in (-1, batches.n_windows):
        with pytest.raises(IndexError):
            batches.row(window)
