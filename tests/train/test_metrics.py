import json
import resource

import pytest

from attamba.data import MissingPackageError
from attamba.train import read_metrics, train
from attamba.train.metrics import MetricsLog, append_line, read_lines


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


@pytest.mark.parametrize(
    "bad", ["nonsense\n", '{"seconds": 1}{"seconds": 2}\n', "[1]\n", "\n", "\r\n"]
)
def test_lines_of_any_keys_are_read_and_what_is_none_is_named(tmp_path, bad):
    path = tmp_path / "calls.jsonl"
    path.write_text('{"seconds": 1}\n{"seconds": 2}\n{"sec')
    assert read_lines(path) == [{"seconds": 1}, {"seconds": 2}]
    path.write_bytes(b'{"seconds": 1}\n' + bad.encode() + b'{"seconds": 3}\n')
    with pytest.raises(
        ValueError, match=r"calls\.jsonl, line 2 is not .*; mend or delete that line"
    ):
        read_lines(path)


def test_a_carriage_return_ends_no_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\r{"step": 2}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("torn", ["", '{"kind": "train", "st', "{", line(9).rstrip()])
@pytest.mark.parametrize("whole", ["", line(1), line(1) + line(2)])
def test_a_line_is_never_glued_to_a_torn_one(tmp_path, whole, torn):
    write(tmp_path, whole, torn)
    append_line(tmp_path / "metrics.jsonl", {"kind": "train", "step": 3})
    append_line(tmp_path / "metrics.jsonl", {"kind": "train", "step": 4})
    assert (tmp_path / "metrics.jsonl").read_text() == whole + line(3) + line(4)


def test_the_first_line_makes_the_file(tmp_path):
    append_line(tmp_path / "metrics.jsonl", {"kind": "train", "step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == line(1)


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
