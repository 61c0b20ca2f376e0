import json
import resource

import pytest

from attamba.data import MissingPackageError
from attamba.train import read_metrics, train
from attamba.train.metrics import MetricsLog


def write(path, *lines):
    (path / "metrics.jsonl").write_text("".join(lines))


def line(step, **more):
    return json.dumps({"kind": "train", "step": step, **more}) + "\n"


def test_reading_leaves_out_a_torn_last_line(tmp_path):
    write(tmp_path, line(1), line(2), '{"kind": "train", "st')
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("bad", ["nonsense\n", "[1]\n", "{}\n"])
def test_reading_names_a_line_that_is_no_record(tmp_path, bad):
    write(tmp_path, line(1), bad, line(3))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_lines_after_the_resumed_step_are_cut(tmp_path):
    write(tmp_path, *(line(step) for step in range(1, 6)), '{"torn')
    with MetricsLog(tmp_path, step=3) as log:
        assert [r["step"] for r in log.records] == [1, 2, 3]
        log.write({"kind": "train", "step": 4, "loss": 0.5})
        # A reader sees the line while the run goes on.
        assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] == 0.5


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    write(tmp_path, line(1), "nonsense\n")
    with MetricsLog(tmp_path, step=0) as log:
        assert log.records == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tensorboard_shows_the_metrics_and_forgets_what_resume_cut(make_config, crash_at):
    config = make_config({"train.tensorboard": True})
    with pytest.raises(crash_at.error):
        train(config, on_log=crash_at(6))
    result = train(config)
    folder = result.run_dir / "tensorboard"
    for kind, key in (("train", "loss"), ("train", "lr"), ("valid", "valid_loss")):
        wanted = {r["step"]: r[key] for r in result.metrics if r["kind"] == kind}
        assert scalars(folder, f"{kind}/{key}") == pytest.approx(wanted, rel=1e-6)


def test_no_tensorboard_unless_asked_for(make_config):
    result = train(make_config({"train.steps": 1}))
    assert not (result.run_dir / "tensorboard").exists()


def test_a_missing_tensorboard_is_named_before_training(make_config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    text = r"tensorboard in metrics\.sinks needs tensorboard.*pip install 'attamba\[train\]'"
    with pytest.raises(MissingPackageError, match=text):
        train(make_config({"train.tensorboard": True}))


def test_a_full_disk_names_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = 0
    try:
        with pytest.raises(OSError, match="make room, and the same command") as caught:  # noqa: SIM117
            with MetricsLog(tmp_path, step=0) as log:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
                while True:
                    log.write({"kind": "train", "step": written + 1, "loss": 1.0})
                    written += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(
        range(1, written + 1)
    )
