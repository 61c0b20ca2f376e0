"""One model at many P: the size of each step, and that it is the one used."""

import re
from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from attamba.config import ConfigError
from attamba.models import build_model
from attamba.train import train
from attamba.train.chunk_sizes import draw_size, set_chunk_size
from attamba.train.parallelize import parallelize
from attamba.train.run import Run


def test_a_draw_is_a_function_of_seed_and_step():
    sizes = [1, 2, 4, 8]
    drawn = [draw_size(sizes, 3, step) for step in range(400)]
    assert drawn == [draw_size(sizes, 3, step) for step in range(400)]
    assert drawn != [draw_size(sizes, 4, step) for step in range(400)]
    assert all(60 < count < 140 for count in Counter(drawn).values()) and len(set(drawn)) == 4


def test_each_step_trains_at_its_own_p(make_config, monkeypatch):
    seen = []
    config = make_config({"train.chunk_sizes": [2, 8], "train.steps": 6})
    gradients = Run.gradients

    def watched(self, batch):
        seen.append(self.model.layers[0].mixer.boundary.chunk_size)
        return gradients(self, batch)

    monkeypatch.setattr(Run, "gradients", watched)
    result = train(config)
    assert seen == [draw_size([2, 8], 0, step) for step in range(6)] and len(set(seen)) == 2
    plain = train(make_config({"train.steps": 6}, out="plain"))
    losses = [[r["loss"] for r in run.metrics if r["kind"] == "train"] for run in (result, plain)]
    assert losses[0] != losses[1]


def test_every_p_is_compiled(make_config, monkeypatch):
    """However many there are: torch.compile leaves a ninth variant as it is unless it is told."""
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=counter))
    sizes = list(range(1, 11))
    config = make_config({"train.chunk_sizes": sizes, "train.compile": True})
    model = build_model(config.model)
    ids = torch.randint(0, 9, (2, 24))
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        forward = parallelize(model, None, config)
        for size in sizes:
            set_chunk_size(model, size)
            forward(ids)
    assert counter.frame_count == len(sizes)


def test_validation_is_at_the_config_s_own_p(make_config):
    config = make_config({"train.chunk_sizes": [1], "train.steps": 1, "optim.lr": 1e-30})
    other = make_config({"train.steps": 1, "optim.lr": 1e-30}, out="other")
    valid = [
        [r["valid_loss"] for r in train(c).metrics if r["kind"] == "valid"] for c in (config, other)
    ]
    assert valid[0] == valid[1]


def test_a_hybrid_s_full_layer_is_left_alone(make_config):
    import attamba

    mixers = [{"type": "attamba", "n_heads": 2, "ssm_heads": 2}, {"type": "transformer"}]
    model = attamba.build_model(attamba.ModelConfig(vocab_size=9, dim=16, n_layers=2, mixer=mixers))
    set_chunk_size(model, 3)
    assert model.layers[0].mixer.boundary.chunk_size == 3
    set_chunk_size(model, None)
    assert model.layers[0].mixer.boundary.chunk_size == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.chunk_sizes": []}, "train.chunk_sizes=[] is empty"),
        ({"train.chunk_sizes": [4, 0]}, "train.chunk_sizes=0 must be at least 1"),
        (
            {"train.chunk_sizes": [4], "mixer": {"type": "transformer", "n_heads": 2}},
            "needs a mixer with chunks",
        ),
        ({"train.chunk_sizes": [4], "mixer.boundary": "given"}, "no effect on boundary=given"),
    ],
)
def test_sizes_without_effect_are_errors(make_config, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_config(changes).validate()
