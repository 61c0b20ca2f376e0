import io

import pytest
from rich.console import Console

from attamba.train import train
from attamba.train.progress import clock


def test_without_a_terminal_it_prints_lines(make_config, capsys, texts):
    change = {"train.progress": True, "train.log_every": 4, "data.train": str(texts)}
    train(make_config(change))
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Preparing ")
    assert out[1].startswith("2 documents, ")
    assert [line.split("  ")[0] for line in out[2:]] == [
        f"step {step}/12" for step in (4, 4, 8, 8, 12, 12)
    ]
    assert "tokens/s" in out[2]
    assert out[2].endswith(" left")
    assert "nats/token" in out[3]
    assert "bits/byte" in out[3]
    train(make_config(change))
    assert capsys.readouterr().out.startswith("Going on from ")


def test_progress_can_be_switched_off(make_config, capsys):
    train(make_config())
    assert capsys.readouterr().out == ""


def test_on_a_terminal_it_is_a_live_bar(make_config, monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", shown)
    console = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    train(make_config({"train.progress": True}))
    text = shown.getvalue()
    assert "12/12" in text
    assert "loss " in text
    assert "tokens/s" in text
    assert "left" in text
    assert "validation: " in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
