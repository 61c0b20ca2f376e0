"""What runs are trained on: weighted sources, packing, URLs, checksums."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from attamba.cli import main
from attamba.config import ConfigError, RunConfig, from_dict
from attamba.data import DataError, load_tokenizer, pieces, prepare, train_bpe
from attamba.data.tokenizer import ByteTokenizer
from attamba.train import list_checkpoints, read_metrics, sources, train
from attamba.train.sources import open_sources
from attamba.train.storage import step_of


@pytest.fixture
def two(texts, tmp_path):
    """Prepared folders of one text each."""
    folders = [tmp_path / f"prepared-{i}" for i in (0, 1)]
    for i, folder in enumerate(folders):
        prepare(texts / f"{i}.txt", folder, load_tokenizer("bytes"))
    return [str(folder) for folder in folders]


def mixed(two, weights=(3, 1)):
    sources = [{"path": path, "weight": weight} for path, weight in zip(two, weights)]
    return {"data.train": "", "data.sources": sources, "train.steps": 6}


def losses(result):
    return [record["loss"] for record in result.metrics if record["kind"] == "train"]


def test_sources_are_mixed_and_gone_on_with(make_config, two, crash_at, tmp_path):
    whole = train(make_config(mixed(two), out="whole"))
    assert whole.metrics[-1]["valid_bits_per_byte"] > 0
    config = make_config(mixed(two), out="crashed")
    with pytest.raises(crash_at.error):
        train(config, on_log=crash_at(5))
    assert losses(train(config)) == losses(whole)
    other = train(make_config(mixed(two, weights=(1, 3)), out="other"))
    assert losses(other) != losses(whole)
    # A source that moved is the same; another weight is not.
    moved = tmp_path / "moved"
    (tmp_path / "prepared-1").rename(moved)
    assert train(make_config(mixed([two[0], str(moved)]), out="whole")).step == 6
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.weight: 1\.0 there, 2\.0 here"):
        train(make_config(mixed([two[0], str(moved)], weights=(3, 2)), out="whole"))


def test_ranks_share_the_rows_of_the_mixture(make_config, two, tmp_path):
    config = make_config(mixed(two))

    def batch(share):
        sources = open_sources(config, tmp_path, fresh=True, say=lambda text: None, share=share)
        return sources.train.batch(5).inputs

    alone = batch((0, 1))
    for n in (2, 4):
        parts = [batch((rank, n)) for rank in range(n)]
        assert np.array_equal(np.concatenate(parts), alone)


def test_texts_are_prepared_for_each_source(make_config, texts, capsys):
    change = mixed([str(texts / "0.txt"), [str(texts / "1.txt")]]) | {"train.steps": 2}
    result = train(make_config(change))
    folders = sorted(path.name for path in (result.run_dir / "data").iterdir())
    assert folders == ["source-0", "source-1"]
    assert main(["eval", str(result.run_dir), "--max-tokens", "200"]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_sources_of_several_tokenizers_are_refused(make_config, two, texts, tmp_path):
    prepare(texts, tmp_path / "bpe-data", train_bpe(texts, 300, tmp_path / "bpe"))
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.path: .* with another tokenizer"):
        train(make_config(mixed([two[0], str(tmp_path / "bpe-data")])))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "a", "sources": [{"path": "b"}]}, r"data\.train=a and data\.sources both say"),
        ({"sources": [{"weight": 2}]}, r"data\.sources\.0\.path is not set"),
        ({"sources": [{"path": "b", "weight": 0}]}, r"data\.sources\.0\.weight=0\.0 must be above"),
        (
            {"sources": [{"paht": "b"}]},
            r"unknown key 'data\.sources\.0\.paht'; did you mean",
        ),
        ({"sources": "b"}, r"data\.sources='b' must be a list, .* each a dictionary"),
        ({"packing": "best"}, r"data\.packing='best' must be one of: stream, best_fit"),
        (
            {"generate": {"type": "passkey"}, "packing": "best_fit"},
            r"makes its own rows, so data\.packing and data\.verify would have no effect",
        ),
        (
            {"generate": {"type": "passkey"}, "sources": [{"path": "b"}]},
            r"makes its own rows, so data\.train, data\.valid and data\.sources would have no",
        ),
    ],
)
def test_configurations_of_data_that_cannot_be_used(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, {"data": data}).validate()


def test_rows_of_whole_documents(make_config, texts, tmp_path):
    words = (texts / "0.txt").read_text().split()
    lines = [json.dumps({"text": " ".join(words[i : i + 7])}) for i in range(0, len(words), 7)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    prepare(tmp_path / "short.jsonl", tmp_path / "short", load_tokenizer("bytes"))
    change = {"data.train": str(tmp_path / "short"), "train.steps": 5}
    stream = train(make_config(change, out="stream"))
    change |= {"data.packing": "best_fit"}
    packed = train(make_config(change, out="packed"))
    assert losses(packed) != losses(stream)
    assert packed.metrics[-1]["valid_loss"] < 5.6
    again = train(make_config(change | {"train.accumulate": 2}, out="again"))
    assert losses(again) == pytest.approx(losses(packed), rel=1e-5)
    unmasked = train(make_config(change | {"data.doc_mask": False}, out="unmasked"))
    assert losses(unmasked) != losses(packed)


def test_a_prepared_folder_at_a_url(make_config, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAMBA_CACHE", str(tmp_path / "cache"))
    here = train(make_config({"train.steps": 2}, out="here"))
    there = train(make_config({"train.steps": 2, "data.train": f"file://{prepared}"}, out="there"))
    assert losses(there) == losses(here)
    assert any((tmp_path / "cache").iterdir())


def test_text_that_was_half_prepared_is_gone_on_with(make_config, texts, monkeypatch):
    config = make_config({"data.train": str(texts), "train.steps": 1})
    encode = ByteTokenizer.encode_batch
    given = []

    def encode_one_batch(self, batch):
        if given:
            raise KeyboardInterrupt
        given.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(pieces, "BATCH", 1000)
    monkeypatch.setattr(sources, "prepare", partial(prepare, shard_tokens=1))
    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode_batch", encode_one_batch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    (partial_folder,) = Path(config.out, "data").glob(".train.*.partial")
    first = (partial_folder / "tokens-00000-000.bin").stat().st_mtime_ns
    train(config)
    kept = Path(config.out, "data", "train", "tokens-00000-000.bin")
    assert given == [1] and kept.stat().st_mtime_ns == first


def test_checksums_are_compared_if_asked_for(make_config, texts, tmp_path):
    prepare(texts, tmp_path / "data", load_tokenizer("bytes"))
    path = tmp_path / "data" / "tokens-00000-000.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"x\0")
    change = {"data.train": str(tmp_path / "data"), "train.steps": 1}
    train(make_config(change, out="unasked"))
    with pytest.raises(DataError, match=r"tokens-00000-000\.bin was altered after it was written"):
        train(make_config(change | {"data.verify": True}, out="asked"))


def test_a_truncated_shard_is_refused(make_config, texts, tmp_path):
    prepare(texts, tmp_path / "data", load_tokenizer("bytes"))
    path = tmp_path / "data" / "tokens-00000-000.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"tokens-00000-000\.bin has \d+ bytes, .* says \d+ bytes"):
        train(make_config({"data.train": str(tmp_path / "data")}))


def test_a_shard_that_is_cut_while_a_run_stops_is_refused_on_resume(make_config, texts, tmp_path):
    prepare(texts, tmp_path / "data", load_tokenizer("bytes"))
    config = make_config({"data.train": str(tmp_path / "data"), "train.steps": 4})
    result = train(config)
    path = tmp_path / "data" / "tokens-00000-000.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(DataError, match="prepare the data anew"):
        train(config)
    path.write_bytes(data)
    assert len(read_metrics(result.run_dir / "metrics.jsonl")) == len(train(config).metrics)


def test_a_shard_that_is_cut_while_training_is_named_and_what_came_before_is_saved(
    make_config, documents, tmp_path, monkeypatch
):
    monkeypatch.setattr(pieces, "BATCH", 1)  # a shard per document
    data, whole = tmp_path / "data", {}
    prepare(
        Path(documents[0]).parent / "texts.jsonl", data, load_tokenizer("bytes"), shard_tokens=1
    )
    change = {"data.train": str(data), "data.seq_len": 8, "data.batch_size": 1}
    change |= {"train.save_every": 0, "train.eval_every": 0, "train.steps": 40}
    config = make_config(change)

    def cut(record):
        if record["step"] != 3:
            return
        for path in data.glob("tokens-*.bin"):
            whole[path] = path.read_bytes()
            path.unlink()  # what is mapped already stays as it was
            path.write_bytes(whole[path][:-2])

    with pytest.raises(DataError, match=r"tokens-\d+-\d+\.bin has \d+ bytes, .* says \d+ bytes"):
        train(config, on_log=cut)
    assert len(whole) == 120
    (saved,) = list_checkpoints(config.out)
    assert 3 <= step_of(saved) < 40
    for path, content in whole.items():
        path.write_bytes(content)
    assert [r["step"] for r in train(config).metrics if r["kind"] == "train"] == [*range(1, 41)]
