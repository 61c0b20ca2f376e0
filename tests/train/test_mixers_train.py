"""Every mixer and compressor in the trainer: learns, resumes exactly, loads, writes, scores."""

import pytest
import torch

import attamba
from attamba.config import to_dict
from attamba.evaluate import evaluate
from attamba.train import load, train

ATTAMBA = {"type": "attamba", "n_heads": 2, "chunk_size": 4, "leading_tokens": 8}
SMALL_SSM = {"state_dim": 8, "ssm_heads": 2}
MIXERS = {
    "mamba2": {"type": "mamba2", "head_dim": 16, "state_dim": 8},
    "mingru": {"type": "mingru"},
    "minlstm": {"type": "minlstm"},
    "hawk": {"type": "hawk"},
    "mean": {**ATTAMBA, "compressor": "mean"},
    "gated": {**ATTAMBA, "compressor": "gated"},
    "strided": {**ATTAMBA, **SMALL_SSM, "ssm_scope": "strided"},
    "first_attention": {**ATTAMBA, **SMALL_SSM, "boundary": "first_attention"},
    "first_ssm": {**ATTAMBA, **SMALL_SSM, "boundary": "first_ssm"},
    "hybrid": [{"type": "hawk"}, {**ATTAMBA, **SMALL_SSM}],
}


def losses(result):
    return [r["loss"] for r in result.metrics if r["kind"] == "train"]


@pytest.mark.parametrize("name", MIXERS)
def test_learns_resumes_loads_writes_and_scores(name, make_config, crash_at):
    options = {"model.mixer": MIXERS[name], "model.n_layers": 2, "train.steps": 14}
    options |= {"train.eval_every": 0, "train.save_every": 5, "optim.lr": 1e-2}
    whole = train(make_config(options, out="whole"))
    curve = losses(whole)
    assert sum(curve[-3:]) / 3 < 0.8 * curve[0]

    config = make_config(options, out="again")
    with pytest.raises(crash_at.error):
        train(config, on_log=crash_at(8))
    assert losses(train(config)) == curve

    model, tokenizer = load(whole.run_dir)
    other, _ = load(config.out)
    assert to_dict(model.config) == to_dict(config.model)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), other(ids))
    result = evaluate(model, tokenizer, ["the cat sees a dog", "a tree"], context=16)
    assert result.n_tokens == 24 and result.perplexity < 256
    if not name.startswith("first"):
        (written,) = attamba.generate(model, [[116, 104, 101]], max_new_tokens=5)
        assert len(written) == 8
