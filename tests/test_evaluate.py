"""Scores against a plain loop, each token once, with the context that is promised."""

import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attamba
from attamba.config import ConfigError
from attamba.data import Document, load_tokenizer, prepare
from attamba.dial import measure_cache, redial, sweep
from attamba.evaluate import EvalResult, evaluate, held_out_documents
from attamba.models.accounting import cache_bytes

TOKENIZER = load_tokenizer("bytes")
TEXTS = ["The cat sat on the mat.", "é", "x" * 150, "Grüße aus Köln, " * 20]


def build(**mixer: object) -> attamba.Decoder:
    mixer = {"n_heads": 4, "chunk_size": 4, "leading_tokens": 5, **mixer}
    config = attamba.ModelConfig(vocab_size=256, dim=32, n_layers=2, mixer=mixer)  # type: ignore[arg-type]
    return attamba.build_model(config)


@pytest.fixture(scope="module")
def model() -> attamba.Decoder:
    torch.manual_seed(0)
    return build()


@torch.no_grad()
def reference(model: attamba.Decoder, text: str, context: int, stride: int) -> list[float]:
    """Nats of each token of one document, a forward pass for each."""
    ids = [0, *text.encode()]
    nats = []
    for target in range(1, len(ids)):
        begin = 0
        if target > context:
            k = -(-(target - context) // stride)  # the first window that reaches it
            begin = min(k * stride, len(ids) - 1 - context)
        logits = model(torch.tensor([ids[begin:target]]))[0, -1]
        nats.append(float(F.cross_entropy(logits, torch.tensor(ids[target]))))
    return nats


def _total(result: EvalResult) -> float:
    return result.nats_per_token * result.n_tokens


# --------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "stride"), [(16, 8), (16, 16), (16, 1), (7, 3), (1, 1)])
def test_windows_score_what_a_plain_loop_scores(model, context, stride):
    texts = [*TEXTS[:2], "y" * 37]
    result = evaluate(model, TOKENIZER, texts, context=context, stride=stride, batch_size=3)
    expected = [n for text in texts for n in reference(model, text, context, stride)]
    assert result.n_tokens == len(expected)
    assert _total(result) == pytest.approx(sum(expected), rel=1e-5)
    assert (result.context, result.stride) == (context, stride)


def test_a_long_window_is_the_whole_document(model):
    whole = evaluate(model, TOKENIZER, TEXTS, context=None)
    window = evaluate(model, TOKENIZER, TEXTS, context=1024)
    assert _total(whole) == pytest.approx(_total(window), rel=1e-5)
    assert (whole.context, whole.stride) == (None, None)
    assert (window.context, window.stride) == (1024, 512)
    assert [b.n for b in whole.by_position] == [b.n for b in window.by_position]


def test_whole_documents_go_through_the_cache_in_pieces(model, monkeypatch):
    at_once = evaluate(model, TOKENIZER, TEXTS, context=None)
    monkeypatch.setattr("attamba.evaluate.PIECE", 13)
    monkeypatch.setattr("attamba.evaluate.LOGITS", 256 * 5)
    pieces = evaluate(model, TOKENIZER, TEXTS, context=None)
    assert _total(pieces) == pytest.approx(_total(at_once), rel=1e-5)


def test_batches_and_logits_in_slices_change_nothing(model, monkeypatch):
    one = evaluate(model, TOKENIZER, TEXTS, context=32, batch_size=1)
    monkeypatch.setattr("attamba.evaluate.LOGITS", 256 * 5)
    many = evaluate(model, TOKENIZER, TEXTS, context=32, batch_size=64)
    assert _total(one) == pytest.approx(_total(many), rel=1e-5)


@pytest.mark.parametrize("mixer", [{"boundary": {"type": "separator", "tokens": [32]}}, {}])
def test_the_dial_shows(model, mixer):
    base = evaluate(model, TOKENIZER, TEXTS, context=64)
    other = redial(model, {"mixer.chunk_size": 16, **{f"mixer.{k}": v for k, v in mixer.items()}})
    assert evaluate(other, TOKENIZER, TEXTS, context=64).nats_per_token != base.nats_per_token


def test_measures(model):
    result = evaluate(model, TOKENIZER, TEXTS)
    total, text = _total(result), "".join(TEXTS)
    assert result.n_bytes == len(text.encode()) == result.n_tokens
    assert result.n_words == sum(len(t.split()) for t in TEXTS)
    assert result.n_documents == 4
    assert result.perplexity == pytest.approx(math.exp(total / result.n_tokens))
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / result.n_bytes)
    words = evaluate(model, TOKENIZER, TEXTS[:1])
    assert words.n_words == 6
    assert words.word_perplexity == pytest.approx(math.exp(_total(words) / 6))


