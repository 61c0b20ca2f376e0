"""Scores that cannot be are refused before training, and those that run can be stopped."""

import re

import pytest
import torch
from torch import nn

import attamba
from attamba.config import ConfigError, RunConfig, from_dict
from attamba.data import load_tokenizer
from attamba.studies.scores import Subject, check_for_run, make_score

SMALL = {"type": "attamba", "n_heads": 2, "ssm_heads": 2, "chunk_size": 4, "leading_tokens": 8}
TRANSFORMER = {"type": "transformer", "n_heads": 2}
RECALL = {"type": "recall", "pairs": 4, "n_keys": 8, "n_values": 8}
PASSKEY = {"type": "passkey", "digits": 3}
LEAST = 77
"""Inputs of the shortest row with a pass key of three digits."""
FUTURE = {**SMALL, "boundary": "first_attention"}


def _config(task=None, seq_len=32, mixer=SMALL):
    n_layers = len(mixer) if isinstance(mixer, list) else 1
    model = {"dim": 16, "n_layers": n_layers, "vocab_size": 256, "mixer": mixer}
    return from_dict(RunConfig, {"data": {"generate": task, "seq_len": seq_len}, "model": model})


# --------------------------------------------------------------------------------------------
# Refused when they are made
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "passkey", "lengths": []}, "s.lengths=[] measures nothing; name some"),
        ({"kind": "recall", "gaps": []}, "s.gaps=[] measures nothing; name some"),
        ({"kind": "recall", "chunk_sizes": []}, "s.chunk_sizes=[] measures nothing; name some"),
        ({"kind": "copy", "gaps": []}, "s.gaps=[] measures nothing; name some"),
        ({"kind": "dial", "values": []}, "s.values=[] measures nothing; name some"),
        ({"kind": "passkey", "lengths": [64, 0]}, "s.lengths.1=0 must be at least 1"),
        ({"kind": "recall", "gaps": [-1]}, "s.gaps.0=-1 must be at least 0"),
        ({"kind": "recall", "chunk_sizes": [0]}, "s.chunk_sizes.0=0 must be at least 1"),
        ({"kind": "copy", "gaps": [4, -2]}, "s.gaps.1=-2 must be at least 0"),
        (
            {"kind": "text", "context": 64, "stride": 65},
            "s.stride=65 must be at most s.context=64",
        ),
        (
            {"kind": "text", "context": None, "stride": 8},
            "s.stride=8 has no effect with s.context=null, the whole document; leave it out",
        ),
    ],
)
def test_a_score_of_nothing_or_out_of_range_is_not_made(spec, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_score(spec, "s")


def test_what_is_at_its_least_is_made():
    assert make_score({"kind": "text", "context": 64, "stride": 64}, "s").stride == 64
    assert make_score({"kind": "recall", "gaps": [0], "chunk_sizes": None}, "s").gaps == [0]


# --------------------------------------------------------------------------------------------
# Refused before training
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (
            {"kind": "passkey", "lengths": [400, 32]},
            _config(PASSKEY),
            "s.lengths=[400, 32]: 32 is too short for the pass key and its question; it must be "
            f"at least {LEAST}",
        ),
        (
            {"kind": "passkey", "lengths": [LEAST - 1]},
            _config(PASSKEY),
            f"it must be at least {LEAST}",
        ),
        (
            {"kind": "recall"},
            _config(PASSKEY),
            "s.kind=recall needs a run on data.generate={type: recall}, and this one has "
            f"data.generate={PASSKEY}; train on that task, or leave the score out",
        ),
        (
            {"kind": "passkey"},
            _config(RECALL),
            "s.kind=passkey needs a run on data.generate={type: passkey}, and this one has",
        ),
        ({"kind": "recall"}, _config(), "and this one has data.generate=None"),
        ({"kind": "recall", "gaps": [64]}, _config(RECALL, 15), "data.seq_len=15 is too short"),
        (
            {"kind": "passkey", "lengths": [400, 4097]},
            _config(PASSKEY, mixer=FUTURE),
            "s.lengths=[400, 4097]: rows of more than 4096 tokens are read through a decode cache, "
            "and boundary='first_attention' chooses chunk ends from later tokens",
        ),
        (
            {"kind": "recall", "gaps": [0, 4096]},
            _config(RECALL, mixer=FUTURE),
            "s.gaps=[0, 4096]: rows of more than 4096 tokens are read",
        ),
        (
            {"kind": "text", "context": None},
            _config(mixer=FUTURE),
            "s.context=null: whole documents are read through a decode cache, and boundary=",
        ),
        (
            {"kind": "text", "set": {"mixer.chunk_size": 0}},
            _config(),
            "s.set={'mixer.chunk_size': 0}: ",
        ),
        ({"kind": "text", "set": {"dim": 32}}, _config(), "s.set={'dim': 32}: "),
        ({"kind": "dial", "values": [4, 0]}, _config(), "s.values=[4, 0]: "),
        (
            {"kind": "dial", "key": "mixer.state_dim", "values": [8]},
            _config(),
            "cannot be set on trained weights",
        ),
        (
            {"kind": "dial", "values": [4]},
            _config(mixer=FUTURE),
            "s.values=[4]: each is told with the bytes of a decode cache, and boundary='first_att",
        ),
        (
            {"kind": "copy", "gaps": [64, 1_000_000]},
            _config(),
            "s.gaps=[64, 1000000]: 1000000 and s.passage=64 need a document of 1000064 tokens, and "
            "the longest of ",
        ),
        (
            {"kind": "copy", "gaps": [10], "passage": 1_000_000},
            _config(),
            "need a document of 1000010 tokens",
        ),
    ],
)
def test_a_score_that_a_run_cannot_have_is_refused(spec, config, message, texts):
    score = make_score(spec, "s")
    with pytest.raises(ConfigError, match=re.escape(message)):
        score.check(config, texts, "s")


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        ({"kind": "passkey", "lengths": [LEAST, 8192]}, _config(PASSKEY)),
        ({"kind": "passkey", "lengths": [4096]}, _config(PASSKEY, mixer=FUTURE)),
        ({"kind": "recall", "gaps": [0, 8192], "chunk_sizes": [1, 64]}, _config(RECALL, 16)),
        ({"kind": "recall", "chunk_sizes": [4]}, _config(RECALL, mixer=TRANSFORMER)),
        ({"kind": "recall", "chunk_sizes": [4]}, _config(RECALL, mixer=[SMALL, TRANSFORMER])),
        ({"kind": "dial"}, _config()),
        ({"kind": "dial", "key": "mixer.leading_tokens", "values": [None, 4]}, _config()),
        ({"kind": "dial"}, _config(mixer=TRANSFORMER)),  # which has none of it
        ({"kind": "text", "set": {"mixer.chunk_size": 2}}, _config()),
        ({"kind": "text"}, _config(mixer=FUTURE)),
        (
            {"kind": "text", "context": None, "set": {"mixer.boundary": "cyclic"}},
            _config(mixer=FUTURE),
        ),
        ({"kind": "copy", "passage": 12, "gaps": [0, 100]}, _config()),
    ],
)
def test_a_score_that_a_run_can_have_is_not_refused(spec, config, texts):
    before = torch.random.get_rng_state()
    check_for_run({"one": spec}, config, texts)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_at_tiny_scale_it_is_the_tiny_score_that_is_tried(texts):
    specs = {"one": {"kind": "copy", "gaps": [1_000_000]}}
    check_for_run(specs, _config(), texts, tiny=True)
    with pytest.raises(ConfigError, match=r"scores\.one\.gaps"):
        check_for_run(specs, _config(), texts, tiny=False)


