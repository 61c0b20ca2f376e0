import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attamba.data import Batches, DataError, load_tokenizer, prepare, train_bpe
from attamba.data.loader import draw_order

N_TOKENS = 1000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """1000 tokens: documents of 1 to 30 letters, in several shards."""
    folder = tmp_path_factory.mktemp("loader")
    draw = np.random.default_rng(0)
    lines, left = [], N_TOKENS
    while left > 31:
        n = int(draw.integers(1, 31))
        lines.append("".join(draw.choice(list("abcdefgh"), n)))
        left -= n + 1
    lines.append("z" * (left - 1))
    (folder / "a.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    dataset = prepare(folder / "a.jsonl", folder / "out", load_tokenizer("bytes"), shard_tokens=90)
    assert dataset.n_tokens == N_TOKENS
    return dataset


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("inputs", "targets", "doc_ids")
    )


@pytest.mark.parametrize("seq_len", [1, 7, 64, 999])
def test_windows_cover_the_text_without_overlap(dataset, seq_len):
    batches = Batches(dataset, seq_len=seq_len, batch_size=2, seed=0)
    assert batches.n_windows == (N_TOKENS - 1) // seq_len
    tokens = dataset.tokens(0, N_TOKENS)
    rows = batches.rows(range(batches.n_windows))
    n = batches.n_windows * seq_len
    assert np.array_equal(rows.inputs.ravel(), tokens[:n])
    assert np.array_equal(rows.targets.ravel(), tokens[1 : n + 1])
    for array in (rows.inputs, rows.targets, rows.doc_ids):
        assert array.dtype == np.int64
        assert array.shape == (batches.n_windows, seq_len)
        assert array.flags.c_contiguous


def test_doc_ids_are_counted_per_row_from_its_first_token(dataset):
    rows = Batches(dataset, seq_len=64, batch_size=1, seed=0).rows(range(15))
    for inputs, doc_ids in zip(rows.inputs, rows.doc_ids):
        starts = inputs == 0
        starts[0] = False  # the first token is in document 0, be it an eos or not
        assert np.array_equal(doc_ids, np.cumsum(starts))
    assert rows.doc_ids.max() > 1


def test_row(dataset):
    batches = Batches(dataset, seq_len=64, batch_size=4, seed=3)
    assert same(batches.row(2), batches.rows([2]))
    assert batches.row(2).inputs.shape == (1, 64)
    for i in (-1, batches.n_windows):
        with pytest.raises(IndexError):
            batches.row(i)


@pytest.mark.parametrize("batch_size", [1, 4, 15, 40])
def test_every_window_once_per_epoch(dataset, batch_size):
    """Also where batches reach over epochs, once or several times."""
    batches = Batches(dataset, seq_len=64, batch_size=batch_size, seed=1)
    windows = {tuple(row) for row in batches.rows(range(batches.n_windows)).inputs}
    assert len(windows) == batches.n_windows == 15
    steps = -(-6 * batches.n_windows // batch_size)
    rows = [tuple(row) for step in range(steps) for row in batches.batch(step).inputs]
    epochs = [rows[i : i + 15] for i in range(0, 6 * 15, 15)]
    assert all(set(epoch) == windows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6  # shuffled anew


def test_a_batch_is_a_function_of_seed_and_step(dataset):
    options = {"seq_len": 16, "batch_size": 7}
    first = Batches(dataset, seed=5, **options)
    run = [first.batch(step) for step in range(40)]
    for step in (39, 0, 17, 17, 8):
        assert same(first.batch(step), run[step])
        assert same(Batches(dataset, seed=5, **options).batch(step), run[step])
    other = Batches(dataset, seed=6, **options)
    assert not same(other.batch(0), run[0])


def test_the_order_does_not_depend_on_the_batch_size(dataset):
    """So that accumulation and the number of processes do not change what is learned from."""
    eight = Batches(dataset, seq_len=16, batch_size=8, seed=5).batch(3)
    twos = [
        Batches(dataset, seq_len=16, batch_size=2, seed=5).batch(step) for step in range(12, 16)
    ]
    assert np.array_equal(eight.inputs, np.concatenate([batch.inputs for batch in twos]))


def test_the_order_is_fixed_for_ever():
    """A change here would change every resumed run."""
    assert draw_order(8, seed=0, epoch=0).tolist() == ORDER_0
    assert draw_order(8, seed=1, epoch=2).tolist() == ORDER_1


ORDER_0 = [0, 2, 1, 5, 4, 3, 6, 7]
ORDER_1 = [4, 2, 0, 6, 1, 5, 7, 3]


@settings(deadline=None, max_examples=60)
@given(fraction=st.floats(0.05, 0.95), seq_len=st.integers(1, 20))
def test_train_and_valid_share_no_token(dataset, fraction, seq_len):
    options = {"seq_len": seq_len, "batch_size": 1, "seed": 0}
    train = Batches(dataset, stop=1 - fraction, **options)
    valid = Batches(dataset, start=1 - fraction, **options)
    cut = int((1 - fraction) * N_TOKENS)
    tokens = dataset.tokens(0, N_TOKENS)
    last = train.row(train.n_windows - 1)
    assert train.n_windows * seq_len + 1 <= cut < (train.n_windows + 1) * seq_len + 1
    assert last.targets[0, -1] == tokens[train.n_windows * seq_len]
    assert np.array_equal(valid.row(0).inputs[0], tokens[cut : cut + seq_len])
    assert cut + valid.n_windows * seq_len + 1 <= N_TOKENS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"seq_len": 1000},
            r"fraction \[0, 1\) of its 1000 tokens is 1000 tokens, and one window "
            r"of seq_len=1000 needs 1001; give more text",
        ),
        ({"start": 0.99}, r"fraction \[0\.99, 1\) of its 1000 tokens is 10 tokens"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"start": 0.5, "stop": 0.5}, r"start=0\.5, stop=0\.5 must be fractions"),
        ({"stop": 1.5}, "must be fractions"),
    ],
)
def test_arguments(dataset, options, message):
    with pytest.raises(DataError, match=message):
        Batches(dataset, **{"seq_len": 64, "batch_size": 2, "seed": 0, **options})


def test_negative_step(dataset):
    with pytest.raises(DataError, match="step=-1 must be at least 0"):
        Batches(dataset, seq_len=64, batch_size=2, seed=0).batch(-1)


def test_bytes_per_token_are_those_of_the_rows(tmp_path):
    """Of a document that is cut, its mean share; a document's separator counts."""
    (tmp_path / "train.txt").write_text("abc abc abd " * 50)
    tokenizer = train_bpe(tmp_path / "train.txt", 264, tmp_path / "bpe")
    lines = [json.dumps({"text": text}) for text in ("abc" * 9, "zyx" * 9, "abd abc", "q" * 30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    dataset = prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, shard_tokens=20)
    lengths = [len(document.tokens) + 1 for document in dataset.documents()]
    shares = [d.n_bytes / n for d, n in zip(dataset.documents(), lengths)]
    of_tokens = np.repeat(shares, lengths)
    n = dataset.n_tokens
    assert len(set(shares)) == 4 and len(dataset.manifest["shards"]) > 1
    for start, stop in [(0, n), (0, n - 7), (n - 7, n), (3, 6), (5, n - 12)]:
        fractions = {"start": start / n + 1e-9, "stop": min(1, stop / n + 1e-9)}
        batches = Batches(dataset, seq_len=1, batch_size=1, seed=0, **fractions)
        assert batches.bytes_per_token == pytest.approx(of_tokens[start:stop].mean())