def test_a_uniform_model_scores_the_vocabulary():
    model = build()
    torch.nn.init.zeros_(model.head.weight)
    result = evaluate(model, TOKENIZER, TEXTS)
    assert result.perplexity == pytest.approx(256)
    assert result.bits_per_byte == pytest.approx(8)


def test_by_position(model):
    texts = ["a" * 40, "b" * 17, "c" * 16]
    result = evaluate(model, TOKENIZER, texts, context=8)
    buckets = result.by_position
    assert [(b.start, b.stop, b.n) for b in buckets] == [(0, 16, 48), (16, 32, 17), (32, 64, 8)]
    assert sum(b.nats * b.n for b in buckets) == pytest.approx(_total(result))
    nats = reference(model, texts[0], 8, 4)[32:]
    assert buckets[2].nats == pytest.approx(sum(nats) / 8, rel=1e-5)


def test_the_mode_of_the_model_comes_back():
    model = build(boundary="random").train()
    model.set_draw(1)
    first = evaluate(model, TOKENIZER, TEXTS)
    model.set_draw(2)
    assert evaluate(model, TOKENIZER, TEXTS) == first
    assert model.training


def test_figures_become_json():
    model = build()
    model.head.weight.data *= 1000
    result = evaluate(model, TOKENIZER, ["x" * 100])
    assert result.word_perplexity == math.inf
    tree = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert tree["word_perplexity"] is None
    assert tree["by_position"][0]["n"] == 16


# --------------------------------------------------------------------------------------------
# Documents and limits
# --------------------------------------------------------------------------------------------


def test_texts_documents_and_prepared_ones_are_the_same(model, tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    dataset = prepare([tmp_path], tmp_path / "out", TOKENIZER)
    results = [
        evaluate(model, TOKENIZER, TEXTS),
        evaluate(model, TOKENIZER, [Document(text, "here") for text in TEXTS]),
        evaluate(model, TOKENIZER, dataset.documents()),
    ]
    assert results[0] == results[1] == results[2]


def test_max_documents(model):
    assert evaluate(model, TOKENIZER, TEXTS, max_documents=2).n_documents == 2
    endless = (text for text in iter(lambda: "abc", None))
    assert evaluate(model, TOKENIZER, endless, max_documents=3).n_tokens == 9


def test_max_tokens_cuts_a_document_with_its_words_and_bytes(model):
    texts = ["one two", "three four five six", "never read"]
    cut = evaluate(model, TOKENIZER, texts, max_tokens=20)
    assert (cut.n_tokens, cut.n_bytes, cut.n_words, cut.n_documents) == (20, 20, 5, 2)
    assert _total(cut) == pytest.approx(
        _total(evaluate(model, TOKENIZER, ["one two", "three four fi"])), rel=1e-6
    )
    exact = evaluate(model, TOKENIZER, texts, max_tokens=7)
    assert (exact.n_tokens, exact.n_documents, exact.n_words) == (7, 1, 2)


@pytest.mark.parametrize("limit", [3, 4, 5])
def test_max_tokens_cuts_no_character(model, limit):
    result = evaluate(model, TOKENIZER, ["aé漢"], max_tokens=limit)
    assert (result.n_tokens, result.n_bytes) == (3, 3)


def test_held_out_documents(tmp_path):
    for i, text in enumerate(["abcdé", "fghi", "jkl"]):
        (tmp_path / f"{i}.txt").write_text(text)
    dataset = prepare([tmp_path], tmp_path / "out", TOKENIZER)  # 7 + 5 + 4 tokens with eos

    def texts(start: float) -> list[str]:
        documents = list(held_out_documents(dataset, TOKENIZER, start))
        for d in documents:
            assert (d.n_bytes, d.n_words) == (len(d.tokens), 1)
        return [TOKENIZER.decode(d.tokens) for d in documents]

    assert texts(0) == ["abcdé", "fghi", "jkl"]
    assert texts(1 / 16) == ["abcdé", "fghi", "jkl"]
    assert texts(3 / 16) == ["cdé", "fghi", "jkl"]
    assert texts(6 / 16) == ["fghi", "jkl"]  # one byte of é is no text
    assert texts(7 / 16) == ["fghi", "jkl"]
    assert texts(8 / 16) == ["fghi", "jkl"]
    assert texts(15 / 16) == ["l"]


# --------------------------------------------------------------------------------------------
# The dial
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [64, 2000, None])
def test_sweep(model, context):
    seen: list[object] = []
    rows = sweep(
        model,
        TOKENIZER,
        iter(TEXTS),
        "mixer.chunk_size",
        [1, 4, 16],
        context=context,
        max_tokens=400,
        on_row=seen.append,
    )
    assert rows == seen
    assert [row.value for row in rows] == [1, 4, 16]
    for row in rows:
        dialled = redial(model, {"mixer.chunk_size": row.value})
        result = evaluate(dialled, TOKENIZER, TEXTS, context=context, max_tokens=400)
        assert (row.perplexity, row.bits_per_byte) == (result.perplexity, result.bits_per_byte)
        assert row.cache_tokens == (context or 1 + len(TEXTS[3].encode()[: 400 - 175]))
        assert row.cache_bytes == cache_bytes(dialled.config, row.cache_tokens)
    assert all(a.cache_bytes > b.cache_bytes for a, b in pairwise(rows))
    assert json.dumps(rows[0].to_dict())


