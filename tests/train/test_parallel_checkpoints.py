"""Checkpoints of several ranks: resumed on other numbers of them, verified, made whole."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from meshes import assert_same_records
from ranks import on_ranks, train_until
from torch.distributed.checkpoint import HuggingFaceStorageReader

from attamba.cli import main
from attamba.config import RunConfig
from attamba.data import Batch, DataError
from attamba.train import CheckpointError, list_checkpoints, load, sharded, train
from attamba.train.checkpoint import MODEL, OPTIMIZER, read_tensors
from attamba.train.distributed import RankLost
from attamba.train.sources import RankRows


def on_mesh(config: RunConfig, replicate: int, shard: int) -> RunConfig:
    parallel = dataclasses.replace(config.parallel, replicate=replicate, shard=shard)
    return dataclasses.replace(config, parallel=parallel)


def test_a_run_goes_on_with_other_numbers_of_ranks(make_config):
    """4 ranks, 2, 1, 2 and 4, each from the checkpoint of those before."""
    change = {"model.tie_embeddings": True, "train.eval_every": 5, "train.save_every": 0}
    straight = train_until(make_config(change, out="straight"))
    config = make_config(change)
    on_ranks(4, train_until, on_mesh(config, 2, 2), 3)
    on_ranks(2, train_until, on_mesh(config, 1, 2), 2)
    assert train_until(config, 2) == []
    on_ranks(2, train_until, on_mesh(config, 2, 1), 2)
    records = on_ranks(4, train_until, on_mesh(config, 1, 4))
    assert [r["step"] for r in records[0] if r["kind"] == "train"] == list(range(1, 13))
    assert_same_records(records[0], straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, config_in):
    """The configuration of a run of two ranks that nobody stops, and what each rank returned."""
    config = config_in(tmp_path_factory.mktemp("straight"))
    return config, on_ranks(2, train_until, config)


def test_on_the_same_ranks_the_rest_is_the_same_to_the_bit(make_config, straight):
    of_straight, records = straight
    config = make_config({"train.keep": 2, "train.save_every": 2})
    on_ranks(2, train_until, config, 7)
    assert [c.name for c in list_checkpoints(config.out)] == ["step-00000006", "step-00000007"]
    assert on_ranks(2, train_until, config) == records
    names = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000012"]
    a, b = (load(out)[0] for out in (config.out, of_straight.out))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, config_in):
    """The configuration of a run of two ranks with two checkpoints in its folder."""
    change = {"train.steps": 4, "train.save_every": 2}
    config = config_in(tmp_path_factory.mktemp("of-two"), change)
    on_ranks(2, train_until, config)
    return config


def test_a_checkpoint_of_ranks_can_be_loaded_and_made_whole(of_two, tmp_path, capsys):
    (newest,) = list_checkpoints(of_two.out)[-1:]
    assert len(list((newest / "shards").iterdir())) == 2
    assert not (newest / MODEL).exists()
    assert main(["consolidate", of_two.out, str(tmp_path / "whole")]) == 0
    (whole,) = list_checkpoints(tmp_path / "whole")
    assert str(whole) in capsys.readouterr().out
    assert sorted(p.name for p in whole.iterdir() if p.suffix == ".safetensors") == [
        MODEL,
        OPTIMIZER,
    ]
    for file in (MODEL, OPTIMIZER):
        a, b = read_tensors(newest, file), read_tensors(whole, file)
        assert a.keys() == b.keys() and len(a) > 10
        assert all(torch.equal(a[name], b[name]) for name in a)
    ids = torch.arange(20)[None]
    logits = [load(folder)[0](ids) for folder in (newest, whole)]
    assert torch.equal(*logits)
    assert train(dataclasses.replace(of_two, out=str(tmp_path / "whole"))).step == 4
    assert main(["consolidate", of_two.out, str(tmp_path / "whole")]) == 2
    assert "whole holds a run already; name another folder" in capsys.readouterr().err


def test_a_checkpoint_of_ranks_is_exported(of_two, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main(["export", of_two.out, str(tmp_path / "hf")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    (newest,) = list_checkpoints(of_two.out)[-1:]
    for name, tensor in read_tensors(newest, MODEL).items():
        assert torch.equal(model.get_parameter(f"model.decoder.{name}"), tensor), name


def refused(config: RunConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        train(config)
    return str(caught.value)


def flip(path: Path) -> None:
    """Change one bit of the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage(checkpoint: Path, how: Callable[[Path], None]) -> None:
    """Of the second rank's file."""
    how(sorted((checkpoint / "shards").iterdir())[-1])


