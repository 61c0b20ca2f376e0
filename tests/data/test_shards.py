import json
import os
from pathlib import Path

import numpy as np
import pytest

from attamba.data import DataError, TokenDataset, is_prepared, load_tokenizer, prepare
from attamba.data import pieces as pieces_module
from attamba.data.tokenizer import ByteTokenizer

TEXTS = ["one two\r\nthree", "Grüße 世界 🎉", "x", "a much longer document\n" * 20, "end"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]))
    return path


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def stream(texts=TEXTS):
    """What the shards hold, end to end."""
    return [i for text in texts for i in (0, *text.encode())]


@pytest.mark.parametrize("shard_tokens", [1, 30, 10_000])
def test_prepared_data_is_the_text(corpus, tmp_path, shard_tokens):
    out = tmp_path / "out"
    dataset = prepare(corpus, out, load_tokenizer("bytes"), shard_tokens=shard_tokens)
    assert is_prepared(out)
    assert dataset.n_tokens == len(stream())
    assert dataset.tokens(0, dataset.n_tokens).tolist() == stream()
    assert dataset.vocab_size == 256
    assert dataset.n_documents == len(TEXTS)
    assert dataset.n_bytes == len("".join(TEXTS).encode())
    assert dataset.n_words == sum(len(text.split()) for text in TEXTS)
    assert dataset.manifest["n_empty"] == 1
    assert dataset.tokenizer.fingerprint == dataset.fingerprint
    for text, document in zip(TEXTS, dataset.documents(), strict=True):
        assert dataset.tokenizer.decode(document.tokens) == text
        assert document.tokens.dtype == np.int64
        assert (document.n_bytes, document.n_words) == (len(text.encode()), len(text.split()))
        assert document.source == str(corpus)
    n_shards = len(dataset.manifest["shards"])
    assert n_shards == {1: 5, 30: 3, 10_000: 1}[shard_tokens]
    dataset.verify()


@pytest.mark.parametrize("shard_tokens", [1, 30, 10_000])
def test_any_span_of_tokens_and_their_documents(corpus, tmp_path, shard_tokens):
    dataset = prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=shard_tokens)
    tokens = np.array(stream())
    ids = np.cumsum(tokens == 0) - 1
    for start in range(0, len(tokens), 7):
        for stop in (start, start + 1, start + 20, len(tokens)):
            stop = min(stop, len(tokens))
            assert np.array_equal(dataset.tokens(start, stop), tokens[start:stop])
            assert np.array_equal(dataset.doc_ids(start, stop), ids[start:stop])
    for method in (dataset.tokens, dataset.doc_ids):
        with pytest.raises(IndexError):
            method(0, len(tokens) + 1)


def test_files_on_disk(corpus, tmp_path):
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes"))
    assert entries(tmp_path / "out") == [
        "documents-00000-000.npy",
        "manifest.json",
        "tokenizer",
        "tokens-00000-000.bin",
    ]
    assert np.fromfile(tmp_path / "out/tokens-00000-000.bin", dtype="<u2").tolist() == stream()
    assert entries(tmp_path) == ["corpus.jsonl", "out"]


