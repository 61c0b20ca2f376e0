"""Data sets by name: local folders and builders stand in for the hub, on the same path of code."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from attamba.data import DataError, MissingPackageError, hub, load_tokenizer, prepare
from attamba.data import pieces as pieces_module
from attamba.data.tokenizer import ByteTokenizer

pytest.importorskip("datasets")
BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture
def folder(tmp_path):
    """Five files of ten records, as a data set of the hub has them."""
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for i in range(5):
        lines = [json.dumps({"id": n, "body": f"text {i} {n} " * 9}) for n in range(10)]
        name = folder / "data" / f"train-{i}.jsonl.gz"
        name.write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "data" / "test-0.jsonl").write_text('{"id": 0, "body": "held out"}\n')
    return folder


def texts(dataset):
    return [dataset.tokenizer.decode(document.tokens) for document in dataset.documents()]


EXPECTED = [f"text {i} {n} " * 9 for i in range(5) for n in range(10)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_data_set_by_name(folder, tmp_path, workers):
    name = f"hf:{folder}::train:body"
    dataset = prepare(name, tmp_path / "out", BYTES, workers=workers)
    assert texts(dataset) == EXPECTED
    assert dataset.manifest["sources"] == [f"hf:{folder}::train"]
    (about,) = dataset.manifest["data_sets"]
    assert about == {"dataset": str(folder), "split": "train", "text_key": "body"}
    assert len(dataset.manifest["shards"]) == 5  # a part for each file
    short = prepare(f"hf:{folder}::test", tmp_path / "test", BYTES, text_key="body")
    assert texts(short) == ["held out"]


def test_many_files_go_into_few_parts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "MOST_PARTS", 2)
    dataset = prepare(f"hf:{folder}::train:body", tmp_path / "out", BYTES)
    assert texts(dataset) == EXPECTED
    assert len(dataset.manifest["shards"]) == 2


@pytest.mark.parametrize("shard_tokens", [200, 10**6])
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_stream_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch, shard_tokens, stop):
    monkeypatch.setattr(hub, "MOST_PARTS", 2)
    monkeypatch.setattr(pieces_module, "BATCH", 500)
    name = f"hf:{folder}::train:body"
    options = {"shard_tokens": shard_tokens}
    whole = prepare(name, tmp_path / "whole", BYTES, **options)

    class Stopping(ByteTokenizer):
        calls = 0

        def encode_batch(self, texts):
            self.calls += 1
            if self.calls > stop:
                raise KeyboardInterrupt
            return super().encode_batch(texts)

    with pytest.raises(KeyboardInterrupt):
        prepare(name, tmp_path / "out", Stopping(), **options)
    again = prepare(name, tmp_path / "out", BYTES, **options)
    assert again.manifest == whole.manifest
    assert texts(again) == EXPECTED


def test_a_recipe_of_ones_own(folder, tmp_path):
    recipe = tmp_path / "mine.yaml"
    files = [str(folder / "data" / f"train-{i}.jsonl.gz") for i in (3, 1)]
    tree = {"dataset": "json", "data_files": files, "text_key": "body", "licence": "cc0-1.0"}
    recipe.write_text(json.dumps(tree))
    dataset = prepare(recipe, tmp_path / "out", BYTES)
    assert texts(dataset) == [*EXPECTED[30:40], *EXPECTED[10:20]]
    assert dataset.manifest["data_sets"][0]["licence"] == "cc0-1.0"


def test_files_and_data_sets_keep_their_order(folder, tmp_path):
    for name in ("a.txt", "z.txt"):
        (tmp_path / name).write_text(name)
    paths = [tmp_path / "z.txt", f"hf:{folder}::test:body", tmp_path / "a.txt"]
    dataset = prepare(paths, tmp_path / "out", BYTES)
    assert texts(dataset) == ["z.txt", "held out", "a.txt"]
    assert [d.source for d in dataset.documents()] == [
        str(paths[0]),
        f"hf:{folder}::test",
        str(paths[2]),
    ]


def test_recipes_that_come_along():
    assert hub.recipe_names() == ["dclm", "fineweb-edu", "slimpajama"]
    for name in hub.recipe_names():
        source = hub.parse(name, "text")
        assert source.url == f"https://huggingface.co/datasets/{source.dataset}"
        assert source.licence and source.split == "train" and source.text_key == "text"
    assert hub.parse("fineweb-edu", "text").config == "sample-10BT"


def test_a_folder_of_a_recipes_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dclm").mkdir()
    assert hub.parse("dclm", "text") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:", r"'hf:' names no data set; write hf:NAME\[:CONFIG"),
        ("hf:a:b:c:d:e", "names no data set"),
        ("fineweb", "fineweb is no file, folder or recipe; did you mean 'fineweb-edu'"),
        ("hf:nobody/nothing", "hf:nobody/nothing::train cannot be reached .*; check the name and"),
        ("hf:{folder}:other", "cannot be opened: BuilderConfig 'other' not found.*; check name"),
        ("hf:{folder}::valid:body", "cannot be opened: Bad split: valid"),
        ("hf:{folder}", r"has no field 'text' \(fields: id, body\); name it with --text-key"),
        ("none.yaml", "none.yaml does not exist"),
    ],
)
def test_data_sets_that_cannot_be_read(folder, tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        prepare(name.format(folder=folder), tmp_path / "out", BYTES)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("split: train", "dataset is not set"),
        ("dataset: json\ntext: body", "unknown key 'text'; did you mean 'text_key'"),
        ("[1]", "must hold keys and values"),
    ],
)
def test_recipes_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(DataError, match=rf"recipe .*r\.yaml: .*{message}"):
        prepare(tmp_path / "r.yaml", tmp_path / "out", BYTES)


def test_records_that_are_no_text(tmp_path):
    lines = [{"text": "a"}, {"text": None}, {"text": "nul\0"}, {"text": " "}, {"text": "b"}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"a record's text is NoneType, not text.* --skip-bad"):
        prepare(f"hf:{tmp_path}/set", tmp_path / "out", BYTES)
    dataset = prepare(f"hf:{tmp_path}/set", tmp_path / "out", BYTES, skip_bad=True)
    assert texts(dataset) == ["a", "b"]
    assert (dataset.manifest["n_bad"], dataset.manifest["n_empty"]) == (2, 1)


def test_a_stream_that_breaks_off(folder, tmp_path):
    name = folder / "data" / "train-3.jsonl.gz"
    whole = name.read_bytes()
    name.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"::train: reading failed \(.*the same command goes on"):
        prepare(f"hf:{folder}::train:body", tmp_path / "out", BYTES, shard_tokens=200)
    name.write_bytes(whole)
    dataset = prepare(f"hf:{folder}::train:body", tmp_path / "out", BYTES, shard_tokens=200)
    assert texts(dataset) == EXPECTED


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"datasets is not installed.*attamba\[hub\]"):
        prepare("fineweb-edu", tmp_path / "out", BYTES)
