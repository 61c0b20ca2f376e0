"""Where records go: TensorBoard, and wandb and trackio as their own documentation has them."""

import sys
from types import ModuleType

import pytest

from attamba.config import to_dict
from attamba.data import MissingPackageError
from attamba.train import TrainingInterrupted, read_metrics, train
from attamba.train.sinks import scalars


class Tracker:
    """A package with init(...), which gives a run with define_metric, log and finish."""

    def __init__(self, name, monkeypatch):
        self.runs = []
        module = ModuleType(name)
        module.init = self.init
        monkeypatch.setitem(sys.modules, name, module)

    def init(self, **options):
        run = ModuleType("run")
        run.options, run.logged, run.axes, run.finished = options, [], [], []
        run.define_metric = lambda *args, **kwargs: run.axes.append((args, kwargs))
        run.log = lambda values, step=None: run.logged.append((values, step))
        run.finish = lambda: run.finished.append(True)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    return Tracker("wandb", monkeypatch)


@pytest.fixture
def trackio(monkeypatch):
    return Tracker("trackio", monkeypatch)


def test_records_become_numbers_by_name():
    record = {"kind": "layers", "step": 4, "tokens": 7, "x": {"layers.0": 1.5, "embed": None}}
    assert dict(scalars(record)) == {"layers/tokens": 7, "layers/x/layers.0": 1.5}
    record = {"kind": "valid", "step": 4, "valid_loss": None, "checkpoint": "step-00000004"}
    assert dict(scalars(record)) == {}


def test_wandb_gets_every_record_with_its_step_as_the_axis(make_config, wandb):
    config = make_config({"metrics.sinks": ["jsonl", "wandb"], "metrics.project": "own"})
    result = train(config)
    (run,) = wandb.runs
    assert run.options["project"] == "own" and run.options["name"] == "run"
    assert run.options["config"] == to_dict(config)
    assert run.axes == [(("step",), {}), (("*",), {"step_metric": "step"})]
    want = [{"step": r["step"], **dict(scalars(r))} for r in result.metrics]
    assert [values for values, _ in run.logged] == want
    assert want[0]["train/loss"] == result.metrics[0]["loss"]
    assert run.finished == [True]


def test_trackio_gets_every_record_at_its_step(make_config, trackio):
    result = train(make_config({"metrics.sinks": ["trackio"]}))
    (run,) = trackio.runs
    assert run.logged == [(dict(scalars(r)), r["step"]) for r in result.metrics]
    assert run.options["project"] == "attamba" and run.options["name"].startswith("run-")
    assert run.finished == [True]


def test_a_run_that_goes_on_keeps_its_name_and_a_new_one_gets_another(make_config, wandb, trackio):
    config = make_config({"metrics.sinks": ["jsonl", "wandb", "trackio"]})
    asked = []
    with pytest.raises(TrainingInterrupted):
        train(config, should_stop=lambda: asked.append(1) or len(asked) == 6)
    train(config)
    train(make_config({"metrics.sinks": ["wandb"]}, out="other"))
    first, second, other = (run.options["id"] for run in wandb.runs)
    assert first == second != other
    assert [run.options["name"] for run in trackio.runs] == [f"run-{first[:8]}"] * 2
    assert all(run.options["resume"] == "allow" for run in [*wandb.runs, *trackio.runs])


def test_without_jsonl_there_is_no_file(make_config, wandb):
    result = train(make_config({"metrics.sinks": ["wandb"]}))
    assert not (result.run_dir / "metrics.jsonl").exists()
    assert len(result.metrics) == len(wandb.runs[0].logged) == 15
    plain = train(make_config(out="plain"))
    assert len(read_metrics(plain.run_dir / "metrics.jsonl")) == 15


def test_layers_are_drawn_one_by_one(make_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    change = {"metrics.sinks": ["jsonl", "tensorboard"], "metrics.layers_every": 6}
    result = train(make_config(change))
    events = EventAccumulator(str(result.run_dir / "tensorboard")).Reload()
    for record in (r for r in result.metrics if r["kind"] == "layers"):
        for module, norm in record["grad_norm"].items():
            drawn = {e.step: e.value for e in events.Scalars(f"layers/grad_norm/{module}")}
            assert drawn[record["step"]] == pytest.approx(norm)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_that_is_not_there_is_named_before_training(make_config, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    text = rf"{name} in metrics\.sinks needs {name}.*it comes with: pip install {name}"
    with pytest.raises(MissingPackageError, match=text):
        train(make_config({"metrics.sinks": ["jsonl", name]}))
