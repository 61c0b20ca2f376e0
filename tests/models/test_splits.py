"""How parameters are divided among ranks: what each uses, and where the numbers lie."""

from __future__ import annotations

import pytest

import attamba
from attamba.models.splits import Placement, Split, place, placements, splits

FUSED = Split(0, ((4, True), (2, False), (6, True)))


def test_runs_that_ranks_use():
    assert FUSED.used(0, 2) == [(0, 2), (4, 6), (6, 9)]
    assert FUSED.used(1, 2) == [(2, 4), (4, 6), (9, 12)]
    # of 12 rows rank 0 holds 0..5 and rank 1 holds 6..11
    assert [FUSED.missing(rank, 2) for rank in (0, 1)] == [3, 4]


@pytest.mark.parametrize(
    ("split", "shape", "tensor", "holders", "expected"),
    [
        (Split(), (7, 3), 1, 4, Placement(None, 0, held=6, whole=21)),
        (Split(), (2, 8, 3), 1, 4, Placement(None, 1, held=12, whole=48)),
        (Split(), (2, 7, 3), 1, 4, Placement(None, 0, held=21, whole=42)),
        (Split(0, ((8, True),)), (8, 3), 2, 4, Placement(0, 0, held=3, whole=12)),
        (Split(0, ((6, True),)), (6, 8), 2, 4, Placement(0, 1, held=6, whole=24)),
        (Split(0, ((6, True),)), (6, 3), 2, 4, Placement(None, 0, held=6, whole=18)),
        (Split(0, ((7, False),)), (7, 4), 2, 1, Placement(None, 0, held=28, whole=28)),
        (Split(1, ((8, True),)), (5, 8), 4, 2, Placement(1, 0, held=6, whole=10)),
        (Split(0, ((8, True),), small=True), (8,), 2, 2, Placement(None, 0, held=4, whole=8)),
    ],
)
def test_where_a_parameter_lies(split, shape, tensor, holders, expected):
    """Rows by rank; another dimension where rows do not go round; whole where parts are uneven."""
    assert place(split, shape, tensor, holders) == expected


@pytest.mark.parametrize("name", ["attamba", "transformer", "mamba2", "mingru", "minlstm", "hawk"])
def test_segments_are_the_parameters(name):
    """Each split dimension is as long as its segments, and the large matrices are all divided."""
    config = attamba.ModelConfig(vocab_size=48, dim=64, n_layers=1, mixer={"type": name})
    model = attamba.build_model(config)
    uses = splits(model)
    places = placements(model, uses, tensor=2, holders=2)
    parameters = dict(model.named_parameters())
    assert uses.keys() == places.keys() == parameters.keys()
    for key, split in uses.items():
        if split.dim is not None:
            assert sum(size for size, _ in split.segments) == parameters[key].shape[split.dim]
    whole = sum(p.numel() for key, p in parameters.items() if places[key].tensor_dim is None)
    assert whole < 0.05 * sum(p.numel() for p in parameters.values())
