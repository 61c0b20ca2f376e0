"""prepare with several workers: threads where they can share the tokenizer, else processes."""

import pytest
from preparing import content

from attamba.data import DataError, is_prepared, load_tokenizer, prepare, train_bpe
from attamba.data import workers as workers_module


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("threads", [8, 1])
def test_a_tokenizer_with_threads_of_its_own_goes_to_workers(
    corpus, tmp_path, monkeypatch, threads
):
    """To threads, which share it, and, where more are asked for than those, to processes."""
    began = []
    monkeypatch.setattr(workers_module, "THREADS", threads)
    for pool in ("ThreadPoolExecutor", "ProcessPoolExecutor"):
        monkeypatch.setattr(workers_module, pool, noted(getattr(workers_module, pool), began))
    tokenizer = train_bpe(corpus, 300, tmp_path / "bpe")
    one = prepare(corpus, tmp_path / "one", tokenizer)
    seen = []
    two = prepare(
        corpus,
        tmp_path / "two",
        load_tokenizer(tmp_path / "bpe"),
        workers=2,
        progress=lambda *done: seen.append(done),
    )
    two.verify()
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert one.fingerprint == tokenizer.fingerprint
    assert began == ["ThreadPoolExecutor" if threads == 8 else "ProcessPoolExecutor"]
    assert seen[-1] == (500, two.n_tokens, two.n_bytes)


def noted(kind, names):
    """The class, which writes its name down when it is called."""

    def make(*given, **named):
        names.append(kind.__name__)
        return kind(*given, **named)

    return make


@pytest.mark.usefixtures("small_parts")
def test_what_a_thread_raises_is_told(corpus, tmp_path, monkeypatch):
    """And what was whole by then stays: the same call goes on from it."""
    train_bpe(corpus, 300, tmp_path / "bpe")
    tokenizer = load_tokenizer(tmp_path / "bpe")
    encode, calls = type(tokenizer).encode_batch, []

    def failing(self, texts):
        calls.append(0)
        if len(calls) == 7:
            raise DataError("the seventh batch")
        return encode(self, texts)

    with monkeypatch.context() as patched:
        patched.setattr(type(tokenizer), "encode_batch", failing)
        with pytest.raises(DataError, match="the seventh batch"):
            prepare(corpus, tmp_path / "out", tokenizer, workers=2, shard_tokens=300)
    assert not is_prepared(tmp_path / "out")
    (partial,) = tmp_path.glob(".out.*.partial")
    assert list(partial.glob("tokens-*")) and not list(partial.glob(".tokens-*"))
    prepare(corpus, tmp_path / "out", tokenizer, workers=2, shard_tokens=300)
    prepare(corpus, tmp_path / "one", tokenizer, shard_tokens=300)
    assert content(tmp_path / "out") == content(tmp_path / "one")
