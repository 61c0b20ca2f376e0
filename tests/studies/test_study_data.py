"""The studies' texts: one command makes them, and goes on where it was stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attamba.cli import main
from attamba.config import to_dict
from attamba.data import TokenDataset
from attamba.studies.data import tiny_texts

FOLDER = Path(__file__).parents[2] / "studies"


@pytest.fixture
def sources(tmp_path):
    for name, n in (("train", 6), ("valid", 2)):
        lines = [
            json.dumps({"text": f"{name} {i}: " + "a red tree, and more. " * 40}) for i in range(n)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    articles = "".join(f" = Title {i} = \n\n text of it, again and again .\n" for i in range(3))
    (tmp_path / "wiki.txt").write_text(articles)
    return tmp_path


def test_prepare_makes_tokenizer_and_texts(sources, capsys):
    out = sources / "study"
    command = ["study", "prepare", "--out", str(out), "--vocab-size", "300"]
    command += ["--train", str(sources / "train.jsonl"), "--valid", str(sources / "valid.jsonl")]
    command += ["--wikitext", str(sources / "wiki.txt"), "--documents", "4"]
    assert main(command) == 0
    sets = {name: TokenDataset.open(out / name) for name in ("train", "valid", "wikitext2")}
    assert [sets[name].n_documents for name in sets] == [4, 2, 3]
    assert len({dataset.fingerprint for dataset in sets.values()}) == 1
    assert 257 < sets["train"].vocab_size <= 300
    tokenizer = (out / "tokenizer" / "tokenizer.json").read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out == ""  # all was there
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer
    assert main([*command, "--documents", "0"]) == 2


def test_tiny_texts_are_made_once(tmp_path):
    folder = tiny_texts(tmp_path / "tiny")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert tiny_texts(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


BARE = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
from attamba.cli import main
sys.exit(main(sys.argv[2:]))
"""
EXTRAS = "yaml,rich,tensorboard,fsspec,pyarrow,tokenizers,sentencepiece,zstandard,matplotlib"


def test_a_recipe_as_json_needs_no_extra(texts, make_study, tmp_path):
    study = make_study()
    assert to_dict(study.runs("full")[0].config())["train"]["steps"] == 6
    recipe = str(tmp_path / "recipes" / "little.json")
    command = ["study", "run", recipe, "--only", "chunks-s0", "--data", str(texts)]
    command += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    done = subprocess.run(
        [sys.executable, "-c", BARE, EXTRAS, *command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 runs are done" in done.stdout
    assert (tmp_path / "results" / "little" / "chunks-s0.jsonl").exists()
