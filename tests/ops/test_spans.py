"""Where tokens stand, where chunks start, and who sees whom, by brute force."""

from __future__ import annotations

import pytest
import torch

from attamba.ops.chunking import (
    chunk_starts,
    document_bounds,
    document_starts,
    make_span,
    normalize_ends,
    part_of,
    visible,
)
from attamba.ops.row_ranks import RowRanks

CPU = torch.device("cpu")


def test_positions():
    mask = torch.tensor([[False, True, True], [True, True, True], [False, False, False]])
    span = make_span(3, CPU, mask=mask)
    assert span.positions.tolist() == [[-1, 0, 1], [0, 1, 2], [-1, -1, -1]]
    assert span.n_new.tolist() == [2, 3, 0] and span.n_pad.tolist() == [1, 0, 3]
    span = make_span(3, CPU, mask=mask, offsets=torch.tensor([5, 0, 7]))
    assert span.positions.tolist() == [[-1, 5, 6], [0, 1, 2], [-1, -1, -1]]
    span = make_span(4, CPU, doc_ids=torch.tensor([[4, 4, 9, 4]]))
    assert span.positions.tolist() == [[0, 1, 0, 0]]
    assert make_span(3, CPU).n_new == 3 and make_span(3, CPU).n_pad is None


def test_an_id_that_comes_back_is_another_document():
    doc_ids = torch.tensor([[1, 1, 2, 1, 1, 1], [3, 3, 3, 3, 3, 3]])
    assert document_starts(doc_ids).tolist() == [[0, 0, 2, 3, 3, 3], [0] * 6]
    start, stop = document_bounds(doc_ids)
    assert torch.equal(start.long(), document_starts(doc_ids)) and stop.dtype == torch.int32
    assert stop.tolist() == [[2, 2, 3, 6, 6, 6], [6] * 6]
    assert [bound.shape for bound in document_bounds(doc_ids[:, :0])] == [(2, 0), (2, 0)]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_ranks_part_of_rows(rows):
    """No views: torch 2.11 fails to compile graphs whose inputs are, once sizes of rows vary."""
    doc_ids = torch.tensor([[0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, 3]])[:rows]
    whole = make_span(6, CPU, tokens=doc_ids + 10, doc_ids=doc_ids)
    part = part_of(whole, RowRanks(1, 2, "group"))
    assert part.whole is whole and part.tokens is not None and part.doc_ids is not None
    assert part.positions.tolist() == [[1, 2, 3], [3, 0, 1]][:rows]
    assert part.doc_ids.tolist() == [[1, 1, 1], [2, 3, 3]][:rows]
    assert torch.equal(part.tokens, part.doc_ids + 10)
    plain = part_of(make_span(6, CPU), RowRanks(1, 2, "group"))
    assert plain.positions.tolist() == [[3, 4, 5]] and plain.doc_ids is None
    copies = [part.positions, part.tokens, part.doc_ids, plain.positions]
    assert not any(t._is_view() for t in copies)


def test_chunks_start_after_ends_and_with_documents():
    ends = torch.tensor([[[0, 1, 0, 0, 1, 1]]]).bool()
    assert chunk_starts(ends, make_span(6, CPU)).int().tolist() == [[1, 0, 1, 0, 0, 1]]
    packed = make_span(6, CPU, doc_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert chunk_starts(ends, packed).int().tolist() == [[1, 0, 1, 1, 0, 1]]


def test_the_first_token_of_a_call_starts_a_chunk_if_the_last_call_ended_one():
    ends = torch.zeros(1, 1, 3, dtype=torch.bool)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()
    span = make_span(3, CPU, mask=mask, offsets=torch.tensor([4, 4, 0, 4]))
    last_end = torch.tensor([False, True, False, True])
    starts = chunk_starts(ends, span, last_end)
    assert starts.int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("lead", [0, 1, 3, 8, None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n_queries", [1, 5, 20])
def test_visible_by_brute_force(lead, packed, n_queries):
    seq = 20
    ends = torch.rand(2, 3, seq) < 0.3
    lengths = [3, 1, 9, 7]
    doc_ids = None
    document = [0] * seq
    if packed:
        document = [i for i, n in enumerate(lengths) for _ in range(n)]
        doc_ids = torch.tensor([document, [d % 2 for d in document]])
    seen = visible(ends, lead, n_queries, doc_ids).expand(2, 3, -1, -1)
    for b in range(2):
        for g in range(3):
            for i, t in enumerate(range(seq - n_queries, seq)):
                for s in range(seq):
                    window = s <= t and (lead is None or t - lead <= s)
                    past = lead is not None and s < t - lead and bool(ends[b, g, s])
                    want = (window or past) and document[s] == document[t]
                    assert bool(seen[b, g, i, s]) == want, (b, g, t, s)


def test_normalize_ends():
    shapes = {(5,): (1, 1, 5), (2, 5): (2, 1, 5), (1, 5): (1, 1, 5), (2, 3, 5): (2, 3, 5)}
    for given, want in shapes.items():
        assert normalize_ends(torch.zeros(given).bool(), 2, 3, 5).shape == want