# --------------------------------------------------------------------------------------------
# Progress
# --------------------------------------------------------------------------------------------


class Blank(nn.Module):
    """A stand-in for a model: it has looked at so many batches, and knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 1)
        self.head = nn.Identity()
        self.batches = 0

    def forward(self, ids, return_hidden=False):
        self.batches += 1
        return torch.zeros(*ids.shape, 256)


PACED = {
    # Three digits of a row; four questions; twelve tokens of a passage, twice.
    "passkey": (
        {"kind": "passkey", "lengths": [150, 200], "rows": 5, "batch_size": 2},
        _config(PASSKEY),
        [6, 12, 15, 21, 27, 30],
    ),
    "recall": (
        {"kind": "recall", "gaps": [0, 10], "rows": 6, "batch_size": 4},
        _config(RECALL, mixer=TRANSFORMER),
        [16, 24, 40, 48],
    ),
    "copy": (
        {"kind": "copy", "passage": 20, "gaps": [10, 60], "rows": 5, "batch_size": 2},
        _config(),
        [48, 96, 120, 168, 216, 240],
    ),
}


@pytest.mark.parametrize("kind", PACED)
def test_a_score_of_memory_tells_the_tokens_scored_so_far_after_each_batch(kind, texts):
    spec, config, expected = PACED[kind]
    told, model = [], Blank()
    subject = Subject(model, load_tokenizer("bytes"), config, texts, told.append)
    result = make_score(spec, "s").measure(subject)
    assert told == expected and model.batches == len(expected)
    silent = Subject(model, load_tokenizer("bytes"), config, texts)
    assert make_score(spec, "s").measure(silent) == result


@pytest.mark.parametrize("kind", PACED)
def test_what_progress_raises_ends_a_score_of_memory(kind, texts):
    class OutOfTimeError(Exception):
        pass

    def stop(n):
        raise OutOfTimeError

    spec, config, _ = PACED[kind]
    model = Blank()
    with pytest.raises(OutOfTimeError):
        make_score(spec, "s").measure(Subject(model, load_tokenizer("bytes"), config, texts, stop))
    assert model.batches == 1


def test_a_dial_tells_the_tokens_scored_so_far_over_all_its_values(texts):
    config, told = _config(), []
    spec = {"kind": "dial", "values": [2, 4], "context": 32, "max_tokens": 100, "batch_size": 2}
    subject = Subject(
        attamba.build_model(config.model), load_tokenizer("bytes"), config, texts, told.append
    )
    result = make_score(spec, "s").measure(subject)
    assert len(result["rows"]) == 2
    assert told == sorted(told) and len(told) == len(set(told)) >= 4
    assert told[len(told) // 2 - 1] == 100 and told[-1] == 200
