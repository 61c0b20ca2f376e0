"""attamba bench decode and train: tiny runs, and the figures that do not depend on the machine."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from attamba.bench import common, decode, report, train, train_gpu
from attamba.config import ConfigError
from attamba.display import format_bytes
from attamba.models.accounting import attention_entries, cache_bytes

TINY = ["--dim", "32", "--layers", "2", "--chunk-size", "4", "--device", "cpu", "--repeats", "2"]


def bench(module: ModuleType, *arguments: str, out: Path | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    extra = ["--json", str(out)] if out else []
    assert module.run(parser.parse_args([*TINY, *arguments, *extra])) == 0
    return json.loads(out.read_text()) if out else {}


def config(name: str) -> Any:
    return common.model_config(name, dim=32, layers=2, chunk_size=4)


def test_decode_counts_bytes_as_accounting_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = bench(
        decode, "--lengths", "50,300", "--batch-size", "2", out=tmp_path / "d" / "o.json"
    )
    assert [row["length"] for row in record["rows"]] == [50, 300]
    for row in record["rows"]:
        for name in common.MODELS:
            expected = cache_bytes(config(name), row["length"], batch_size=2)
            assert row[name]["bytes_used"] == expected <= row[name]["bytes_allocated"]
            assert 0 < row[name]["step_ms"] <= row[name]["step_ms_p90"]
        ours, theirs = row["attamba"], row["transformer"]
        assert row["speedup"] == pytest.approx(theirs["step_ms"] / ours["step_ms"])
        assert row["bytes_ratio"] == pytest.approx(theirs["bytes_used"] / ours["bytes_used"])
    assert record["rows"][-1]["bytes_ratio"] > 1.5
    assert record["settings"]["dtype"] == "float32"
    assert {"torch", "device", "threads", "date", "command"} <= record["environment"].keys()
    assert "times smaller" in capsys.readouterr().out


def test_what_was_not_given_goes_by_the_device() -> None:
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    given, left_out = parser.parse_args(["--dtype", "float32"]), parser.parse_args([])
    for args in (given, left_out):
        common.fill_in(args, torch.device("cuda"))
        assert args.batch_size == 1
    assert (given.dtype, left_out.dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize("option", ["--dtype=float32", "--batch-size=8"])
def test_a_step_on_a_gpu_takes_no_option_that_it_would_ignore(option: str) -> None:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    with pytest.raises(ConfigError, match=f"{option}: on CUDA a training step has 65536 tokens"):
        train_gpu.run(parser.parse_args([option]), [1024], torch.device("cuda"))


def test_decode_in_bfloat16_halves_the_keys_and_values(tmp_path: Path) -> None:
    record = bench(decode, "--lengths", "100", "--dtype", "bfloat16", out=tmp_path / "o.json")
    (row,) = record["rows"]
    for name in common.MODELS:
        assert row[name]["bytes_used"] == cache_bytes(config(name), 100, itemsize=2)


def test_train_measures_in_processes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = bench(train, "--lengths", "512,2100", "--threads", "1", out=tmp_path / "o.json")
    for row in record["rows"]:
        for name in common.MODELS:
            measured = row[name]
            assert measured["attention_entries"] == attention_entries(config(name), row["length"])
            assert measured["step_ms"] > 0 < measured["attention_ms"]
            assert 0 < measured["loss"] < 20
    # A longer row needs more memory; were it measured in one process, the peak could not tell.
    # The shorter one may do with what the step before it, of 64 tokens, has left.
    short, long = record["rows"]
    assert all(long[name]["peak_bytes"] > short[name]["peak_bytes"] >= 0 for name in common.MODELS)
    assert record["growth"] == {}, "512 is below a quarter of 2100: nothing to fit"
    printed = capsys.readouterr().out
    assert "entries of the attention map" in printed and "T*T / 2.0" in printed


def test_growth_is_the_exponent() -> None:
    rows: list[dict[str, Any]] = [
        {
            "length": n,
            **{
                name: {"step_ms": n**power, "attention_ms": n**2, "peak_bytes": 3 * n}
                | {"attention_entries": n * n}
                for name, power in (("attamba", 1.5), ("transformer", 2))
            },
        }
        for n in (1024, 2048, 4096)
    ]
    growth = train.growth(rows)
    assert growth["attamba"]["step_ms"] == pytest.approx(1.5)
    assert growth["attamba"]["peak_bytes"] == pytest.approx(1)
    assert growth["transformer"]["attention_entries"] == pytest.approx(2)
    assert train.growth(rows[:1]) == {}


def test_a_probe_that_fails_says_what_and_why() -> None:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args([*TINY, "--lengths", "16", "--batch-size", "-1"])
    with pytest.raises(
        RuntimeError, match=r"attamba at 16 tokens failed: (.|\n)*negative dimension"
    ):
        train.run(args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "1k,many"], "--lengths: 'many' is not a number of tokens such as 512 or 4k"),
        (["--lengths", "0"], "--lengths: '0' is not a number of tokens"),
        (["--threads", "0"], "--threads=0 must be at least 1"),
        (["--device", "gpu"], "--device='gpu' is not a device; give auto, cpu, cuda"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(decode, *arguments)


def test_lengths() -> None:
    assert common.parse_lengths("1k,100,64K") == [1024, 100, 65536]


def test_report_is_markdown_of_the_result_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench(decode, "--lengths", "20", out=tmp_path / "o.json")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "o.json")])
    report.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("### decode: dim 32, layers 2, chunk_size 4")
    assert sum(line.startswith("| 20 |") for line in lines) == 2


def test_options_are_known_without_torch() -> None:
    code = (
        "import argparse, sys; from attamba.bench import decode, train\n"
        "for m in (decode, train): m.add_arguments(argparse.ArgumentParser())\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bytes_are_written_for_people() -> None:
    assert [format_bytes(n) for n in (12, 1536, 3 << 20, 5 << 30)] == [
        "12 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.00 GiB",
    ]


def test_the_recorded_command_is_without_the_file_to_write(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/bin/attamba", "bench", "train", "--json", "/a/b", "--dim=8"]
    )
    assert common.command_line() == "attamba bench train --dim=8"
    monkeypatch.setattr(sys, "argv", ["attamba", "bench", "--json=/a/b"])
    assert common.command_line() == "attamba bench"


def test_captured_steps_are_held_against_both_kinds_of_transformer():
    own = {"step_ms": 2.0, "floor_ms": 1.0, "share_of_floor": 0.5, "tokens_per_second": 500.0}
    sizes = {"step_ms_p90": 2.0, "bytes_used": 1, "bytes_allocated": 1, "speedup": 1.5}
    row = {"length": 1024, "attamba": own | sizes, "transformer": own | sizes, "speedup": 1.5}
    row |= {"bytes_ratio": 1.0, "library": {"flash": 9.0, "cudnn": 6.0, "efficient": "too large"}}
    *_, captured = decode.tables({"rows": [row], "copy_bytes_per_second": 1e12})
    assert captured.rows[0] == [
        "1,024 attamba",
        "2.000 ms",
        "1.000 ms",
        "50%",
        "500",
        "1.50",
        "3.00",
    ]
    assert captured.rows[-1][:2] == ["1,024 transformer, efficient", "does not run"]
    assert all(len(line) == len(captured.headers) for line in captured.rows)


def test_the_readme_shows_every_result_file_as_it_is():
    folder = Path(__file__).parents[2] / "benchmarks"
    text = (folder / "README.md").read_text(encoding="utf-8")
    files = sorted((folder / "results").glob("*.json"))
    assert len(files) >= 8
    for path in files:
        record = json.loads(path.read_text(encoding="utf-8"))
        for block in report.markdown(record).split("\n\n"):
            assert block in text, f"{path.name}: {block[:80]}"
