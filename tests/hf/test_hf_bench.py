"""attamba bench hf: a tiny run, and figures that do not depend on the machine."""

from __future__ import annotations

import json

import pytest

from attamba.cli import main

TINY = ["--dim", "32", "--layers", "1", "--prompt", "9", "--steps", "3", "--repeats", "1"]


def test_record(tmp_path, capsys):
    out = tmp_path / "hf.json"
    assert main(["bench", "hf", *TINY, "--device", "cpu", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [row["batch_size"] for row in record["rows"]] == [1, 8]
    for row in record["rows"]:
        assert row["same_tokens"]
        ratio = row["transformers_ms"] / row["attamba_ms"]
        assert row["overhead"] == pytest.approx(ratio - 1)
    assert record["settings"]["steps"] == 3
    assert "overhead" in capsys.readouterr().out


def test_bad_sizes(capsys):
    assert main(["bench", "hf", "--batch-sizes", "1,none"]) == 2
    assert "--batch-sizes=1,none must be numbers" in capsys.readouterr().err