def test_sweep_over_boundaries_uses_the_documents_tokens(model):
    spaced = ["a b c d " * 40]
    boundary = {"type": "separator", "tokens": [32], "max_chunk": 50}
    (row,) = sweep(model, TOKENIZER, spaced, "mixer.boundary", [boundary], context=100)
    tokens = np.array([0, *spaced[0].encode()])[:100]
    dialled = redial(model, {"mixer.boundary": boundary})
    expected = cache_bytes(dialled.config, 100, tokens=torch.from_numpy(tokens)[None])
    assert row.cache_bytes == measure_cache(dialled, tokens, piece=7) == expected


def test_redial_takes_the_weights_and_leaves_the_random_state(model):
    state = torch.get_rng_state()
    other = redial(model, {"mixer.leading_tokens": None})
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert other.head.weight is not model.head.weight
    assert not other.training


def test_redial_refuses_other_weights(model):
    with pytest.raises(ValueError, match=r"'mixer.state_dim': 8} cannot be set on trained weights"):
        redial(model, {"mixer.state_dim": 8})
    with pytest.raises(ValueError, match="one tensor would have to be two, or two one"):
        redial(model, {"model.tie_embeddings": not model.config.tie_embeddings})
    with pytest.raises(ValueError, match="would go from nothing to"):
        redial(model, {"mixer.kv_proj": True})
    with pytest.raises(ConfigError, match="did you mean 'chunk_size'"):
        redial(model, {"mixer.chunk_sise": 8})


# --------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context=0 must be at least 1"),
        ({"context": 8, "stride": 9}, "stride=9 must be from 1 to context=8"),
        ({"stride": 0}, "stride=0 must be from 1 to context=1024"),
        ({"context": None, "stride": 4}, "stride=4 needs a context"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"max_documents": 0}, "max_documents=0 must be at least 1"),
    ],
)
def test_options_that_cannot_be(model, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(model, TOKENIZER, TEXTS, **options)


@pytest.mark.parametrize("documents", [[], [""]])
def test_no_text(model, documents):
    with pytest.raises(ValueError, match="there is nothing to score"):
        evaluate(model, TOKENIZER, documents)
    with pytest.raises(ValueError, match="there is nothing to score"):
        sweep(model, TOKENIZER, documents, "mixer.chunk_size", [1])


def test_a_tokenizer_that_is_not_the_model_s():
    config = attamba.ModelConfig(vocab_size=100, dim=32, n_layers=1, mixer={"n_heads": 4})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the model knows 100"):
        evaluate(attamba.build_model(config), TOKENIZER, TEXTS)


def test_a_model_that_wants_given_ends():
    with pytest.raises(ValueError, match="boundary='given' needs ends"):
        evaluate(build(boundary="given"), TOKENIZER, TEXTS)
