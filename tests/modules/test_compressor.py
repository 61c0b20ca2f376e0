"""The compressors' weights when training begins."""

import pytest
import torch
from torch.nn import functional as F

from attamba.config import ConfigError, ModelConfig
from attamba.models import build_model

IDS = torch.arange(48)[None] % 29


def model_of(**changes):
    mixer = {"type": "attamba", "n_heads": 2, "chunk_size": 4, "leading_tokens": 8, **changes}
    mixer |= {"state_dim": 4, "ssm_heads": 2}
    torch.manual_seed(0)
    return build_model(ModelConfig(vocab_size=32, dim=16, n_layers=2, mixer=mixer))


def outputs(model):
    """SSM_k(u) and SSM_v(u) of the first layer, for random u."""
    found = []
    compressors = model.layers[0].mixer.compressors
    hook = compressors.register_forward_hook(lambda module, inputs, output: found.append(output))
    model(IDS)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("scope", ["chunk", "sequence", "strided"])
def test_their_size_is_ssm_init(scope):
    full, half = (outputs(model_of(ssm_scope=scope, ssm_init=x)) for x in (1.0, 0.5))
    for one, other in zip(full, half):
        assert torch.allclose(other, 0.5 * one, rtol=1e-4, atol=1e-6)
    assert 0.2 < float(full[0].detach().std()) < 5  # as the token, whose is 1


def test_from_zero_they_learn():
    """Keys and values begin as the token's own; the first step changes that, the second all."""
    model = model_of(ssm_init=0.0)
    compressors = model.layers[0].mixer.compressors
    before = {name: p.detach().clone() for name, p in compressors.named_parameters()}
    assert not any(output.any() for output in outputs(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(IDS)[0, :-1], IDS[0, 1:]).backward()
        optimizer.step()
    assert all(output.any() for output in outputs(model))
    for name, p in compressors.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_a_size_that_cannot_be():
    with pytest.raises(ConfigError, match=r"mixer\.ssm_init=-0.5 must be at least 0"):
        model_of(ssm_init=-0.5)
