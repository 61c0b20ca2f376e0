"""Every script in examples/ is run as a user runs it, in the small, and what it prints is read."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import attamba

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
HELPERS = {"page"}
"""Modules of examples/ that others import and that do nothing themselves."""

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
needs_all = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "lm_eval", "openai", "fastapi"))),
    reason="transformers, lm_eval, openai or fastapi is not installed",
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder that examples share, and with it the model that the first of them trains."""
    return tmp_path_factory.mktemp("examples")


def run(name, *options):
    """What an example prints on standard output."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(text):
    """ "1.5 KiB" -> 1536.0"""
    value, unit = text.split()
    return float(value) * {"B": 1, "KiB": 2**10, "MiB": 2**20}[unit]


def test_train(out):
    said = run("train", "--out", out, "--steps", 3)
    bits = float(re.search(r"model-3: (\S+) bits per byte of unseen text", said)[1])
    assert 0 < bits < 12
    assert re.search(r"step 3: loss \d\.\d+ nats", said)
    model, tokenizer = attamba.load(out / "model-3")
    assert model.config.vocab_size == tokenizer.vocab_size == 256


def test_generate(out):
    said = run("generate", "--out", out, "--steps", 3)
    assert said.startswith('Sampled: The "if" statement is used ')
    assert "without a cache the same tokens: True" in said
    sizes = re.findall(r"(\d+) tokens: cache (\S+ \S+), full attention (\S+ \S+)", said)
    assert [int(tokens) for tokens, _, _ in sizes] == [100, 1000, 4000]
    assert number(sizes[-1][2]) == pytest.approx(4000 * 2 * 2 * 128 * 4, rel=0.02)
    assert number(sizes[-1][1]) < number(sizes[-1][2]) / 6


def test_chunks(out):
    said = run("chunks", "--out", out, "--steps", 3)
    drawn = dict(re.findall(r"^([\w, ]+): \S+ nats per byte\n +(?:layer 0  )?(.*)$", said, re.M))
    assert set(drawn) == {"uniform", "cyclic", "at spaces", "ever longer", "given, words"}
    text = 'The "else" clause, if present, is executed. The "if" statement'
    assert len({line.replace("|", "") for line in drawn.values()}) == 1
    assert drawn["uniform"].startswith('T|he "els|e" claus|e, if pr|')
    assert drawn["at spaces"].startswith("T|" + text.replace(" ", " |")[1:])
    assert drawn["given, words"].startswith('The "|else" |clause, |if |present, |is |executed. |')
    assert re.search(r"the cache holds [\d,]+ bytes", said)


def test_dial(out):
    said = run("dial", "--out", out, "--steps", 3)
    rows = re.findall(r"^(\d+|None) +(\d+\.\d+) +(\S+ \S+)$", said, re.M)
    assert [value for value, _, _ in rows[:6]] == ["1", "2", "4", "8", "16", "32"]
    assert [value for value, _, _ in rows[6:]] == ["0", "16", "64", "None"]
    caches = [number(cache) for _, _, cache in rows]
    assert caches[:6] == sorted(caches[:6], reverse=True) and caches[6:] == sorted(caches[6:])
    assert len({bits for _, bits, _ in rows}) > 2


def test_hybrid(out):
    said = run("hybrid", "--out", out, "--steps", 2)
    rows = re.findall(r"^(.{16}) +([\d,]+) +(\d\.\d+) +(\S+ \S+)$", said, re.M)
    assert [name.strip() for name, *_ in rows] == ["attamba", "full attention", "hybrid"]
    chunked, full, hybrid = (number(cache) for *_, cache in rows)
    assert full == pytest.approx(2000 * 4 * 2 * 64 * 4, rel=0.02)
    assert max(chunked, hybrid) < full / 4


@needs_transformers
def test_transformers_generate(out):
    said = run("transformers_generate", "--out", out, "--steps", 3)
    assert said.startswith('streamed: The "if" statement')
    assert said.count("three beams: ") == 2
    assert "going on from a returned cache: the same tokens: True" in said
    assert re.search(r"AttambaCache\(\d+ tokens, [\d,]+ bytes\)", said)


@needs_transformers
def test_transformers_finetune(out):
    said = run("transformers_finetune", "--out", out, "--steps", 8)
    before, after = re.search(r"json/encoder.py: (\S+) before, (\S+) after", said).groups()
    assert float(after) < float(before)
    assert "as a checkpoint again: 'def " in said
    assert (out / "tuned" / "checkpoints").is_dir()


@needs_all
def test_end_to_end_and_its_page(out):
    page = out / "page.md"
    said = run("end_to_end", "--out", out / "whole", "--steps", 1, "--write", page)
    assert said.endswith("The server and generate() said the same.\n")
    # `attamba eval`, its harness tasks, and the harness's own command line say the same.
    scored = {
        float(bits) for bits in re.findall(r"bits[ _]per[ _]byte *\|?↓? *\|? *(\d\.\d{4})", said)
    }
    assert len(scored) == 1
    text = page.read_text(encoding="utf-8")
    for part in ("attamba train", "attamba export", "AutoModelForCausalLM", "attamba-lm-eval",
                 "attamba serve", "OpenAI("):  # fmt: skip
        assert part in text
    shown = (ROOT / "docs" / "end-to-end.md").read_text(encoding="utf-8")
    assert "Written by `python examples/end_to_end.py --write docs/end-to-end.md`" in shown
    assert code_of(shown) == code_of(text), "the example has changed: write its page anew"


def code_of(page):
    """Headings of a page, and the functions that it shows."""
    python = re.findall(r"```python\n(.*?)\n\n\nprint", page, re.S)
    return re.findall(r"^## .*$", page, re.M), python


def test_a_folder_in_use_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the example sets, put back
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES / "end_to_end.py"), run_name="__main__")
    assert left.value.code == 2
    assert "exists; delete it, or name another folder" in capsys.readouterr().err


def test_every_example_is_run_here_and_is_short():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    source = Path(__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'run\("(\w+)"', source)) == names - HELPERS
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 125, path