class WideTokenizer(ByteTokenizer):
    """Bytes with ids that need 32 bits."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def encode_batch(self, texts):
        return [ids.astype(np.int64) + 65536 for ids in super().encode_batch(texts)]


def test_large_vocabularies_take_four_bytes(corpus, tmp_path):
    dataset = prepare(corpus, tmp_path / "out", WideTokenizer(70_000))
    assert dataset.manifest["dtype"] == "<u4"
    assert dataset.tokens(0, 2).tolist() == [0, 65536 + ord("o")]


def test_ids_beyond_the_vocabulary(corpus, tmp_path):
    with pytest.raises(
        DataError, match=r"the tokenizer made ids up to \d+ for a vocabulary of 256"
    ):
        prepare(corpus, tmp_path / "out", WideTokenizer(256))
    assert entries(tmp_path) == ["corpus.jsonl"]


def test_split_on_text_key_and_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces_module, "BATCH", 4)
    (tmp_path / "a.txt").write_text("# A\na\n# B\nb\n")
    (tmp_path / "b.jsonl").write_text('{"body": "c"}\n')
    seen = []
    dataset = prepare(
        [tmp_path / "a.txt", tmp_path / "b.jsonl"],
        tmp_path / "out",
        load_tokenizer("bytes"),
        split_on="^#",
        text_key="body",
        progress=lambda *done: seen.append(done),
    )
    assert [document.n_bytes for document in dataset.documents()] == [6, 6, 1]
    assert [Path(document.source).name for document in dataset.documents()] == [
        "a.txt",
        "a.txt",
        "b.jsonl",
    ]
    assert seen == [(1, 7, 6), (2, 14, 12), (3, 16, 13)]


def test_bpe(tmp_path, corpus):
    pytest.importorskip("tokenizers")
    from attamba.data import train_bpe

    tokenizer = train_bpe(corpus, 280, tmp_path / "bpe")
    dataset = prepare(corpus, tmp_path / "out", tokenizer)
    again = TokenDataset.open(tmp_path / "out")
    assert [again.tokenizer.decode(d.tokens) for d in again.documents()] == TEXTS
    assert again.fingerprint == tokenizer.fingerprint
    assert dataset.n_tokens < len(stream())


# Whole or not at all


class FailingTokenizer(ByteTokenizer):
    """Breaks at the second batch, as a kill in the middle would."""

    calls = 0

    def encode_batch(self, texts):
        self.calls += 1
        if self.calls > 1:
            raise KeyboardInterrupt
        return super().encode_batch(texts)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(pieces_module, "BATCH", 1)


@pytest.mark.usefixtures("small_batches")
def test_an_interrupted_prepare_leaves_its_whole_shards(corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", FailingTokenizer(), shard_tokens=1)
    (partial,) = tmp_path.glob(".out.*.partial")
    assert {"tokens-00000-000.bin", "part-00000.json"} <= set(entries(partial))
    assert not is_prepared(tmp_path / "out") and not is_prepared(partial)
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=1).verify()
    assert entries(tmp_path) == ["corpus.jsonl", "out"]


@pytest.mark.usefixtures("small_batches")
def test_an_interrupted_prepare_without_a_whole_shard_leaves_nothing(corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", FailingTokenizer())
    assert entries(tmp_path) == ["corpus.jsonl"]


@pytest.mark.usefixtures("small_batches")
def test_an_interrupted_prepare_leaves_the_older_data_whole(corpus, tmp_path):
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes"))
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", FailingTokenizer(), shard_tokens=1)
    dataset = TokenDataset.open(tmp_path / "out")
    dataset.verify()
    assert dataset.tokens(0, dataset.n_tokens).tolist() == stream()


@pytest.mark.usefixtures("small_batches")
def test_a_killed_prepare_leaves_no_folder_that_looks_whole(corpus, tmp_path):
    class Killed(ByteTokenizer):
        calls = 0

        def encode_batch(self, texts):
            self.calls += 1
            if self.calls > 3:
                os._exit(9)
            return super().encode_batch(texts)

    child = os.fork()
    if not child:
        try:
            prepare(corpus, tmp_path / "out", Killed(), shard_tokens=1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not any(is_prepared(path) for path in tmp_path.iterdir())
    assert not (tmp_path / "out").exists()
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes")).verify()


def test_disk_full(corpus, tmp_path, monkeypatch):
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes"))

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(corpus, tmp_path / "out", load_tokenizer("bytes"))
    TokenDataset.open(tmp_path / "out").verify()
    assert entries(tmp_path) == ["corpus.jsonl", "out"]


def test_prepared_data_is_replaced(corpus, tmp_path):
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=1)
    (tmp_path / "new.txt").write_text("new")
    dataset = prepare(tmp_path / "new.txt", tmp_path / "out", load_tokenizer("bytes"))
    assert dataset.tokens(0, dataset.n_tokens).tolist() == stream(["new"])
    assert entries(tmp_path) == ["corpus.jsonl", "new.txt", "out"]
    assert "tokens-00001.bin" not in entries(tmp_path / "out")


def test_nothing_else_is_overwritten(corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    (out / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="out is not empty and holds no prepared data"):
        prepare(corpus, out, load_tokenizer("bytes"))
    assert entries(out) == ["manifest.json", "thesis.txt"]
    with pytest.raises(DataError, match=r"corpus\.jsonl is a file; name a folder"):
        prepare(corpus, corpus, load_tokenizer("bytes"))


def test_an_empty_folder_is_filled(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes")).verify()


def test_arguments(corpus, tmp_path):
    with pytest.raises(DataError, match="shard_tokens=0 must be at least 1"):
        prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=0)
    with pytest.raises(DataError, match="does not exist"):
        prepare(tmp_path / "no.txt", tmp_path / "out", load_tokenizer("bytes"))
    assert entries(tmp_path) == ["corpus.jsonl"]


# Damaged folders


@pytest.fixture
def prepared(corpus, tmp_path):
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes"))
    return tmp_path / "out"


def edit(prepared, **changes):
    manifest = json.loads((prepared / "manifest.json").read_text())
    (prepared / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_truncated_shard(prepared):
    path = prepared / "tokens-00000-000.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    with pytest.raises(
        DataError, match=rf"has {len(data) - 2} bytes, .* {len(data)} bytes; prepare"
    ):
        TokenDataset.open(prepared)


def assert_refused(text, *reads):
    for read in reads:
        with pytest.raises(DataError, match=text):
            read()


@pytest.mark.parametrize("change", [-2, -1, -30, 1, 2, 100])
@pytest.mark.parametrize("shard_tokens", [1, 10_000])
def test_a_shard_of_another_length_than_when_it_was_opened(corpus, tmp_path, change, shard_tokens):
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=shard_tokens)
    path = sorted((tmp_path / "out").glob("tokens-*.bin"))[0]
    dataset = TokenDataset.open(tmp_path / "out")
    size = path.stat().st_size
    os.truncate(path, max(size + change, 0))
    text = (
        rf"out/{path.name} has {max(size + change, 0)} bytes, manifest\.json says {size} bytes "
        rf"\({size // 2} tokens of 2\); restore it or prepare the data anew"
    )
    assert_refused(text, lambda: dataset.tokens(0, 2), lambda: list(dataset.documents()))


def test_a_manifest_that_counts_other_tokens_than_it_lists_bytes(prepared):
    shards = json.loads((prepared / "manifest.json").read_text())["shards"]
    edit(prepared, shards=[{**shards[0], "n_tokens": shards[0]["n_tokens"] + 1}])
    with pytest.raises(
        DataError, match=r"tokens-00000-000\.bin has \d+ bytes, manifest\.json says"
    ):
        TokenDataset.open(prepared).tokens(0, 2)


@pytest.mark.parametrize("size", [0, 3, 50, 128, -1])
def test_documents_that_were_cut_after_they_were_opened(prepared, size):
    dataset = TokenDataset.open(prepared)
    path = prepared / "documents-00000-000.npy"
    full = path.stat().st_size
    os.truncate(path, size % full)
    text = (
        rf"documents-00000-000\.npy cannot be read \(.+\): it has {size % full} bytes, "
        rf"manifest\.json says {full} bytes; restore it or prepare the data anew"
    )
    assert_refused(text, lambda: dataset.doc_ids(0, 2), lambda: list(dataset.documents()))


@pytest.mark.parametrize("name", ["documents-00000-000.npy", "tokenizer/tokenizer_meta.json"])
def test_missing_file(prepared, name):
    (prepared / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing, .*; prepare the data anew"):
        TokenDataset.open(prepared)


def test_altered_shard(prepared):
    path = prepared / "tokens-00000-000.bin"
    data = bytearray(path.read_bytes())
    data[6] ^= 1
    path.write_bytes(data)
    dataset = TokenDataset.open(prepared)
    with pytest.raises(DataError, match=r"tokens-00000-000\.bin was altered"):
        dataset.verify()


def test_tokenizer_of_other_data(prepared):
    edit(prepared, tokenizer={"fingerprint": "0" * 64})
    with pytest.raises(DataError, match="tokenizer did not make these tokens"):
        _ = TokenDataset.open(prepared).tokenizer


def test_version(prepared):
    edit(prepared, version=99)
    with pytest.raises(DataError, match="has version 99, this program reads version 1"):
        TokenDataset.open(prepared)


def test_no_manifest(tmp_path):
    with pytest.raises(DataError, match=r"is no prepared folder \(it has no manifest\.json\)"):
        TokenDataset.open(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}'])
def test_damaged_manifest(prepared, content):
    """It is still no folder of texts: one that lies there would be trained on."""
    (prepared / "manifest.json").write_text(content)
    (prepared / "readme.txt").write_text("no text to train on")
    for path in (prepared, f"file://{prepared}"):
        assert is_prepared(path)
        with pytest.raises(
            DataError,
            match=r"manifest\.json is (damaged|not the manifest).*; restore it or prepare",
        ):
            TokenDataset.open(path)


def test_texts_beside_a_manifest_of_another_kind(tmp_path):
    for content in ("{", '{"format": "other"}'):
        (tmp_path / "manifest.json").write_text(content)
        assert not is_prepared(tmp_path) and not is_prepared(f"file://{tmp_path}")


def test_data_with_a_damaged_manifest_can_be_prepared_anew(prepared, corpus):
    (prepared / "manifest.json").write_text("{")
    assert prepare(corpus, prepared, load_tokenizer("bytes")).n_documents


@pytest.mark.parametrize("change", [{"files": None}, {"files": {"a": 1}}, {"n_tokens": ...}])
def test_manifest_with_missing_entries(prepared, change):
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))
    with pytest.raises(
        DataError, match=r"manifest\.json is damaged .*; restore it or prepare the data"
    ):
        TokenDataset.open(prepared)


def test_an_id_outside_the_vocabulary(prepared):
    tokens = np.memmap(prepared / "tokens-00000-000.bin", dtype="<u2", mode="r+")
    tokens[1] = 256
    tokens.flush()
    dataset = TokenDataset.open(prepared)
    for read in (lambda: dataset.tokens(0, 2), lambda: list(dataset.documents())):
        with pytest.raises(DataError, match=r"holds the token id 256, but its vocabulary has 256"):
            read()


def test_is_prepared_of_other_things(corpus, tmp_path):
    assert not is_prepared(tmp_path)
    assert not is_prepared(corpus)
    assert not is_prepared(tmp_path / "none")
