"""Scores of memory, against models whose answers are known."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import attamba
from attamba.config import ConfigError, RunConfig, TransformerMixer, from_dict
from attamba.data import TokenizedDocument
from attamba.data.generated import GeneratedRows, make_task
from attamba.studies import memory
from attamba.studies.scores import CopyScore, PasskeyScore, RecallScore, make_score

TASK = {"type": "recall", "pairs": 4, "n_keys": 8, "n_values": 8}


def _config(task, seq_len=32):
    tree = {"data": {"generate": task, "seq_len": seq_len}}
    return from_dict(RunConfig, {**tree, "model": {"dim": 16, "n_layers": 1, "mixer": SMALL}})


SMALL = {"type": "attamba", "n_heads": 2, "ssm_heads": 2, "chunk_size": 4, "leading_tokens": 8}


class Oracle(nn.Module):
    """Knows the answers within a reach of tokens: a stand-in for a model, one-hot "hidden"."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 1)
        self.head = nn.Identity()
        self.reach = reach

    def forward(self, ids, return_hidden=False):
        hidden = torch.zeros(*ids.shape, 256)
        for row in range(ids.shape[0]):
            for t in range(ids.shape[1]):
                for s in range(max(0, t - self.reach), t):
                    if ids[row, s] == ids[row, t] and s % 2 == 0 and s < 8:
                        hidden[row, t, ids[row, s + 1]] = 1
        return hidden


def test_recall_is_counted_by_distance():
    config, score = _config(TASK), RecallScore(rows=6, gaps=[0, 10], batch_size=4)
    all_known = memory.recall(Oracle(1000), config, score)
    assert all_known["chance"] == 1 / 8
    assert [s["gap"] for s in all_known["settings"]] == [0, 10]
    assert [s["seq_len"] for s in all_known["settings"]] == [32, 42]
    for setting in all_known["settings"]:
        assert setting["accuracy"] == 1.0 and setting["n"] == 24
        assert sum(bucket["n"] for bucket in setting["by_distance"]) == 24
    near = memory.recall(Oracle(16), config, score)["settings"]
    assert 0 < near[0]["accuracy"] < 1 and near[1]["accuracy"] < near[0]["accuracy"]
    for bucket in near[0]["by_distance"]:  # the oracle looks 16 tokens back from the key
        assert bucket["accuracy"] == (1.0 if bucket["stop"] <= 16 else 0.0)


class Copyist(Oracle):
    """Sure of what followed the last two tokens if they stood together within its reach."""

    def forward(self, ids, return_hidden=False):
        logits = torch.zeros(*ids.shape, 256)
        for row, tokens in enumerate(ids.tolist()):
            for t in range(1, len(tokens)):
                for s in range(max(1, t - self.reach), t):
                    if tokens[s - 1 : s + 1] == tokens[t - 1 : t + 1]:
                        logits[row, t, tokens[s + 1]] = 100
        return logits


def _texts(*lengths):
    draw = np.random.default_rng(0)
    return [TokenizedDocument(draw.integers(0, 256, n), n, 1, "") for n in lengths]


def test_a_passage_read_again_costs_nothing_within_reach_and_as_much_as_before_beyond():
    score = CopyScore(passage=20, gaps=[10, 60], rows=5, batch_size=2)
    texts = _texts(100, 30, 300)
    near, far = memory.copying(Copyist(40), texts, score)["settings"]
    new = np.log(256)
    assert (near["gap"], far["gap"]) == (10, 60) and near["n"] == 5 * 12
    assert near["first"] == pytest.approx(new) and near["again"] == pytest.approx(0, abs=1e-6)
    assert far["first"] == pytest.approx(new) and far["again"] == pytest.approx(new)
    everything = memory.copying(Copyist(80), texts, score)["settings"]
    assert everything[1]["again"] == pytest.approx(0, abs=1e-6)
    assert memory.copying(Copyist(40), texts, score)["settings"] == [near, far]


def test_what_stands_between_two_readings_is_what_follows_in_the_text():
    texts = _texts(90, 50, 70)  # the second is too short
    rows = memory._read_twice(texts, CopyScore(passage=20, rows=30), 40)
    assert rows.shape == (30, 80) and (rows[:, :20] == rows[:, 60:]).all()
    starts = {
        (i, start)
        for row in rows
        for i, text in enumerate(texts)
        for start in range(len(text.tokens) - 59)
        if (text.tokens[start : start + 60] == row[:60]).all()
    }
    assert len(starts) > 15 and {i for i, _ in starts} == {0, 2}


