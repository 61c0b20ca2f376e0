"""attamba bench loop: a tiny run, and what its figures are made of."""

import json
from pathlib import Path

import pytest
import torch

from attamba.bench import loop, report
from attamba.bench.bare import BareStep, write_text
from attamba.cli import main
from attamba.config import RunConfig, from_dict, load_run_config
from attamba.data import TokenDataset
from attamba.models.accounting import n_parameters
from attamba.train.loop import open_loop

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def config_of(folder):
    tree = {
        "out": str(folder / "run"),
        "model": {"dim": 32, "n_layers": 1, "mixer": {"n_heads": 2, "state_dim": 8}},
        "data": {"seq_len": 32, "batch_size": 4, "valid_fraction": 0},
        "train": {"device": "cpu", "accumulate": 2, "progress": False, "steps": 3},
        "optim": {"warmup_steps": 0, "lr": 1e-3, "min_lr_ratio": 1.0},
    }
    config = from_dict(RunConfig, tree)
    config.data.train = write_text(str(folder), config)
    return config


def test_the_bare_step_is_the_loop_s_on_the_same_rows(tmp_path):
    """The weights after two steps are the same, so both do the same work."""
    config = config_of(tmp_path)
    bare = BareStep(config, torch.device("cpu"))
    with open_loop(config) as one:
        for _ in range(2):
            one.step()
            bare(bare.parts(one.run.batch), one.run.batch.n_scored)
        for own, other in zip(one.run.model.parameters(), bare.model.parameters()):
            assert torch.allclose(own, other, atol=1e-6)


def test_the_bare_step_goes_on_from_where_the_loop_is(tmp_path):
    """Weights, moments, learning rate: the same step leads to the same weights."""
    config = config_of(tmp_path)
    config.optim.warmup_steps = 9  # the rate of each step is another
    bare = BareStep(config, torch.device("cpu"))
    with open_loop(config) as one:
        for _ in range(3):
            bare.copy(one.run)
            one.step()
            bare(bare.parts(one.run.batch), one.run.batch.n_scored)
            for own, other in zip(one.run.model.parameters(), bare.model.parameters()):
                assert torch.allclose(own, other, atol=1e-6)
        bare(bare.parts(one.run.batch), one.run.batch.n_scored)
        weights = zip(one.run.model.parameters(), bare.model.parameters())
        assert not all(torch.allclose(own, other, atol=1e-6) for own, other in weights)


def test_both_take_the_same_rows(tmp_path, monkeypatch):
    from attamba.bench import bare

    seen = []
    step = bare.BareStep.__call__

    def seeing(self, parts, scored):
        seen.append(torch.cat([rows.inputs for rows in parts]))
        step(self, parts, scored)

    monkeypatch.setattr(bare.BareStep, "__call__", seeing)
    config = config_of(tmp_path)
    config.train.steps, config.train.log_every, config.train.save_every = 99, 3, 0
    config.metrics.layers_every = 12
    measured = loop.measure(config, torch.device("cpu"), 6)  # rounded up to 12
    (tmp_path / "again").mkdir()
    with open_loop(config_of(tmp_path / "again")) as one:
        batch = one.run.sources.train.batch
        wanted = [torch.from_numpy(batch(i).inputs) for i in range(9, 24)]
    assert len(seen) == 15 and all(map(torch.equal, seen, wanted))
    assert measured["layers_records"] == 1  # after step 24; those after 12 are of the warm-up


def test_the_text_has_documents_shorter_and_longer_than_a_row(tmp_path):
    config = config_of(tmp_path)
    dataset = TokenDataset.open(config.data.train)
    lengths = [len(document.tokens) for document in dataset.documents()]
    assert min(lengths) < 32 < max(lengths)
    assert dataset.n_tokens >= 8 * 32 * 4


def test_a_tiny_run(tmp_path, capsys):
    out = tmp_path / "out.json"
    command = ["bench", "loop", str(TINY), "model.dim=32", "model.n_layers=1"]
    sizes = ["--lengths", "32,64", "--tokens", "128", "--pass-tokens", "64", "--steps", "12"]
    rest = ["--layers-every", "10", "--device", "cpu", "--json", str(out)]
    assert main([*command, "metrics.peak_tflops=1", "train.log_every=5", *sizes, *rest]) == 0
    record = json.loads(out.read_text())
    assert [(row["length"], row["batch_size"]) for row in record["rows"]] == [(32, 4), (64, 2)]
    for row in record["rows"]:
        turns = row["turns_ms"]
        assert len(turns["loop"]) == len(turns["bare"]) == 4  # of log_every steps
        assert row["layers_records"] == 2  # 12 steps are rounded up to 20
        assert row["loop_ms"] == pytest.approx(sum(turns["loop"]) / 4)
        assert row["overhead"] == pytest.approx(sum(turns["loop"]) / sum(turns["bare"]) - 1)
        shares = [row[f"{name}_share"] for name in loop.PHASES]
        assert all(share > 0 for share in shares) and sum(shares) <= 1
        assert row["tokens_per_second"] > 0 < row["mfu"]
        assert row["peak_bytes"] is None and row["compile"] is False
        config = load_run_config(TINY, ["model.dim=32", "model.n_layers=1"])
        assert row["parameters"] == n_parameters(config.model)
    printed = capsys.readouterr().out
    assert "of the median turn" in printed and "tiny, 2 x 64" in printed
    assert "| tiny, 4 x 32 |" in report.markdown(record)


def test_a_config_is_asked_for(capsys):
    assert main(["bench", "loop", "--device", "cpu"]) == 2
    assert "name a CONFIG at least" in capsys.readouterr().err
