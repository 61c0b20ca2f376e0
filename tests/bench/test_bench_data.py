"""attamba bench data: a tiny run, and what its result file says."""

import argparse
import json
from pathlib import Path

import pytest

from attamba.bench import data, report
from attamba.cli import main
from attamba.config import ConfigError


def test_both_tokenize_the_same_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one two three four five six seven\n" * 300)
    (tmp_path / "b.txt").write_text("Grüße, 世界\n" * 100)
    out = tmp_path / "o.json"
    command = ["bench", "data", "--text", str(tmp_path), "--megabytes", "0.05", "--repeats", "2"]
    assert main([*command, "--vocab-size", "300", "--workers", "1", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    (row,) = record["rows"]
    assert 6 <= row["documents"] <= 10 and 50_000 <= row["bytes"] < 61_000
    assert row["tokens"] > row["documents"]
    for name in ("prepare", *data.METHODS):
        assert len(row["seconds"][name]) == 2 and row[f"{name}_mb_per_second"] > 0
    assert row["of_encode_batch"] > 0
    assert record["settings"]["workers"] == 1
    assert "prepare's speed, of this" in capsys.readouterr().out
    assert report.markdown(record).startswith("### data: megabytes 0.1, documents ")


def test_options_out_of_range():
    with pytest.raises(ConfigError, match=r"--repeats=0 must be above 0"):
        parser = argparse.ArgumentParser()
        data.add_arguments(parser)
        data.run(parser.parse_args(["--repeats", "0"]))


def test_the_result_holds_what_is_asked_of_it():
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "data-cpu.json"
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert row["of_encode_batch"] >= 0.8
