"""Commands from their arguments to what they print, on a model trained for four steps."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attamba.commands
from attamba import cli
from attamba.cli import main
from attamba.data import TokenDataset, load_tokenizer
from attamba.models.accounting import cache_bytes
from attamba.train import load

SMALL = [
    "model.dim=32",
    "model.n_layers=2",
    "mixer.n_heads=4",
    "mixer.chunk_size=4",
    "mixer.leading_tokens=8",
    "data.seq_len=32",
    "data.batch_size=2",
    "data.valid_fraction=0.2",
    "train.steps=4",
    "train.eval_rows=2",
    "train.progress=false",
    "train.device=cpu",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with text, a run over it, and nothing else."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "texts").mkdir()
    for i in range(4):
        words = " ".join(f"word{i}{j} and others" for j in range(60))
        (folder / "texts" / f"{i}.txt").write_text(words)
    assert main(["train", *SMALL, f"data.train={folder}/texts", f"out={folder}/run"]) == 0
    return folder


@pytest.fixture
def run(folder, capsys):
    """Run a command over the trained model; (status, standard output, standard error)."""

    def run(command: str, *arguments: object) -> tuple[int, str, str]:
        status = main([command, str(folder / "run"), "--device", "cpu", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def _fails(capsys, *arguments: object) -> str:
    """The one line that a command which the user got wrong leaves."""
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("attamba: error: ")
    return line.removeprefix("attamba: error: ")


# --------------------------------------------------------------------------------------------
# The parser
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["bench", "decode", "-h"]])
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import sys\n"
        "from attamba.cli import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'yaml', 'rich', 'tokenizers', 'matplotlib'}\n"
        "    assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: attamba")


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("demo", "train", "eval", "generate", "bench", "data"):
        assert re.search(rf"^ +{command} ", out, re.MULTILINE), command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["evaluate"], "invalid choice: 'evaluate'"),
        (["eval"], "the following arguments are required: CKPT"),
        (["eval", "x", "--colour"], "unrecognized arguments: --colour"),
        (["eval", "x", "--dat", "y"], "unrecognized arguments: --dat y"),
        (["generate", "x", "--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["data", "tokenizer", "out", "text"], "--vocab-size"),
        (["bench"], "the following arguments are required: WHAT"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["c", "a.b=1", "d=x y", "--data", "f", "g", "--json", "out"],
        ["c", "--data", "f", "g", "a.b=1", "d=x y", "--json", "out"],
        ["c", "--data", "f", "g", "--json", "out", "a.b=1", "d=x y"],
        ["c", "a.b=1", "--data", "f", "g", "--json", "out", "d=x y"],
    ],
)
def test_keys_may_stand_anywhere(arguments):
    args = cli.parse(["eval", *arguments])
    assert (args.checkpoint, args.json, args.data) == ("c", "out", ["f", "g"])
    assert args.overrides == ["a.b=1", "d=x y"]


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["demo"], "attamba.demo.run"),
        (["bench", "decode"], "attamba.bench.decode"),
        (["bench", "train"], "attamba.bench.train"),
    ],
)
def test_other_modules_bring_their_own_commands(arguments, module, monkeypatch):
    monkeypatch.setattr(f"{module}.run", lambda args: 7)
    assert main(arguments) == 7


# --------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------


def test_errors_are_one_line(folder, capsys, tmp_path):
    run = folder / "run"
    (tmp_path / "file").touch()
    for arguments, message in [
        (["train", tmp_path / "no.yaml"], f"{tmp_path}/no.yaml: No such file or directory"),
        (["train", "a.yaml", "b.yaml"], "a.yaml and b.yaml: give one CONFIG file at most"),
        (["train", "optim.lrr=1"], "unknown key 'optim.lrr'; did you mean 'lr'?"),
        (["train", f"out={tmp_path}/x"], "data.train is not set"),
        (["eval", tmp_path / "no"], "is not a folder; give a run folder or a checkpoint folder"),
        (["eval", tmp_path], "holds no checkpoint"),
        (["eval", run, "mixer.chunk_size=0"], "mixer.chunk_size=0 must be at least 1"),
        (["eval", run, "mixer.chunk"], "'mixer.chunk' is not of the form key=value"),
        (["eval", run, "mixer.state_dim=4"], "changes the model's parameters"),
        (["eval", run, "--data", tmp_path / "no.txt"], "no.txt"),
        (["eval", run, "--context", "-3"], "--context=-3 must be a number of tokens, or all"),
        (["eval", run, "--stride", "99"], "stride=99 must be from 1 to context=32"),
        (["eval", run, "--sweep", "chunk_size"], "is not of the form FIELD=A,B,..."),
        (["eval", run, "--sweep", "chunk_size=2,0"], "chunk_size=0 must be at least 1"),
        (["eval", run, "--json", tmp_path], " is a folder; name a file"),
        (["export", run, "."], ". is the current folder; name one in it"),
        (["eval", run, "--device", "gpu"], "is not a device"),
        (["generate", run, "--prompt", "a", "--top-p", "2"], "top_p=2.0 must be above 0"),
        (["generate", run, "--prompt-file", tmp_path / "no"], "No such file or directory"),
        (["generate", run, "--prompt", "a\udcff"], "--prompt is not UTF-8 text"),
        (
            ["eval", run, "--json", tmp_path / "file" / "a.json"],
            "a.json: File exists; name another",
        ),
        (
            ["train", "data.train=no.txt", f"out={tmp_path}/y", "train.progress=false"],
            "data.train: no.txt does not exist",
        ),
        (["data", "prepare", tmp_path / "out", tmp_path / "no.txt"], "no.txt"),
    ]:
        assert message in _fails(capsys, *arguments), arguments


def test_debug_shows_where(capsys, tmp_path):
    assert main(["train", str(tmp_path / "no.yaml"), "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "attamba: error: " in err


def test_a_missing_package_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "pip install 'attamba[train]'" in _fails(capsys, "train", "optim.lr=1")


def test_bugs_are_not_hidden(monkeypatch):
    def bug(args: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(attamba.commands, "train", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


@pytest.mark.parametrize("text", ["", "Stopped after step 3 and saved"])
def test_ctrl_c(monkeypatch, capsys, text):
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt(*[text] if text else [])

    monkeypatch.setattr(attamba.commands, "train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == f"\nattamba: {text or 'interrupted'}\n"


def test_a_reader_that_goes_away(folder):
    arguments = ["generate", str(folder / "run"), "--prompt", "a", "--device", "cpu"]
    code = f"import sys; from attamba.cli import main; sys.exit(main({arguments}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (141, "")


# --------------------------------------------------------------------------------------------
# train
# --------------------------------------------------------------------------------------------


def test_train_with_a_file_and_keys(folder, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"out: {tmp_path}/run\ndata: {{train: {folder}/texts}}\n")
    assert main(["train", str(path), "--no-resume", *SMALL, "train.steps=1"]) == 0
    assert f"{tmp_path}/run: 1 steps are done" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    message = _fails(capsys, "train", path, "--no-resume", *SMALL, "train.steps=1")
    assert "already holds a run and resume is off" in message
    assert main(["train", str(path), *SMALL, "train.steps=1"]) == 0


# --------------------------------------------------------------------------------------------
# eval
# --------------------------------------------------------------------------------------------


def test_eval_scores_what_the_run_held_out(run, folder, tmp_path):
    status, out, _ = run("eval", "--json", tmp_path / "new" / "out.json")
    assert status == 0
    record = json.loads((tmp_path / "new" / "out.json").read_text())
    result = record["result"]
    dataset = TokenDataset.open(folder / "run" / "data" / "train")
    held_out = dataset.n_tokens - int(0.8 * dataset.n_tokens)
    assert result["n_tokens"] == result["n_bytes"] == held_out  # the rest of the last document
    assert (result["context"], result["stride"]) == (32, 16)
    assert record["data"] == "held out by the run"
    for line in (
        f"{held_out:,} bytes; context 32, stride 16",
        f"bits per byte            {result['bits_per_byte']:.4f}",
    ):
        assert line in out
    assert re.search(r"^0 to 15 +16  +\d\.\d{4}$", out, re.MULTILINE)


def test_eval_of_a_checkpoint_folder_and_given_text(folder, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("one two\n---\nthree")
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
    arguments = ["eval", checkpoint, "--data", tmp_path / "a.txt", "mixer.chunk_size=2"]
    arguments += ["--split-on", "^---$", "--context", "all", "--json", tmp_path / "out.json"]
    assert main([str(a) for a in arguments]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["overrides"] == ["mixer.chunk_size=2"]
    assert record["data"] == [str(tmp_path / "a.txt")]
    assert (record["result"]["n_documents"], record["result"]["context"]) == (2, None)
    assert "whole documents as one context" in capsys.readouterr().out


def test_eval_of_prepared_text(run, folder, tmp_path, capsys):
    for tokenizer, out in (("bytes", "same"), (tmp_path / "bpe", "other")):
        if out == "other":
            arguments = ["data", "tokenizer", tokenizer, folder / "texts", "--vocab-size", 300]
            assert main([str(a) for a in arguments]) == 0
        arguments = ["data", "prepare", tmp_path / out, folder / "texts", "--tokenizer", tokenizer]
        assert main([str(a) for a in arguments]) == 0
    capsys.readouterr()
    status, out, _ = run("eval", "--data", tmp_path / "same", "--max-tokens", 50)
    assert status == 0 and "1 documents, 50 tokens" in out
    for arguments, message in (
        (["--data", tmp_path / "other"], "was prepared with another tokenizer than the checkpoint"),
        (["--data", tmp_path / "same", folder / "texts"], "same is a prepared folder, which must"),
        (["--data", tmp_path / "same", "--split-on", "x"], "--split-on=x splits text, and these"),
        (["--split-on", "x"], "--split-on=x splits text, and these"),
    ):
        assert message in _fails(capsys, "eval", folder / "run", *arguments)


def test_eval_where_nothing_was_held_out(folder, tmp_path, capsys):
    arguments = [*SMALL, f"data.train={folder}/texts", f"out={tmp_path}/run", "train.steps=1"]
    assert main(["train", *arguments, "data.valid_fraction=0"]) == 0
    capsys.readouterr()
    assert "held out no text (data.valid_fraction=0); give --data PATH" in _fails(
        capsys, "eval", tmp_path / "run"
    )


def test_eval_with_validation_files(folder, tmp_path, capsys):
    (tmp_path / "valid.txt").write_text("a few words more, " * 4)
    arguments = [*SMALL, f"data.train={folder}/texts", f"out={tmp_path}/run", "train.steps=1"]
    assert main(["train", *arguments, f"data.valid={tmp_path}/valid.txt"]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "1 documents, 72 tokens, 16 words" in capsys.readouterr().out


def test_sweep(run, folder, tmp_path):
    status, out, _ = run("eval", "--sweep", "chunk_size=1,4,16", "--json", tmp_path / "out.json")
    assert status == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["field"], record["context"]) == ("mixer.chunk_size", 32)
    assert [row["value"] for row in record["rows"]] == [1, 4, 16]
    for line, row in zip(out.splitlines()[1:], record["rows"], strict=True):
        model, _ = load(folder / "run", overrides={"mixer.chunk_size": row["value"]})
        assert row["cache_bytes"] == cache_bytes(model.config, 32)
        cells = line.split()
        assert cells[:3] == [
            str(row["value"]),
            f"{row['perplexity']:.4f}",
            f"{row['bits_per_byte']:.4f}",
        ]
        assert cells[-2:] == ["32", "tokens"]


def test_sweep_over_names_and_null(run):
    assert run("eval", "--sweep", "leading_tokens=0,null")[0] == 0
    _, out, _ = run("eval", "--sweep", "mixer.boundary=cyclic,uniform", "--max-tokens", 40)
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["cyclic", "uniform"]


# --------------------------------------------------------------------------------------------
# generate
# --------------------------------------------------------------------------------------------


def test_generate_streams_one_prompt(run, folder):
    options = ["--prompt", "word", "--max-new-tokens", 12, "--temperature", 0]
    status, out, err = run("generate", *options)
    assert status == 0
    model, tokenizer = load(folder / "run")
    ids = [tokenizer.eos_id, *tokenizer.encode("word")]
    (row,) = attamba.generate(model, [ids], max_new_tokens=12, tokenizer=tokenizer)
    assert out == tokenizer.decode(row.tolist()) + "\n"
    number = r"\d[\d,]*(\.\d+)?"
    size = rf"{number} (B|KiB|MiB)"
    pattern = rf"{len(row) - 5} tokens, {number} tokens/s after {number} s for a prompt of 5; "
    assert re.fullmatch(pattern + rf"cache {size} used, {size} allocated\n", err)


def test_generate_prints_several_prompts_in_blocks(run):
    options = ["--max-new-tokens", 8, "--seed", 5, "--top-k", 20, "--top-p", 0.9]
    _, out, _ = run("generate", "--prompt", "word", "--prompt", "", *options)
    blocks = re.fullmatch(r"--- 1 of 2 ---\n(word.*)\n--- 2 of 2 ---\n(.*)\n", out, re.DOTALL)
    assert blocks is not None
    # The first row is what it would be alone.
    assert run("generate", "--prompt", "word", *options)[1] == blocks[1] + "\n"
    assert run("generate", "--prompt", "word", *options[:2], "--seed", 6)[1] != blocks[1] + "\n"


def test_generate_stops(run):
    options = ["--prompt", "word", "--max-new-tokens", 12, "--temperature", 0]
    whole = run("generate", *options)[1].removesuffix("\n")
    character = whole[8]
    cut = whole[: whole.index(character, 4)]
    assert run("generate", *options, "--stop", character)[1] == cut + "\n"


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_generate_reads_a_prompt(run, tmp_path, monkeypatch, source):
    data = "größer\n".encode()
    (tmp_path / "prompt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    options = ["--prompt-file", tmp_path / "prompt"] if source == "file" else []
    status, out, _ = run("generate", "--max-new-tokens", 0, *options)
    assert (status, out) == (0, "größer\n")


def test_generate_refuses_a_prompt_that_is_no_text(folder, tmp_path, capsys):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    message = _fails(capsys, "generate", folder / "run", "--prompt-file", tmp_path / "prompt")
    assert "prompt is not UTF-8 text" in message


def test_generate_without_a_prompt_on_a_terminal(folder, capsys, monkeypatch):
    parent, child = os.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(child))
    assert "there is no prompt: give --prompt TEXT" in _fails(capsys, "generate", folder / "run")
    sys.stdin.close()
    os.close(parent)


# --------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------


def test_data_prepare_and_tokenizer(folder, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"body": "one two three"}\n{"body": "four five"}\n')
    options = ["--text-key", "body"]
    bpe = [str(tmp_path / "bpe"), str(tmp_path / "a.jsonl"), "--vocab-size", "260", *options]
    assert main(["data", "tokenizer", *bpe]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/bpe: a BPE of 260 tokens\n"
    assert load_tokenizer(tmp_path / "bpe").vocab_size == 260
    assert main(["data", "tokenizer", *bpe]) == 2
    assert "bpe exists and is not empty; name another folder" in capsys.readouterr().err
    arguments = [str(tmp_path / "out"), str(tmp_path / "a.jsonl"), *options]
    arguments += ["--tokenizer", str(tmp_path / "bpe"), "--shard-tokens", "1"]
    assert main(["data", "prepare", *arguments]) == 0
    dataset = TokenDataset.open(tmp_path / "out")
    assert (dataset.n_documents, len(dataset.manifest["shards"])) == (2, 2)
    line = f"2 documents, {dataset.n_tokens} tokens, 22 bytes, vocabulary 260"
    assert capsys.readouterr().out == f"{tmp_path}/out: {line}\n"


def test_a_vocabulary_that_the_text_does_not_fill_is_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("ab ab")
    assert main(["data", "tokenizer", *map(str, (tmp_path / "t", tmp_path / "a.txt")),
                 "--vocab-size", "9000"]) == 0  # fmt: skip
    assert "tokens, fewer than --vocab-size=9,000: the text yields no more" in (
        capsys.readouterr().out
    )


def test_data_prepare_splits(tmp_path):
    (tmp_path / "a.txt").write_text("= A =\none\n= B =\ntwo\n")
    arguments = [str(tmp_path / "out"), str(tmp_path / "a.txt"), "--split-on", "^= "]
    assert main(["data", "prepare", *arguments]) == 0
    assert TokenDataset.open(tmp_path / "out").n_documents == 2
