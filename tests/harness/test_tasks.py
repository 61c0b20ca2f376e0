"""Tasks through the unpatched harness: local text, and the harness's own with stand-in data."""

import errno
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tomllib
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import Registry
from lm_eval.tasks._index import TaskIndex

import attamba
from attamba.cli import main
from attamba.config import ConfigError, RunConfig, from_dict
from attamba.data import DataError, load_tokenizer
from attamba.evaluate import evaluate
from attamba.harness import LOCAL_TASKS, AttambaLM, figures, load_tasks, run_tasks
from attamba.harness.run import TASKS
from attamba.harness.tasks.local import wikitext_articles
from attamba.train import save_checkpoint

TOKENIZER = load_tokenizer("bytes")
WIKI = """ 
 = Fish = 
 
 A fish , or " pisces " , swims @-@ fast . 
 = = Fins = = 
 
 It has 1 @,@ 000 's of fins ( some ) . 
 
 = Birds ! = 
 
 They fly . 
 = = = Wings = = = 
 Two = many . 
"""  # noqa: W291, W293 - as WikiText is written
PAGES = [
    ' = Fish = \n \n A fish , or " pisces " , swims @-@ fast . \n = = Fins = = \n \n'
    " It has 1 @,@ 000 's of fins ( some ) . \n ",
    " = Birds ! = \n \n They fly . \n = = = Wings = = = \n Two = many . ",
]
PLAIN = [
    ' = Fish =\n\nA fish, or "pisces", swims-fast.\n== Fins ==\n\n'
    "It has 1,000's of fins (some).\n",
    " = Birds! =\n\nThey fly.\n=== Wings ===\nTwo = many. ",
]
STAND_INS = {
    "EleutherAI/wikitext_document_level": [{"page": page} for page in PAGES],
    "EleutherAI/lambada_openai": [{"text": "The last word of this line is here"}] * 2,
    "Rowan/hellaswag": [
        {
            "ind": i,
            "activity_label": "Cooking",
            "ctx_a": "A man cooks.",
            "ctx_b": "he",
            "endings": ["eats", "sleeps for a long time", "sings", "runs away"],
            "label": str(i),
        }
        for i in range(3)
    ],
    "allenai/ai2_arc": [
        {
            "id": "q",
            "question": "What is wet?",
            "choices": {"text": ["water", "a stone"], "label": ["A", "B"]},
            "answerKey": "A",
        }
    ],
    "baber/piqa": [{"goal": "To boil", "sol1": "heat it", "sol2": "cool it down", "label": 0}],
    "allenai/winogrande": [
        {
            "sentence": "Ann thanked Bea because _ had helped.",
            "option1": "Ann",
            "option2": "Bea",
            "answer": "2",
        }
    ],
}


@pytest.fixture(scope="module", autouse=True)
def every_task():
    """The harness finds its thousands of tasks once; that takes seconds."""
    found: dict[tuple[Path, ...], dict[str, Any]] = {}
    build = TaskIndex.build

    def find(paths, **options):
        key = (*paths,)
        if key not in found:
            found[key] = build(paths, **options)
        return dict(found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(find))
        yield


@pytest.fixture
def stand_ins(monkeypatch):
    """What the harness would load from the network."""

    def load(path, name=None, **options):
        rows = datasets.Dataset.from_list(STAND_INS[path])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and WikiText beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "wiki.txt").write_text(WIKI)
    config = from_dict(RunConfig, {"data": {"train": "x", "seq_len": 32}})
    save_checkpoint(folder, step=1, model=build(), config=config, tokenizer=TOKENIZER)
    return folder


@pytest.fixture
def run(folder, capsys):
    """`attamba eval` over the checkpoint: (status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(["eval", str(folder), "--device", "cpu", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def build() -> attamba.Decoder:
    torch.manual_seed(0)
    mixer = {"n_heads": 4, "chunk_size": 4, "leading_tokens": 5}
    return attamba.build_model(
        attamba.ModelConfig(vocab_size=256, dim=32, n_layers=2, mixer=mixer)  # type: ignore[arg-type]
    )


def nats(texts: list[str], context: int) -> float:
    """Summed over the texts' tokens, as `attamba eval` has them."""
    result = evaluate(build(), TOKENIZER, texts, context=context, stride=context)
    return result.nats_per_token * result.n_tokens


# --------------------------------------------------------------------------------------------
# Local text
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_articles_are_cut_at_titles_alone(tmp_path, line_end):
    (tmp_path / "wiki.txt").write_bytes(WIKI.replace("\n", line_end).encode())
    pages = wikitext_articles(wikitext2_local=tmp_path / "wiki.txt", version=1.0)["test"]
    assert list(pages["page"]) == PAGES