@pytest.mark.parametrize(("how", "text"), [(flip, "was altered"), (truncate, "is truncated: ")])
def test_of_a_damaged_checkpoint_the_one_before_is_used(make_config, straight, how, text):
    config = make_config()
    on_ranks(2, train_until, config, 9)
    older, newest = list_checkpoints(config.out)
    assert older.name == "step-00000008"
    damage(newest, how)
    with pytest.raises(CheckpointError, match=rf"shard-00002.* {text}"):
        load(newest)
    assert on_ranks(2, train_until, config) == straight[1]
    names = [path.name for path in newest.parent.iterdir()]
    assert "damaged-step-00000009" in names and newest.name not in names
    for checkpoint in list_checkpoints(config.out):
        damage(checkpoint, how)
    for said in on_ranks(2, refused, config):
        assert "step-00000012/shards/shard-00002" in said and text in said


def full_disk(config: RunConfig) -> str:
    """Of the second checkpoint what rank 1 wrote cannot be read again."""
    from attamba.train.sharded import entry

    def fail(path: Path, *rest: Callable[[], None]) -> dict:
        if path.name.startswith("shard-00002") and list_checkpoints(config.out):
            raise OSError(errno.ENOSPC, "No space left on device")
        return entry(path, *rest)

    sharded.entry = fail
    return refused(config)


def full_disk_of_the_system(config: RunConfig) -> str:
    """Rank 1 can write no second checkpoint, by a limit that the kernel enforces."""
    save = sharded.Saver.save

    def fill(self: sharded.Saver, step: int, *rest) -> None:
        if os.environ["RANK"] == "1" and step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, -1))
        save(self, step, *rest)

    sharded.Saver.save = fill
    return refused(config)


@pytest.mark.parametrize(
    ("fails", "reason"),
    [(full_disk, "No space left"), (full_disk_of_the_system, "File too large")],
)
def test_a_full_disk_on_one_rank_is_told_on_all_and_leaves_what_was(
    make_config, straight, fails, reason
):
    config = make_config()
    for text in on_ranks(2, fails, config):
        assert "cannot save" in text and "step-00000008" in text and reason in text
        assert "step-00000004 is whole, and the same command goes on from it" in text
    names = [path.name for path in (Path(config.out) / "checkpoints").iterdir()]
    assert names == ["step-00000004"]
    assert on_ranks(2, train_until, config) == straight[1]


def unreadable(config: RunConfig) -> str:
    """Rank 1 cannot read its part of the checkpoint."""

    def fail(self: HuggingFaceStorageReader, *args) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if os.environ["RANK"] == "1":
        HuggingFaceStorageReader.read_data = fail
    return refused(config)


def test_a_checkpoint_that_one_rank_cannot_read_is_told_on_all(make_config):
    config = make_config()
    on_ranks(2, train_until, config, 5)
    for text in on_ranks(2, unreadable, config):
        assert "cannot read" in text and "Input/output error" in text
        assert "the same command goes on" in text
    assert list_checkpoints(config.out)[-1].name == "step-00000005"


def rows_gone(config: RunConfig) -> str:
    """Rank 1 cannot read its rows of step 6."""
    batch = RankRows.batch

    def gone(self: RankRows, step: int) -> Batch:
        if self.rank == 1 and step == 5:
            raise DataError("the shard is gone")
        return batch(self, step)

    RankRows.batch = gone  # type: ignore[method-assign]
    with pytest.raises((DataError, RankLost)) as caught:
        train(config)
    return str(caught.value)


def test_what_came_before_rows_that_one_rank_cannot_read_is_saved(make_config, straight):
    config = make_config()
    other, own = on_ranks(2, rows_gone, config)
    assert own == "the shard is gone" and "another rank is gone" in other
    assert list_checkpoints(config.out)[-1].name == "step-00000005"
    assert on_ranks(2, train_until, config) == straight[1]


def slow_writing(config: RunConfig) -> list[list[int]]:
    """Checkpoints that there are when a step is logged, while the first one's writing is slow."""
    may_end, there = threading.Event(), []
    seal: Callable = sharded.seal

    def slow(*args, **kwargs):
        assert may_end.wait(30)
        return seal(*args, **kwargs)

    def on_log(record: dict) -> None:
        if record["kind"] == "train":
            there.append([int(c.name[-2:]) for c in list_checkpoints(config.out)])
            if record["step"] == 7:
                may_end.set()

    sharded.seal = slow
    train(config, on_log=on_log)
    return there


def test_training_goes_on_while_a_checkpoint_is_written(make_config):
    there, nothing = on_ranks(2, slow_writing, make_config())
    assert nothing == []
    # From step 4 on: not there at 7, when it may end; there at 9, which comes after the next one.
    assert there[3:7] == [[]] * 4
    assert there[8][0] == 4
