"""Generated tasks: what their rows hold, and that a row depends on seed and number alone."""

import re

import numpy as np
import pytest

from attamba.config import ConfigError
from attamba.data import UNSCORED
from attamba.data.generated import BLANK, GeneratedRows, at_gap, make_task


def _rows(spec, seq_len=160, batch_size=8, **options):
    return GeneratedRows(make_task(spec), seq_len, batch_size, options.pop("seed", 0), **options)


@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("noise", [0, 3])
@pytest.mark.parametrize("power", [0.01, None])
def test_recall_asks_for_every_key_once(gap, noise, power):
    spec = {"type": "recall", "pairs": 9, "n_keys": 20, "n_values": 30}
    spec |= {"gap": gap, "n_noise": noise, "power": power}
    batch = _rows(spec, seq_len=60).batch(2)
    assert batch.inputs.shape == batch.targets.shape == (8, 60) and not batch.doc_ids.any()
    for inputs, targets in zip(batch.inputs, batch.targets):
        keys, values = inputs[0:18:2], inputs[1:18:2]
        pairs = dict(zip(keys.tolist(), values.tolist()))
        assert (
            len(pairs) == 9 and set(keys) <= set(range(1, 21)) and set(values) <= set(range(21, 51))
        )
        asked = np.flatnonzero(targets != UNSCORED)
        assert {int(inputs[t]): int(targets[t]) for t in asked} == pairs
        assert asked.min() >= 18 + gap
        rest = np.delete(inputs[18:], asked - 18)
        assert set(rest) <= (set(range(51, 54)) if noise else {BLANK})


def test_recall_is_asked_soon_by_a_power_law():
    spec = {"type": "recall", "pairs": 4, "n_keys": 8, "n_values": 8}
    mean = {}
    for power in (0.01, None):
        batch = _rows({**spec, "power": power}, seq_len=208, batch_size=64).batch(0)
        mean[power] = np.argwhere(batch.targets != UNSCORED)[:, 1].mean()
    assert mean[0.01] < 70 < 100 < mean[None] < 116  # uniform: (8 + 207) / 2


def test_a_gap_moves_the_questions_and_nothing_else():
    task = make_task({"type": "recall", "pairs": 4, "n_keys": 8, "n_values": 8})
    near = GeneratedRows(task, 40, 4, 0).batch(0)
    far = GeneratedRows(at_gap(task, 10), 50, 4, 0).batch(0)
    assert (far.inputs[:, :8] == near.inputs[:, :8]).all()
    assert (far.inputs[:, 18:] == near.inputs[:, 8:]).all() and not far.inputs[:, 8:18].any()


def test_a_pass_key_is_hidden_once_and_asked_for():
    batch = _rows({"type": "passkey", "digits": 4}, seq_len=200).batch(0)
    places = set()
    for inputs, targets in zip(batch.inputs, batch.targets):
        text = bytes(inputs.astype(np.uint8)).decode()
        number = re.search(r" The pass key is (\d{4})\. Remember it\.", text)
        assert len(text) == 200 and text[0] == "\0"
        assert text.endswith(f"What is the pass key? The pass key is {number[1][:-1]}")
        assert bytes(targets[-4:].astype(np.uint8)).decode() == number[1]
        assert (targets[:-4] == UNSCORED).all()
        places.add(number.start())
    assert len(places) > 4


@pytest.mark.parametrize("spec", [{"type": "recall"}, {"type": "passkey"}])
def test_a_row_depends_on_seed_and_number_alone(spec):
    one, other = _rows(spec, batch_size=8), _rows(spec, batch_size=4)
    assert (one.batch(3).inputs[4:] == other.batch(7).inputs).all()
    assert (one.batch(3).inputs != _rows(spec, seed=1).batch(3).inputs).any()
    assert (one.batch(3).inputs != one.batch(4).inputs).any()
    held_out = _rows(spec, held_out=True)
    assert (held_out.rows([5]).inputs != one.rows([5]).inputs).any()


def test_a_row_stays_what_it_was():
    """Results name rows by their number, so no version may change them."""
    batch = _rows({"type": "recall", "pairs": 3, "n_keys": 5, "n_values": 5}, seq_len=14).batch(0)
    assert batch.inputs[0].tolist() == FIRST_ROW


FIRST_ROW = [1, 7, 3, 10, 2, 10, 1, 0, 3, 0, 0, 0, 2, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "recal"}, "did you mean 'recall'"),
        ({"type": "recall", "paris": 3}, "did you mean 'pairs'"),
        ({"type": "recall", "pairs": 65}, "pairs=65 needs as many keys"),
        ({"type": "recall", "pairs": 0}, "pairs=0 must be at least 1"),
        ({"type": "recall", "power": 0}, "power=0.0 must be above 0"),
        ({"type": "recall", "n_values": 200}, "must be at most 255"),
        ({"type": "passkey", "digits": 0}, "digits=0 must be at least 1"),
    ],
)
def test_what_a_task_cannot_be(spec, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_task(spec)


@pytest.mark.parametrize("spec", [{"type": "recall"}, {"type": "passkey"}])
def test_rows_that_are_too_short_say_what_would_do(spec):
    with pytest.raises(ConfigError, match="must be at least") as error:
        _rows(spec, seq_len=50).batch(0)
    least = int(re.search(r"must be at least (\d+)", str(error.value))[1])
    assert _rows(spec, seq_len=least).batch(0).n_scored
    with pytest.raises(ConfigError, match="too short"):
        _rows(spec, seq_len=least - 1).batch(0)