@pytest.mark.parametrize("batch_size", [1, 16])
def test_wikitext_is_scored_as_eval_scores_the_plain_text(folder, batch_size):
    lm = AttambaLM(build(), TOKENIZER, context=32, batch_size=batch_size)
    found = run_tasks(lm, load_tasks([f"wikitext2_local={folder}/wiki.txt"]))["results"][
        "wikitext2_local"
    ]
    total = nats(PLAIN, 32)
    words = sum(len(re.split(r"\s+", page)) for page in PAGES)
    size = sum(len(page.encode()) for page in PAGES)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(total / words), rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(total / size), rel=1e-6)
    assert found["bits_per_byte,none"] == pytest.approx(total / math.log(2) / size, rel=1e-6)


def test_books_are_scored_as_they_are(folder, monkeypatch, tmp_path):
    texts = ["A book.\n\n" * 9, "Ein Büchlein"]
    lines = [json.dumps({"title": "x", "text": text}) for text in texts]
    (tmp_path / "books.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("ATTAMBA_BOOKS_BPB", str(tmp_path / "books.jsonl"))
    lm = AttambaLM(build(), TOKENIZER, context=32)
    tasks = load_tasks(["books_bpb"])
    result = run_tasks(lm, tasks)
    size = sum(len(text.encode()) for text in texts)
    want = nats(texts, 32) / math.log(2) / size
    assert result["results"]["books_bpb"]["bits_per_byte,none"] == pytest.approx(want, rel=1e-6)
    assert result["n-samples"]["books_bpb"]["effective"] == 2
    assert figures(result)["books_bpb/bits_per_byte"] == pytest.approx(want, rel=1e-6)
    assert set(figures(result)) == {"books_bpb/bits_per_byte", "books_bpb/byte_perplexity"}
    first = run_tasks(lm, tasks, limit=1)["results"]["books_bpb"]
    want = nats(texts[:1], 32) / math.log(2) / len(texts[0].encode())
    assert first["bits_per_byte,none"] == pytest.approx(want, rel=1e-6)


def test_random_states_come_back(folder):
    lm = AttambaLM(build(), TOKENIZER, context=32)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    run_tasks(lm, load_tasks([f"wikitext2_local={folder}/wiki.txt"]))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


# --------------------------------------------------------------------------------------------
# The harness's tasks
# --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_ins")
def test_the_usual_tasks_run_as_the_harness_defines_them(folder, run, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAMBA_WIKITEXT2_LOCAL", str(folder / "wiki.txt"))
    usual = ["wikitext", "lambada_openai", "hellaswag", "arc_easy", "piqa", "winogrande"]
    names = ",".join([*usual, "wikitext2_local"])
    status, out, _ = run("--tasks", names, "--json", tmp_path / "out.json", "--context", 48)
    assert status == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["context"] == 48
    found = record["results"]
    assert set(found) == {*usual, "wikitext2_local"}
    for name in usual:
        assert f"|{name} " in out
    assert found["hellaswag"]["acc,none"] == pytest.approx(1 / 3)  # each answer is right once
    for measure in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found["wikitext2_local"][f"{measure},none"] == found["wikitext"][f"{measure},none"]


def test_a_task_whose_data_cannot_be_reached(run, monkeypatch):
    def unreachable(*address: Any, **options: Any) -> None:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    status, out, err = run("--tasks", "hellaswag")
    assert (status, out) == (2, "")
    assert "task 'hellaswag' needs its data from the network, which cannot be reached" in err
    assert "or choose tasks on local text: books_bpb, wikitext2_local" in err
    assert len(err.splitlines()) == 1


def test_a_task_that_is_not_known():
    with pytest.raises(ConfigError, match="'hellaswgg' is not known to the harness; did you mean"):
        load_tasks(["hellaswgg"])


# --------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ([], ConfigError, "no task given; name some"),
        ([""], ConfigError, "task '' is not of the form NAME"),
        (["books_bpb="], ConfigError, "task 'books_bpb=' is not of the form NAME"),
        (["hellaswag=x"], ConfigError, "only tasks on local text take a PATH"),
        (["books_bpb", "books_bpb"], ConfigError, "task 'books_bpb' is given twice"),
        (["wikitext2_local"], DataError, "no path was given; say wikitext2_local=PATH"),
        (["books_bpb=/nowhere"], DataError, "/nowhere does not exist"),
    ],
)
def test_tasks_that_cannot_be(tasks, error, message):
    with pytest.raises(error, match=re.escape(message)):
        load_tasks(tasks)


