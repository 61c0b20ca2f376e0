"""Boundary policies that see the future: whose scores, which tokens, of which document."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attamba
from attamba.ops.chunking import (
    FIRST_SCORES,
    document_starts,
    make_boundary,
    make_span,
    row_starts,
)
from attamba.ops.first_scores import last_key_scores

CPU = torch.device("cpu")
VOCAB = 13


def _policy(name: str, layer_idx: int, chunk_size: int = 4, sink: bool = False):
    place = {"layer_idx": layer_idx, "n_layers": 3, "n_kv_heads": 1, "sink": sink}
    return make_boundary(name, chunk_size=chunk_size, **place)


def _model(boundary: str, **mixer: Any) -> attamba.Decoder:
    settings = {"n_heads": 2, "ssm_heads": 2, "chunk_size": 4, "leading_tokens": 2}
    mixer = {"type": "attamba", "boundary": boundary, **settings, **mixer}
    config = attamba.ModelConfig(vocab_size=VOCAB, dim=16, n_layers=3, ffn_dim=16, mixer=mixer)
    return attamba.build_model(config).eval().requires_grad_(False)


def test_scores_are_queries_times_the_last_key_of_the_document_in_the_first_head():
    q, k = torch.randn(2, 9, 4, 6), torch.randn(2, 9, 2, 6)
    doc_ids = torch.tensor([[0] * 9, [3] * 4 + [5] * 5])
    scores = last_key_scores(q, k, document_starts(doc_ids))
    for row in range(2):
        for t in range(9):
            last = 3 if row == 1 and t < 4 else 8
            want = float(q[row, t, 0] @ k[row, last, 0]) / 6**0.5
            assert float(scores[row, t]) == pytest.approx(want, abs=1e-5)
    assert torch.equal(row_starts(make_span(9, CPU), 2), torch.zeros(2, 9, dtype=torch.long))


@pytest.mark.parametrize("name", ["first_attention", "first_ssm"])
def test_one_token_in_P_of_each_document_ends_a_chunk(name):
    lengths = [9, 3, 8, 20]
    doc_ids = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]
    span = make_span(40, CPU, doc_ids=doc_ids)
    scores = torch.randn(1, 40)
    span.memo[FIRST_SCORES] = scores
    ends = _policy(name, 1)(span)[0][0, 0]
    begin = 0
    for length in lengths:
        own = scores[0, begin : begin + length]
        wanted = set(own.topk(length // 4).indices.tolist())
        assert set(ends[begin : begin + length].nonzero().flatten().tolist()) == wanted
        begin += length
    assert torch.equal(_policy(name, 2)(span)[0][0, 0], ends), "the same in all other layers"


def test_the_first_layer_is_full_attention_or_has_chunks_of_its_own():
    span = make_span(10, CPU)
    assert _policy("first_attention", 0)(span)[0].all()
    own = _policy("first_ssm", 0)(span)[0][0, 0]
    assert own.nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize("name", ["first_attention", "first_ssm"])
@pytest.mark.parametrize("scope", ["chunk", "sequence"])
def test_a_model_runs_packed_and_padded_and_moves_ends_with_later_tokens(name, scope):
    model = _model(name, ssm_scope=scope)
    ids = torch.randint(VOCAB, (2, 20))
    full = model(ids)
    packed = model(ids.flatten()[None], doc_ids=torch.arange(2).repeat_interleave(20)[None])
    assert torch.allclose(packed[0].view_as(full), full, atol=1e-4)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[:, :4] = False
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    assert torch.allclose(model(padded, attention_mask=mask)[:, 4:], full, atol=1e-4)
    assert not torch.allclose(model(ids[:, :17]), full[:, :17], atol=1e-4), "sees the future"


def test_scores_of_texts_of_unlike_lengths_are_those_of_each_alone():
    """Windows of a batch are filled up to one length, which must not be the future that is seen."""
    from attamba.data import load_tokenizer
    from attamba.evaluate import evaluate

    settings = {"n_heads": 2, "ssm_heads": 2, "chunk_size": 4, "leading_tokens": 2}
    mixer = {"type": "attamba", "boundary": "first_attention", **settings}
    config = attamba.ModelConfig(vocab_size=257, dim=16, n_layers=2, ffn_dim=16, mixer=mixer)
    model, tokenizer = attamba.build_model(config).eval(), load_tokenizer("bytes")
    texts = ["a text of some length, longer than the other", "a short text"]
    alone = [evaluate(model, tokenizer, [text], context=100) for text in texts]
    both = evaluate(model, tokenizer, texts, context=100)
    assert both.n_tokens == sum(r.n_tokens for r in alone)
    nats = [math.log(r.perplexity) * r.n_tokens for r in (*alone, both)]
    assert nats[2] == pytest.approx(nats[0] + nats[1], rel=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="follows the scores of the first layer, which gave none"):
        _policy("first_ssm", 1)(make_span(10, CPU))
    other_first = [{"type": "transformer", "n_heads": 2}, _model("first_ssm").config.mixer]
    config = attamba.ModelConfig(vocab_size=VOCAB, dim=16, n_layers=2, mixer=other_first)
    with pytest.raises(ValueError, match="set it in all layers"):
        attamba.build_model(config)(torch.zeros(1, 9, dtype=torch.long))
