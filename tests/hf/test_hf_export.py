"""Checkpoints to transformers' folders and back, and the command line around it."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys

import pytest
import torch
from hf_models import build
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import attamba
from attamba.cli import main
from attamba.config import ConfigError
from attamba.data import DataError, load_tokenizer, train_bpe
from attamba.display import format_bytes
from attamba.hf import AttambaForCausalLM
from attamba.hf.export import export, import_folder
from attamba.hf.tokenizer import save_for_transformers
from attamba.models.accounting import cache_bytes, n_parameters
from attamba.train import CheckpointError


def equal_tensors(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    draw = random.Random(0)
    words = ["the", "cat", "sees", "a", "dog", "under", "café", "你好", "🙂"]
    (folder / "text.txt").write_text(
        "\n".join(" ".join(draw.choice(words) for _ in range(20)) for _ in range(200))
    )
    train_bpe(folder / "text.txt", 300, folder / "tokenizer.json")
    return folder / "tokenizer.json"


# --------------------------------------------------------------------------------------------
# There and back
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_bit_equal_both_ways(make_run, tmp_path, tie, dtype, shard):
    checkpoint = make_run(dtype=dtype, tie=tie)
    assert attamba.load(checkpoint)[0].embed.weight.dtype == dtype
    out = export(checkpoint, tmp_path / "hf", max_shard_size=shard)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        theirs = loaded.get_parameter(f"model.decoder.{name}")
        assert theirs.dtype == dtype and torch.equal(theirs, tensor), name
    assert loaded.generation_config.eos_token_id == 0
    back = import_folder(out, tmp_path / "back")
    equal_tensors(back / "model.safetensors", checkpoint / "model.safetensors")
    for name in ("config.json", "tokenizer/tokenizer_meta.json"):
        assert (back / name).read_bytes() == (checkpoint / name).read_bytes(), name
    then, now = (json.loads((c / "state.json").read_text()) for c in (checkpoint, back))
    assert {**then, "rng": None} == {**now, "rng": None}
    again = export(back, tmp_path / "again", max_shard_size=shard)
    for path in out.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(out)).read_bytes(), path


def test_the_same_text(make_run, bpe, tmp_path):
    checkpoint = make_run(tokenizer=bpe)
    decoder, own = attamba.load(checkpoint)
    out = export(checkpoint, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    inputs = tokenizer(["the cat", "a dog sees the café"], return_tensors="pt", padding=True)
    got = model.generate(**inputs, max_new_tokens=20)
    prompts = [[own.eos_id, *own.encode(text)] for text in ("the cat", "a dog sees the café")]
    want = attamba.generate(decoder, prompts, max_new_tokens=20, eos_id=own.eos_id)
    for row, tokens in zip(got.tolist(), want):
        text = own.decode(tokens.tolist())
        assert tokenizer.decode(row, skip_special_tokens=True) == text


def test_a_folder_saved_by_transformers(make_run, bpe, tmp_path):
    out = export(make_run(tokenizer=bpe), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.decoder.norm.weight += 1
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(out).save_pretrained(tmp_path / "tuned")
    back, tokenizer = attamba.load(import_folder(tmp_path / "tuned", tmp_path / "back"))
    assert torch.equal(back.norm.weight, model.decoder.norm.weight)
    own = load_tokenizer(bpe)
    for text in ("the cat sees <|endoftext|>", "🙂 café"):
        assert tokenizer.encode(text) == own.encode(text)
    with pytest.raises(CheckpointError, match="tokenizer and weights do not match"):
        import_folder(out, tmp_path / "other", tokenizer="bytes")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("options", [{}, {"byte_fallback": True, "add_dummy_prefix": False}])
def test_sentencepiece(kind, options, bpe, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        input=str(bpe.parent / "text.txt"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=320,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    own = load_tokenizer(tmp_path / "sp.model")
    own.save(tmp_path)
    save_for_transformers(own, tmp_path, tmp_path)  # compares the ids of texts itself
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat  sees café", "unseen: ÿ </s>"):
        ids = own.encode(text)
        assert theirs(text)["input_ids"] == [own.eos_id, *ids]
        assert theirs.decode(ids) == own.decode(ids)


def test_a_tokenizer_that_cannot_be_copied(make_run, tmp_path, monkeypatch):
    checkpoint = make_run()
    monkeypatch.setattr("attamba.hf.tokenizer._visible", lambda byte: chr(0x3FF - byte))
    with pytest.raises(DataError, match="its copy for transformers"):
        export(checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --------------------------------------------------------------------------------------------
# The card
# --------------------------------------------------------------------------------------------


def test_model_card(make_run, tmp_path):
    checkpoint = make_run()
    metrics = [
        {"kind": "valid", "step": 4, "valid_loss": 9.0},
        {"kind": "valid", "step": 7, "valid_loss": 1.25, "valid_bits_per_byte": 1.8034},
        {"kind": "valid", "step": 9, "valid_loss": 9.0},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in metrics)
    (checkpoint.parent.parent / "metrics.jsonl").write_text(lines)
    score = {"perplexity": 3.25, "bits_per_byte": 1.7, "context": 64}
    record = {"data": ["far/away/wiki.txt"], "overrides": [], "result": score}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    out = export(checkpoint, tmp_path / "hf", evals=[tmp_path / "eval.json"])
    card = (out / "README.md").read_text()
    config = build(vocab_size=256)[0].config
    assert f"| parameters | {n_parameters(config):,} |" in card
    assert "P = 4 tokens per chunk, L = 5 leading tokens" in card
    assert "| trained on | books |" in card and "| steps, tokens | 7, 448 |" in card
    assert "| held out in training, at step 7 | 3.49 | 1.8034 |" in card
    assert "| wiki.txt (context 64) | 3.25 | 1.7000 |" in card
    held = cache_bytes(config, 1000, 4)
    full = 1000 * 2 * 2 * 32 * 4  # keys and values, layers, width, bytes
    row = re.search(r"\| 1,000 \| (.*) \| (.*) \| (.*) \|", card)
    assert row[1] == row[2] == format_bytes(held) and row[3] == format_bytes(full)
    assert "import attamba.hf" in card and "far/away" not in card


def test_scores_on_tasks(make_run, tmp_path):
    checkpoint = make_run()
    results = {
        "books_bpb": {"alias": "books_bpb", "bits_per_byte,none": 1.75,
                      "bits_per_byte_stderr,none": "N/A"},
        "piqa": {"alias": "piqa", "acc,none": 0.5125, "acc_stderr,none": 0.0375,
                 "exact_match,strict": 0.25, "broken,none": float("nan")},
    }  # fmt: skip
    record = {
        "checkpoint": str(checkpoint),
        "overrides": ["mixer.chunk_size=16"],
        "context": 48,
        "results": results,
        "n-shot": {"books_bpb": 0, "piqa": 5},
        "n-samples": {"books_bpb": {"original": 3, "effective": 3},
                      "piqa": {"original": 1838, "effective": 100}},
    }  # fmt: skip
    (tmp_path / "tasks.json").write_text(json.dumps(record))
    card = (
        export(checkpoint, tmp_path / "hf", evals=[tmp_path / "tasks.json"]) / "README.md"
    ).read_text()
    how = "context 48, mixer.chunk_size=16 |"
    sampled = "context 48, 5-shot, 100 of 1,838 documents, mixer.chunk_size=16 |"
    assert f"| books_bpb | bits_per_byte | 1.7500 | {how}" in card
    assert f"| piqa | acc | 0.5125 ± 0.0375 | {sampled}" in card
    assert f"| piqa | exact_match (strict) | 0.2500 | {sampled}" in card
    assert "broken" not in card and "None was measured" in card


def test_what_eval_writes_is_read(make_run, tmp_path, capsys):
    """Files of the commands themselves: on text, and on a task of the harness."""
    pytest.importorskip("lm_eval")
    checkpoint = make_run()
    (tmp_path / "text.txt").write_text("some text to score, and more of it")
    files = [str(tmp_path / name) for name in ("text.json", "tasks.json")]
    score = ["eval", str(checkpoint), "--device", "cpu", "--json"]
    assert main([*score, files[0], "--data", str(tmp_path / "text.txt")]) == 0
    assert main([*score, files[1], "--tasks", f"books_bpb={tmp_path}/text.txt"]) == 0
    capsys.readouterr()
    evals = ["--eval", files[0], "--eval", files[1]]
    assert main(["export", str(checkpoint), str(tmp_path / "hf"), *evals]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    bits = json.loads((tmp_path / "text.json").read_text())["result"]["bits_per_byte"]
    assert re.search(rf"\| text.txt \(context 64\) \| \S+ \| {bits:.4f} \|", card)
    assert f"| books_bpb | bits_per_byte | {bits:.4f} | context 64 |" in card


def test_the_card_says_what_part_was_scored(make_run, tmp_path):
    checkpoint = make_run()
    (tmp_path / "text.txt").write_text("some text to score, and more of it")
    file = str(tmp_path / "text.json")
    score = ["eval", str(checkpoint), "--device", "cpu", "--json", file, "--dtype", "bfloat16"]
    assert main([*score, "--data", str(tmp_path / "text.txt"), "--max-tokens", "9"]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "hf"), "--eval", file]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| text.txt (context 64, first 9 tokens, bfloat16) |" in card


def test_scores_of_another_model_are_refused(make_run, tmp_path):
    (tmp_path / "text.txt").write_text("some text to score, and more of it")
    file = str(tmp_path / "text.json")
    score = ["--device", "cpu", "--json", file, "--data", str(tmp_path / "text.txt")]
    assert main(["eval", str(make_run(name="other", tie=True)), *score]) == 0
    with pytest.raises(ConfigError, match=r"text\.json was measured on other weights \(.*other"):
        export(make_run(), tmp_path / "hf", evals=[file])


def test_ids_that_no_tokenizer_knows_are_not_generated(make_run, tmp_path):
    out = export(make_run(more=44), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.get_output_embeddings().weight[260:] += 9.0
    ids = model.generate(torch.tensor([[0, 7, 8]]), max_new_tokens=20, do_sample=False)
    assert ids.max() < 256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rows": []}', "holds no score"),
        ('{"result": {"perplexity": null}}', "holds no score"),
        ('{"results": {}}', "holds no score"),
        ('{"results": {"piqa": {"alias": "piqa"}}}', "holds no score"),
        ('{"results": 3}', "holds no score"),
        ("[]", "holds no score"),
        ("no json", "holds no score.*with --tasks or without, but not with --sweep"),
        (
            '{"checkpoint": "runs/a/checkpoints/step-00000006", "result": {"perplexity": 2.0}}',
            "was measured at step 6, but step 7 is exported",
        ),
    ],
)
def test_bad_eval_file(make_run, tmp_path, text, message):
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        export(make_run(), tmp_path / "hf", evals=[tmp_path / "eval.json"])
    assert not (tmp_path / "hf").exists()


def test_an_eval_file_that_is_not_there(make_run, tmp_path, capsys):
    arguments = [str(make_run()), str(tmp_path / "hf"), "--eval", str(tmp_path / "none.json")]
    assert main(["export", *arguments]) == 2
    assert "none.json: No such file" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------


def test_a_folder_in_use(make_run, tmp_path):
    checkpoint = make_run()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(checkpoint, tmp_path / "hf")
    (tmp_path / "hf" / "notes").unlink()
    export(checkpoint, tmp_path / "hf")


@pytest.mark.parametrize("size", ["banana", "0GB", "5", "-1GB", "1.5GB"])
def test_sizes_that_are_none(make_run, tmp_path, size):
    with pytest.raises(ConfigError, match=f"max_shard_size={size} is not a size"):
        export(make_run(), tmp_path / "hf", max_shard_size=size)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda out: (out / "config.json").unlink(), ConfigError, "holds no config.json"),
        (lambda out: (out / "config.json").write_text("{"), ConfigError, "is damaged"),
        (lambda out: (out / "model.safetensors").unlink(), CheckpointError, "is missing"),
        (lambda out: flip(out / "model.safetensors"), CheckpointError, "was altered after"),
        (lambda out: flip(out / "native" / "training.json", 0), CheckpointError, "is damaged"),
        (lambda out: LlamaConfig().save_pretrained(out), ConfigError, "architecture 'llama'"),
    ],
)
def test_bad_folders(make_run, tmp_path, spoil, error, message):
    out = export(make_run(), tmp_path / "hf")
    spoil(out)
    with pytest.raises(error, match=message):
        import_folder(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("command", [["export", "CKPT", "hf"], ["serve", "CKPT"]])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "is missing; restore it from a copy"),
        (lambda path: flip(path), "was altered after it was saved"),
    ],
)
def test_bad_checkpoints(make_run, tmp_path, capsys, monkeypatch, command, spoil, message):
    monkeypatch.chdir(tmp_path)
    checkpoint = make_run()
    spoil(checkpoint / "model.safetensors")
    before = set(tmp_path.rglob("*"))
    assert main([str(checkpoint) if word == "CKPT" else word for word in command]) == 2
    assert message in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before


def test_a_folder_of_transformers_is_no_checkpoint(make_run, tmp_path, capsys):
    out = export(make_run(), tmp_path / "hf")
    assert main(["eval", str(out), "--data", "x"]) == 2
    assert f"read it first: attamba import {out} RUN_FOLDER" in capsys.readouterr().err


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_weights_without_a_record(make_run, tmp_path):
    out = export(make_run(), tmp_path / "hf")
    shutil.rmtree(out / "native")
    (out / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"the weights of .* cannot be read"):
        import_folder(out, tmp_path / "back")
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the weights of .* cannot be read"):
        import_folder(out, tmp_path / "back")


def test_tokenizers_that_do_not_fit(make_run, bpe, tmp_path):
    _, model = build(vocab_size=256)
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        import_folder(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(CheckpointError, match=r"the tokenizer has 2\d\d entries"):
        import_folder(tmp_path / "hf", tmp_path / "back", tokenizer=bpe)
    import_folder(tmp_path / "hf", tmp_path / "back", tokenizer="bytes")


# --------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------


def test_commands(make_run, tmp_path, capsys):
    checkpoint = make_run()
    hf, back = tmp_path / "hf", tmp_path / "back"
    assert main(["export", str(tmp_path / "run"), str(hf)]) == 0
    assert main(["import", str(hf), str(back)]) == 0
    equal_tensors(
        back / "checkpoints" / checkpoint.name / "model.safetensors",
        checkpoint / "model.safetensors",
    )
    assert main(["export", str(tmp_path / "run"), str(hf)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["import", str(hf), str(tmp_path / "run")]) == 2
    assert "run holds a run already; name another folder" in capsys.readouterr().err
    assert isinstance(AutoModelForCausalLM.from_pretrained(hf), AttambaForCausalLM)


@pytest.mark.parametrize("command", [["export", "a", "b"], ["import", "a", "b"], ["serve", "a"]])
def test_commands_without_transformers(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(command) == 2
    assert "pip install 'attamba[hf]'" in capsys.readouterr().err