def test_passages_need_a_document_that_is_long_enough():
    with pytest.raises(ConfigError, match=r"gap 60 needs a document of 80 tokens, .* is none"):
        memory.copying(Copyist(1), _texts(79, 50), CopyScore(passage=20, gaps=[60]))
    with pytest.raises(ConfigError, match=r"s\.passage=8 must be at least 9"):
        make_score({"kind": "copy", "passage": 8}, "s")


def test_distances_by_hand():
    batch = GeneratedRows(make_task(TASK), 32, 2, 0).batch(0)
    distances = memory._distances(batch, 4)
    for row in range(2):
        keys = batch.inputs[row, 0:8:2].tolist()
        for t in np.flatnonzero(batch.targets[row] >= 0):
            value = 2 * keys.index(batch.inputs[row, t]) + 1
            assert distances[row, t] == t - value


def test_recall_at_other_chunk_sizes_is_that_of_those_models():
    config = _config(TASK)
    model = attamba.build_model(config.model).eval()
    both = memory.recall(model, config, RecallScore(rows=4, chunk_sizes=[4, 1]))["settings"]
    own = memory.recall(model, config, RecallScore(rows=4))["settings"]
    assert [s["chunk_size"] for s in both] == [4, 1] and own[0]["chunk_size"] is None
    assert both[0]["by_distance"] == own[0]["by_distance"]


def test_recall_at_other_chunk_sizes_of_a_model_without_chunks_is_its_own():
    config = _config(TASK)
    config.model.mixer = TransformerMixer(n_heads=2)
    model = attamba.build_model(config.model).eval()
    (found,) = memory.recall(model, config, RecallScore(rows=4, chunk_sizes=[4, 1]))["settings"]
    assert found["chunk_size"] is None


def test_a_pass_key_is_found_where_it_is_known():
    config = _config({"type": "passkey", "digits": 3}, seq_len=200)

    class Reader(Oracle):
        def forward(self, ids, return_hidden=False):
            hidden = torch.zeros(*ids.shape, 256)
            for row, tokens in enumerate(ids.tolist()):
                place = bytes(tokens).index(b"pass key is ") + 12
                if place < self.reach:
                    for i in range(3):
                        hidden[row, ids.shape[1] - 3 + i, tokens[place + i]] = 1
            return hidden

    score = PasskeyScore(lengths=[150, 400], rows=40)
    known = memory.passkey(Reader(1000), config, score)
    assert [s["accuracy"] for s in known["settings"]] == [1.0, 1.0]
    assert known["chance"] == pytest.approx(1e-3)
    early = memory.passkey(Reader(200), config, score)["settings"][1]
    depths = {part["depth"]: part["accuracy"] for part in early["by_depth"]}
    assert depths[0] == 1.0 and depths[4] == 0.0
    assert sum(part["n"] for part in early["by_depth"]) == 40
    several = dataclasses.replace(score, batch_size=7)  # whole batches, and one of five rows
    assert memory.passkey(Reader(200), config, several)["settings"][1] == early


def test_long_rows_through_the_cache_are_as_at_once(monkeypatch):
    config = _config(TASK)
    model = attamba.build_model(config.model).eval()
    batch = GeneratedRows(make_task(TASK), 60, 3, 0).batch(0)
    at_once = memory._right(model, batch)
    monkeypatch.setattr(memory, "WHOLE", 10)
    monkeypatch.setattr(memory, "PIECE", 17)
    in_pieces = memory._right(model, batch)
    assert all((a == b).all() for a, b in zip(at_once, in_pieces))


def test_a_score_needs_its_task():
    config = _config({"type": "passkey"})
    with pytest.raises(ConfigError, match="a recall score needs a run on"):
        memory.recall(Oracle(1), config, RecallScore())
    with pytest.raises(ConfigError, match="a passkey score needs a run on"):
        memory.passkey(Oracle(1), _config(TASK), PasskeyScore())


def test_scored_rows_are_none_of_the_training_s():
    rows = GeneratedRows(make_task(TASK), 32, 4, 0)
    held_out = np.concatenate([batch.inputs for batch in memory._held_out(rows, 6)])
    assert len(held_out) == 6
    trained = np.concatenate([rows.batch(step).inputs for step in range(50)])
    assert not {tuple(row) for row in held_out} & {tuple(row) for row in trained}