def test_no_documents_at_all(folder):
    lm = AttambaLM(build(), TOKENIZER, context=32)
    tasks = load_tasks([f"wikitext2_local={folder}/wiki.txt"])
    with pytest.raises(ConfigError, match="limit=0 must be at least 1"):
        run_tasks(lm, tasks, limit=0)


def test_text_without_a_title(tmp_path):
    (tmp_path / "plain.txt").write_text("no title\n = Late = \n")
    with pytest.raises(DataError, match="does not begin with an article's title"):
        wikitext_articles(wikitext2_local=tmp_path / "plain.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "books_bpb", "--sweep", "chunk_size=1"], "--sweep does not go with --tasks"),
        (["--tasks", "books_bpb", "--data", "x"], "--data does not go with --tasks"),
        (["--tasks", "books_bpb", "--max-tokens", "9"], "--max-tokens does not go with --tasks"),
        (["--tasks", "books_bpb", "--text-key", "x"], "--text-key does not go with --tasks"),
        (["--tasks", "books_bpb", "--context", "all"], "--context=all does not go with --tasks"),
        (["--limit", "3"], "--limit=3 is for --tasks"),
    ],
)
def test_options_that_do_not_go_together(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_without_the_harness(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "attamba.harness")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = run("--tasks", "books_bpb")
    assert status == 2
    assert "lm_eval is not installed; it comes with: pip install 'attamba[eval]'" in err


# --------------------------------------------------------------------------------------------
# The harness's own command line
# --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_ins")
def test_the_harness_s_command_line(folder, tmp_path, monkeypatch, capsys):
    from attamba.harness.__main__ import main as lm_eval

    arguments = [
        "--model=attamba",
        f"--model_args=pretrained={folder},context=48",
        "--tasks=wikitext2_local,wikitext",
        f"--metadata=wikitext2_local={folder}/wiki.txt",
        "--batch_size=4",
        "--device=cpu",
        f"--output_path={tmp_path}/out.json",
    ]
    monkeypatch.setattr(sys, "argv", ["attamba-lm-eval", *arguments])
    lm_eval()
    assert "|wikitext2_local|" in capsys.readouterr().out
    (written,) = tmp_path.glob("out*.json")
    found = json.loads(written.read_text())["results"]
    assert found["wikitext"]["word_perplexity,none"] > 1
    for measure in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found["wikitext2_local"][f"{measure},none"] == found["wikitext"][f"{measure},none"]
    assert set(LOCAL_TASKS) == {"books_bpb", "wikitext2_local"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{folder},mixer.chunk_sise=2", "unknown key 'model.mixer.chunk_sise'; did you mean"),
        ("{folder} --batch_size=auto", "batch_size=auto must be a whole number of at least 1"),
    ],
)
def test_a_mistake_is_one_line_there_too(folder, monkeypatch, capsys, model, message):
    from attamba.harness.__main__ import main as lm_eval

    given, *more = model.format(folder=folder).split()
    arguments = ["--model=attamba", f"--model_args=pretrained={given}", "--tasks=books_bpb", *more]
    arguments += [f"--metadata=books_bpb={folder}/wiki.txt", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["attamba-lm-eval", *arguments])
    with pytest.raises(SystemExit) as left:
        lm_eval()
    assert left.value.code == 2
    assert f"attamba-lm-eval: error: {message}" in capsys.readouterr().err.replace(
        f"{folder}/none", "none"
    )


def test_the_entry_point_that_the_harness_reads():
    """As its releases after 0.4.13 do: the name in a registry, the class when it is asked for."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    ((name, value),) = tomllib.loads(text)["project"]["entry-points"]["lm_eval.models"].items()
    registry = Registry("model", base_cls=LM)
    registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert name == "attamba" and registry.get(name) is AttambaLM
    assert value == f"{AttambaLM.__module__}:{AttambaLM.__name__}"  # or it would clash with itself


def test_the_stock_command_knows_the_model_by_a_task_s_file(folder, tmp_path):
    (tmp_path / "book.txt").write_text(PLAIN[0])
    done = subprocess.run(
        [
            Path(sys.executable).parent / "lm_eval",
            "--model=attamba",
            f"--model_args=pretrained={folder}",
            f"--tasks={TASKS}/books_bpb.yaml",
            f"--metadata=books_bpb={tmp_path}/book.txt",
            "--device=cpu",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    bits = nats(PLAIN[:1], 32) / math.log(2) / len(PLAIN[0].encode())
    assert re.search(rf"bits_per_byte *\|↓ *\| *{bits:.4f}", done.stdout)
