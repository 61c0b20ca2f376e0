import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from attamba.config import OptimConfig, RunConfig, TrainConfig
from attamba.models import build_model
from attamba.train.optim import (
    build_optimizer,
    lr_at,
    optimizer_tensors,
    parameter_groups,
    restore_optimizer,
)


def schedule(steps=101, **optim):
    config = RunConfig(optim=OptimConfig(**optim), train=TrainConfig(steps=steps))
    return [lr_at(step, config) for step in range(steps)]


def test_schedule_warms_up_linearly_then_follows_half_a_cosine():
    lr = schedule(lr=2.0, warmup_steps=20, min_lr_ratio=0.1)
    assert lr[0] == pytest.approx(0.1)
    assert lr[9] == pytest.approx(1.0)
    assert lr[19] == lr[20] == pytest.approx(2.0)
    assert lr[60] == pytest.approx(0.2 + 1.8 / 2)
    assert lr[40] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(lr[20:]))


def test_schedule_without_warmup_starts_at_the_peak_and_ends_at_the_minimum():
    lr = schedule(lr=1.0, warmup_steps=0, min_lr_ratio=0.0)
    assert lr[0] == 1.0
    assert lr[-1] == pytest.approx(0.0, abs=1e-12)
    assert schedule(steps=1, lr=1.0, warmup_steps=0) == [1.0]


def test_a_run_shorter_than_its_warmup_is_still_warming_up():
    assert schedule(steps=3, lr=1.0, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75])


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 3))
        self.kernel = nn.Parameter(torch.ones(2, 1, 3))
        self.vector = nn.Parameter(torch.ones(3))
        self.gains = nn.Parameter(torch.ones(2, 3))
        self.gains._no_weight_decay = True
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_matrices_decay_and_vectors_do_not():
    model = Mixed()
    decayed, plain = parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(model.matrix), id(model.kernel)]
    assert [id(p) for p in plain["params"]] == [id(model.vector), id(model.gains)]


def test_groups_hold_every_parameter_of_a_decoder_once(make_config):
    config = make_config({"model.tie_embeddings": True}).model
    model = build_model(config)
    decayed, plain = parameter_groups(model, 0.1)
    grouped = [id(p) for p in decayed["params"] + plain["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    vectors = {names[id(p)].rsplit(".", 1)[-1] for p in plain["params"]}
    assert vectors >= {"A_log", "dt_bias", "D_skip", "norm_weight"}
    assert not any(p.ndim < 2 for p in decayed["params"])


def test_optimizer_state_goes_through_names_and_back():
    model = Mixed()
    optimizer = build_optimizer(model, OptimConfig())
    for name in ("matrix", "vector"):  # the others have never had a gradient
        getattr(model, name).grad = torch.full_like(getattr(model, name), 0.5)
    optimizer.step()
    tensors = {k: t.clone() for k, t in optimizer_tensors(optimizer, model).items()}
    assert set(tensors) == {
        f"{name}.{key}"
        for name in ("matrix", "vector")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }

    twin = Mixed()
    twin.load_state_dict(model.state_dict())
    other = build_optimizer(twin, OptimConfig())
    restore_optimizer(other, twin, tensors)
    for one, opt in ((model, optimizer), (twin, other)):
        one.matrix.grad = torch.arange(6.0).view(2, 3)
        opt.step()
    assert torch.equal(model.matrix, twin.matrix)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("matrix.exp_avg"), "lacks matrix.exp_avg"),
        (lambda t: t.update({"matrix.exp_avg": torch.ones(3)}), r"matrix.exp_avg has shape \[3\]"),
        (lambda t: t.update({"other.step": torch.ones(())}), "no parameter for other.step"),
    ],
)
def test_optimizer_state_that_does_not_fit_is_refused(change, text):
    model = Mixed()
    optimizer = build_optimizer(model, OptimConfig())
    model.matrix.grad = torch.ones(2, 3)
    optimizer.step()
    tensors = optimizer_tensors(optimizer, model)
    change(tensors)
    with pytest.raises(ValueError, match=text):
        restore_optimizer(build_optimizer(model, OptimConfig()), model, tensors)
