"""Where chunks end: each policy by hand, what holds for all of them, and errors."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest
import torch
from torch import Tensor

import attamba
from attamba.ops.chunking import BOUNDARIES, Boundary, make_boundary, make_span

CPU = torch.device("cpu")
POLICIES = [
    "uniform",
    "cyclic",
    "head_cyclic",
    "jitter",
    {"type": "jitter", "seed": 5},
    "random",
    {"type": "random", "seed": 5},
    {"type": "separator", "tokens": [1, 2]},
    {"type": "separator", "tokens": [3], "max_chunk": 5},
    {"type": "budget", "max_chunks": 9},
]
DRAWS = [None, torch.tensor(3)]


def _policy(spec, P=4, layer=0, n=1, G=1, sink=False) -> Boundary:
    return make_boundary(spec, chunk_size=P, layer_idx=layer, n_layers=n, n_kv_heads=G, sink=sink)


def _ends(spec, seq, tokens=None, draw=None, **place) -> Tensor:
    """Ends of one sequence, bool [G or 1, T]."""
    span = make_span(seq, CPU, tokens=tokens, draw=draw)
    return _policy(spec, **place)(span)[0][0]


def _where(ends: Tensor) -> list[int]:
    assert ends.shape[0] == 1
    return ends[0].nonzero()[:, 0].tolist()


# --------------------------------------------------------------------------------------------
# Each policy, by hand
# --------------------------------------------------------------------------------------------


def test_uniform():
    assert _where(_ends("uniform", 13, P=4)) == [3, 7, 11]
    assert _where(_ends("uniform", 13, P=4, layer=2, n=3)) == [3, 7, 11]
    assert _where(_ends("uniform", 4, P=1)) == [0, 1, 2, 3]
    assert _where(_ends("uniform", 4, P=9)) == []


def test_cyclic():
    by_layer = [_where(_ends("cyclic", 13, P=4, layer=layer, n=4)) for layer in range(4)]
    assert by_layer == [[3, 7, 11], [2, 6, 10], [1, 5, 9], [0, 4, 8, 12]]


@pytest.mark.parametrize(
    "P, n, offsets",
    [
        (8, 4, [0, 2, 4, 6]),
        (8, 3, [0, 2, 5]),
        (4, 8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (2, 8, [0, 0, 0, 0, 1, 1, 1, 1]),
        (3, 8, [0, 0, 0, 1, 1, 1, 2, 2]),
        (1, 3, [0, 0, 0]),
    ],
)
def test_cyclic_offsets(P, n, offsets):
    assert [floor(Fraction(layer * P, n)) for layer in range(n)] == offsets
    for layer, offset in enumerate(offsets):
        first = _where(_ends("cyclic", P, P=P, layer=layer, n=n))
        assert first == [P - 1 - offset]


@pytest.mark.parametrize("P, G, n", [(4, 4, 2), (4, 8, 3), (8, 4, 2), (3, 4, 5), (1, 2, 2)])
def test_head_cyclic(P, G, n):
    for layer in range(n):
        ends = _ends("head_cyclic", 5 * P, P=P, G=G, layer=layer, n=n)
        assert ends.shape == (G, 5 * P)
        for g in range(G):
            offset = floor((Fraction(layer, n) + Fraction(g, G)) * P) % P
            assert _where(ends[g : g + 1]) == list(range(P - 1 - offset, 5 * P, P))
        if G >= P:
            assert ends.any(0).all()  # every token ends a chunk in some head


def test_jitter_is_cyclic_in_evaluation():
    for layer in range(3):
        place = {"P": 5, "layer": layer, "n": 3}
        assert torch.equal(_ends("jitter", 60, **place), _ends("cyclic", 60, **place))


@pytest.mark.parametrize("P", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("layer", [0, 2])
def test_jitter_moves_each_end_by_less_than_half_a_chunk(P, layer):
    place = {"P": P, "layer": layer, "n": 4}
    plain = _where(_ends("cyclic", 1000, **place))
    around = [plain[0] - P, *plain, plain[-1] + P]
    moves = set()
    for draw in range(4):
        moved = _where(_ends("jitter", 1000, draw=torch.tensor(draw), **place))
        for end in plain[1:-1]:
            near = [m for m in moved if abs(m - end) < P / 2]
            assert len(near) == 1, "strictly one end per chunk"
            moves.add(near[0] - end)
        assert all(min(abs(m - e) for e in around) < P / 2 for m in moved)
    reach = (P - 1) // 2
    assert moves == set(range(-reach, reach + 1))


@pytest.mark.parametrize("name", ["jitter", "random"])
def test_draws_are_seeded(name):
    def ends(draw, seed=0, layer=0):
        spec = {"type": name, "seed": seed}
        return _ends(spec, 400, P=8, layer=layer, n=2, draw=torch.tensor(draw))

    assert torch.equal(ends(7), ends(7))
    for other in (ends(8), ends(7, seed=1), ends(7, layer=1)):
        assert not torch.equal(ends(7), other)
    assert torch.equal(ends(7), _ends(name, 400, P=8, n=2, draw=torch.tensor(7))), "seed is 0"


@pytest.mark.parametrize("P", [1, 2, 8, 50])
@pytest.mark.parametrize("draw", DRAWS)
def test_random_rate(P, draw):
    n = 40_000
    count = int(_ends("random", n, P=P, draw=draw).sum())
    deviation = (n / P * (1 - 1 / P)) ** 0.5
    assert abs(count - n / P) <= 4 * deviation
    if P > 2:  # neighbours are drawn by themselves: a pair at the rate of 1/P^2
        ends = _ends("random", n, P=P, draw=draw)[0]
        pairs, expected = int((ends[1:] & ends[:-1]).sum()), n / P**2
        assert abs(pairs - expected) <= 5 * expected**0.5


def test_random_is_one_fixed_draw_in_evaluation():
    assert torch.equal(_ends("random", 100), _ends("random", 100))
    assert not torch.equal(_ends("random", 100), _ends("random", 100, draw=torch.tensor(0)))


@pytest.mark.parametrize(
    "tokens, max_chunk, sink, expected",
    [
        ([1, 1, 5, 1, 5, 5, 1], 100, False, [2, 4, 5]),
        ([1, 1, 5, 1, 5, 5, 1], 100, True, [0, 2, 4, 5]),
        ([1, 1, 1, 1, 5, 1, 1, 1, 1, 1, 5], 3, False, [2, 4, 7, 10]),
        ([1, 1, 1, 1, 5, 1, 1, 1, 1, 1, 5], 3, True, [0, 3, 4, 7, 10]),
        ([1, 1, 1, 1, 1, 1, 5], 3, False, [2, 5, 6]),
        ([5, 7, 1, 7, 5], None, False, [0, 1, 3, 4]),
        ([1] * 9, None, False, [3, 7]),  # max_chunk is 2 P
        ([1] * 5, 1, False, [0, 1, 2, 3, 4]),
    ],
)
def test_separator(tokens, max_chunk, sink, expected):
    spec = {"type": "separator", "tokens": [5, 7]}
    if max_chunk is not None:
        spec["max_chunk"] = max_chunk
    ends = _ends(spec, len(tokens), P=2, sink=sink, tokens=torch.tensor([tokens]))
    assert _where(ends) == expected


def test_separator_looks_at_each_row():
    tokens = torch.tensor([[1, 5, 1, 1], [5, 1, 1, 1]])
    policy = _policy({"type": "separator", "tokens": [5], "max_chunk": 9})
    ends, carry = policy(make_span(4, CPU, tokens=tokens))
    assert ends.int().tolist() == [[[0, 1, 0, 0]], [[1, 0, 0, 0]]]
    assert carry.tolist() == [2, 3]


@pytest.mark.parametrize("P, budget, sink", [(8, 64, True), (4, 10, False), (1, 2, True)])
def test_budget(P, budget, sink):
    for layer in (0, 3):
        spec = {"type": "budget", "max_chunks": budget}
        ends = _where(_ends(spec, 50_000, P=P, layer=layer, n=4, sink=sink))
        assert len(ends) < budget
        assert len(ends) > 0.5 * budget - 2  # and it is made use of
        lengths = [b - a for a, b in pairwise(ends[1:])]
        assert all(b >= a - 1 for a, b in pairwise(lengths)), "chunks grow"


def test_budget_starts_near_one_chunk_per_P_tokens():
    early = _where(_ends({"type": "budget", "max_chunks": 4096}, 400, P=8))
    assert 400 / 8 * 0.9 <= len(early) <= 400 / 8
    assert 8 <= early[0] + 1 <= 9
    assert _policy("budget").max_chunks == 1024


def test_budget_layers_take_turns():
    spec = {"type": "budget", "max_chunks": 1024}
    by_layer = [_where(_ends(spec, 100, P=8, layer=layer, n=4)) for layer in range(4)]
    assert len({tuple(ends[:3]) for ends in by_layer}) == 4


def test_given():
    ends = torch.rand(2, 3, 20) < 0.3
    policy = _policy("given", G=3)
    assert torch.equal(policy(make_span(20, CPU), given=ends)[0], ends)


def test_sink_is_position_zero_and_nothing_else():
    for spec in POLICIES:
        tokens = torch.randint(5, (1, 80))
        tokens[0, 0] = 0  # no separator
        without = _ends(spec, 80, tokens=tokens, P=8, G=2)
        with_sink = _ends(spec, 80, tokens=tokens, P=8, G=2, sink=True)
        assert with_sink[:, 0].all(), spec
        if not isinstance(spec, dict) or spec["type"] in ("jitter", "random"):
            assert torch.equal(with_sink[:, 1:], without[:, 1:]), spec
    given = torch.zeros(1, 1, 5, dtype=torch.bool)
    assert _where(_policy("given", sink=True)(make_span(5, CPU), given=given)[0][0]) == [0]


# --------------------------------------------------------------------------------------------
# What holds for every causal policy
# --------------------------------------------------------------------------------------------


def test_every_policy_is_tested():
    named = {p if isinstance(p, str) else p["type"] for p in POLICIES}
    future = {"first_attention", "first_ssm"}
    assert named | {"given"} | future == set(BOUNDARIES)
    assert {name for name, policy in BOUNDARIES.items() if not policy.causal} == future


@pytest.mark.parametrize("spec", POLICIES, ids=str)
@pytest.mark.parametrize("draw", DRAWS)
def test_appending_tokens_moves_no_earlier_end(spec, draw):
    tokens = torch.randint(5, (1, 200))
    place = {"P": 5, "layer": 1, "n": 3, "G": 2, "sink": True, "draw": draw}
    whole = _ends(spec, 200, tokens=tokens, **place)
    for seq in (1, 2, 63, 100, 199):
        assert torch.equal(_ends(spec, seq, tokens=tokens[:, :seq], **place), whole[:, :seq])


@pytest.mark.parametrize("spec", POLICIES, ids=str)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("sink", [False, True])
def test_in_pieces_as_at_once(spec, draw, sink):
    """Rows of a batch stand at positions of their own; pieces are padded on the left."""
    tokens, rng = torch.randint(5, (3, 90)), torch.Generator().manual_seed(0)
    policy = _policy(spec, P=4, layer=1, n=3, G=2, sink=sink)
    whole = policy(make_span(90, CPU, tokens=tokens, draw=draw))[0].expand(3, -1, -1)
    seen, carry, got = torch.zeros(3, dtype=torch.long), None, [[], [], []]
    while (seen < 90).any():
        new = torch.minimum(torch.randint(0, 12, (3,), generator=rng), 90 - seen)
        width = max(int(new.max()), 1)
        column = torch.arange(width)
        mask = column >= width - new[:, None]
        now = tokens.gather(1, (seen[:, None] + column - width + new[:, None]).clamp(0, 89))
        span = make_span(width, CPU, tokens=now, mask=mask, offsets=seen, draw=draw)
        ends, carry = policy(span, carry)
        assert not (ends & ~mask[:, None]).any(), "padding ends no chunk"
        for row in range(3):
            got[row].append(ends[row][:, mask[row]])
        seen = seen + new
    for row in range(3):
        assert torch.equal(torch.cat(got[row], 1), whole[row])


@pytest.mark.parametrize("spec", POLICIES, ids=str)
def test_documents_start_afresh(spec):
    lengths = [30, 1, 17, 42]
    tokens = torch.randint(5, (1, sum(lengths)))
    doc_ids = torch.cat([torch.full((n,), i % 2) for i, n in enumerate(lengths)])[None]
    policy = _policy(spec, P=4, layer=2, n=3, G=2, sink=True)
    packed = policy(make_span(sum(lengths), CPU, tokens=tokens, doc_ids=doc_ids))[0]
    for part, ids in zip(packed.split(lengths, -1), tokens.split(lengths, 1)):
        assert torch.equal(part, policy(make_span(ids.shape[1], CPU, tokens=ids))[0])


# --------------------------------------------------------------------------------------------
# Policies of a user's own, and bad input
# --------------------------------------------------------------------------------------------


@pytest.fixture
def peeking():
    """A policy that looks ahead: the last token of the input ends a chunk."""

    class Peeking(Boundary):
        name = "peeking"
        causal = False

        def at(self, positions, draw):
            return positions == positions.max()

    yield Peeking
    del BOUNDARIES["peeking"]


def test_a_policy_of_ones_own_that_sees_the_future_trains_but_does_not_decode(peeking):
    mixer = {"type": "attamba", "n_heads": 2, "ssm_heads": 2, "boundary": "peeking"}
    config = attamba.ModelConfig(vocab_size=9, dim=8, n_layers=2, mixer=mixer)
    model = attamba.build_model(config)
    assert isinstance(model.layers[0].mixer.boundary, peeking)
    logits = model(torch.zeros(2, 7, dtype=torch.long))
    logits.sum().backward()
    assert logits.isfinite().all()
    text = (
        "boundary='peeking' chooses chunk ends from later tokens, so it cannot decode; "
        "load the model with a causal policy, e.g. mixer.boundary=cyclic"
    )
    with pytest.raises(ValueError, match=text):
        model.new_cache()


@pytest.mark.parametrize(
    "spec, text",
    [
        ("cycilc", r"boundary='cycilc' is not a policy \(there are: uniform, .*'cyclic'\?$"),
        ("xyz", r"boundary='xyz' is not a policy \(there are: [a-z_, ]*\)$"),
        (
            {"type": "budget", "max_chunk": 9},
            r"boundary.max_chunk is not an option of 'budget' \(known: max_chunks\); "
            r"did you mean 'max_chunks'\?",
        ),
        ({"type": "cyclic", "seed": 1}, r"boundary.seed is not an option .* \(known: none\)"),
        ({"type": "budget", "max_chunks": 1}, "boundary.max_chunks=1 must be a whole number"),
        ("separator", "boundary.tokens=None must be a list of token ids that end a chunk"),
        ({"type": "separator", "tokens": []}, r"boundary.tokens=\[\] must be a list"),
        ({"type": "separator", "tokens": [-1]}, r"boundary.tokens=\[-1\] must be a list"),
        ({"type": "separator", "tokens": [" "]}, r"boundary.tokens=\[' '\] must be a list"),
        (
            {"type": "separator", "tokens": [1], "max_chunk": 0},
            "boundary.max_chunk=0 must be a whole number",
        ),
    ],
)
def test_errors(spec, text):
    with pytest.raises(ValueError, match=text):
        _policy(spec)


def test_errors_of_a_call():
    separator = _policy({"type": "separator", "tokens": [1]})
    with pytest.raises(ValueError, match="boundary='separator' looks at token ids, which"):
        separator(make_span(5, CPU))
    with pytest.raises(ValueError, match="boundary='given' needs ends="):
        _policy("given")(make_span(5, CPU))
    ends = torch.zeros(1, 1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="ends was passed, but boundary='cyclic'; set boundary="):
        _policy("cyclic")(make_span(5, CPU), given=ends)
