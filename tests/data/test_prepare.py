"""prepare: the bytes do not depend on the number of workers, nor on when it was stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preparing import content

from attamba.data import (
    DataError,
    TokenDataset,
    is_prepared,
    load_tokenizer,
    parts,
    preparation,
    prepare,
)
from attamba.data import pieces as pieces_module
from attamba.data.tokenizer import ByteTokenizer

SCRIPT = """
import sys
from attamba.data import load_tokenizer, parts, prepare
if __name__ == "__main__":
    parts.LEAST = 8000
    corpus, out, workers = sys.argv[1:]
    prepare(corpus, out, load_tokenizer("bytes"), shard_tokens=3000, workers=int(workers))
"""


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """The corpus as one process prepares it undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LEAST", 8000)
        prepare(corpus, folder, load_tokenizer("bytes"), shard_tokens=3000)
    return folder


def test_parts_hold_every_document_once_in_order(corpus, whole, tmp_path):
    one = prepare(corpus, tmp_path / "one", load_tokenizer("bytes"))
    divided = TokenDataset.open(whole)
    assert one.n_documents == divided.n_documents == 500
    assert one.manifest["n_empty"] == divided.manifest["n_empty"] == 2
    assert len(one.manifest["shards"]) == 1
    assert len({shard["tokens"][7:12] for shard in divided.manifest["shards"]}) > 5
    for a, b in zip(one.documents(), divided.documents(), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert (a.n_bytes, a.n_words, a.source) == (b.n_bytes, b.n_words, b.source)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_workers(corpus, whole, tmp_path, workers):
    seen = []
    dataset = prepare(
        corpus,
        tmp_path / "out",
        load_tokenizer("bytes"),
        shard_tokens=3000,
        workers=workers,
        progress=lambda *done: seen.append(done),
    )
    assert content(tmp_path / "out") == content(whole)
    assert seen[-1] == (500, dataset.n_tokens, dataset.n_bytes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("workers", [1, 2])
def test_max_tokens_keeps_whole_shards_from_the_first_on(corpus, whole, tmp_path, workers):
    every = TokenDataset.open(whole)
    options = {"shard_tokens": 3000, "workers": workers}
    for limit in (1, 20_000, 10**9):
        out = tmp_path / str(limit)
        some = prepare(corpus, out, load_tokenizer("bytes"), max_tokens=limit, **options)
        shards = some.manifest["shards"]
        assert shards == every.manifest["shards"][: len(shards)]
        assert min(limit, every.n_tokens) <= some.n_tokens
        assert some.n_tokens - shards[-1]["n_tokens"] < limit
        assert some.tokens(0, some.n_tokens).tolist() == every.tokens(0, some.n_tokens).tolist()
        some.verify()
    assert content(out) == content(whole)


# Stopped and gone on with


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_it_goes_on_without_loss(corpus, whole, tmp_path, workers):
    script, out = tmp_path / "go.py", tmp_path / "out"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(script), str(corpus), str(out), str(workers)]
    draw = random.Random(workers)
    kept, statuses = [], []
    for _ in range(3):
        process = subprocess.Popen(command)
        wanted = len(kept) + draw.randrange(1, 8)
        while process.poll() is None and len(shards_in(tmp_path)) < wanted:
            time.sleep(0.002)
        process.kill()
        statuses.append(process.wait())
        kept = shards_in(tmp_path)
    assert -signal.SIGKILL in statuses and kept
    subprocess.run(command, check=True)
    assert content(out) == content(whole)
    assert not list(tmp_path.glob(".*"))


def shards_in(folder):
    """The whole shards of what is under way: those that a part's record names."""
    records = folder.glob(".out.*.partial/part-*.json")
    return [shard["tokens"] for path in records for shard in json.loads(path.read_text())["shards"]]


class Counting(ByteTokenizer):
    """Counts the texts that it was given."""

    def __init__(self):
        super().__init__()
        self.n_texts = 0

    def encode_batch(self, texts):
        self.n_texts += len(texts)
        return super().encode_batch(texts)


@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_loses_no_whole_shard(corpus, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces_module, "BATCH", 2000)
    calls = 0

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device; make room, and the same") as e:
            prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=3000)
    assert Path(e.value.filename).parent.name.endswith(".partial")
    kept = shards_in(tmp_path)
    assert len(kept) == 6  # two files of each are synced
    assert not [path for path in tmp_path.glob(".out.*.partial/.*") if path.name != ".lock"]
    tokenizer = Counting()
    prepare(corpus, tmp_path / "out", tokenizer, shard_tokens=3000)
    assert tokenizer.n_texts < 450
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits of a process")
def test_a_disk_that_is_full_in_a_worker(corpus, tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from attamba.cli import main\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "go.py").write_text(code)
    command = [sys.executable, "go.py", "data", "prepare", "out", str(corpus), "--workers", "2"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 1
    assert "File too large; make room, and the same command goes on" in told.stderr
    assert told.stderr.startswith("attamba: error: ") and told.stderr.count("\n") == 1


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("damage", ["cut", "altered", "missing", "record"])
def test_a_damaged_shard_of_what_is_under_way_is_written_again(
    corpus, whole, tmp_path, monkeypatch, damage
):
    stop_after(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=3000)
    monkeypatch.undo()
    monkeypatch.setattr(parts, "LEAST", 8000)
    (partial,) = tmp_path.glob(".out.*.partial")
    path = partial / ("part-00000.json" if damage == "record" else "tokens-00000-001.bin")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "altered":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    else:
        path.write_bytes(data[:-2])
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=3000)
    assert content(tmp_path / "out") == content(whole)


def stop_after(monkeypatch, batches):
    """Ctrl-C at the so many-th batch."""
    monkeypatch.setattr(pieces_module, "BATCH", 2000)
    encode, calls = ByteTokenizer.encode_batch, []

    def interrupted(self, texts):
        calls.append(0)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_batch", interrupted)


@pytest.mark.usefixtures("small_parts")
def test_a_file_that_changed_is_read_again(tmp_path, monkeypatch):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * 4500)
    paths = [str(tmp_path / f"{i}.txt") for i in range(6)]
    stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        prepare(paths, tmp_path / "out", load_tokenizer("bytes"))
    assert len(shards_in(tmp_path)) == 4
    monkeypatch.undo()
    (tmp_path / "1.txt").write_text("changed")
    dataset = prepare(paths, tmp_path / "out", load_tokenizer("bytes"))
    texts = [dataset.tokenizer.decode(d.tokens) for d in dataset.documents()]
    assert texts == [Path(path).read_text() for path in paths]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("change", ["removed", "added"])
def test_a_file_in_front_comes_or_goes(tmp_path, monkeypatch, change):
    """What is kept names its sources by number: those must be the numbers of now."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in (0, 2, 3):
        (texts / f"{i}.txt").write_text(f"{i} " * 4500)
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        prepare(texts, tmp_path / "out", load_tokenizer("bytes"))
    monkeypatch.undo()
    (texts / "1.txt").write_text("1 " * 4500) if change == "added" else (texts / "0.txt").unlink()
    prepare(texts, tmp_path / "out", load_tokenizer("bytes"))
    prepare(texts, tmp_path / "fresh", load_tokenizer("bytes"))
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("stopped", "other"), [("web.v2", "web"), ("data1", "data[1]")])
def test_what_is_under_way_beside_is_another_s(corpus, tmp_path, monkeypatch, stopped, other):
    stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / stopped, load_tokenizer("bytes"), shard_tokens=3000)
    monkeypatch.undo()
    left = content(tmp_path)
    prepare(corpus, tmp_path / other, load_tokenizer("bytes"), shard_tokens=1000)
    assert left and left.items() <= content(tmp_path).items()


def test_a_link_stays_one(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    for _ in range(2):
        dataset = prepare(tmp_path / "a.txt", tmp_path / "link", load_tokenizer("bytes"))
        assert (dataset.n_documents, (tmp_path / "link").is_symlink()) == (1, True)
        assert is_prepared(tmp_path / "big")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "big", "link"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(DataError, match=r"\. is the current folder, .*; name one in it"):
        prepare(tmp_path / "a.txt", ".", load_tokenizer("bytes"))


@pytest.mark.usefixtures("small_parts")
def test_other_settings_do_not_touch_what_is_under_way(corpus, tmp_path, monkeypatch):
    stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=3000)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=1000)
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    monkeypatch.undo()
    prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("small_parts")
def test_killed_before_the_last_rename(corpus, whole, tmp_path, monkeypatch):
    def killed(new, out):
        raise KeyboardInterrupt

    for older in (False, True):
        monkeypatch.setattr(preparation, "_replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=3000)
        monkeypatch.undo()
        monkeypatch.setattr(parts, "LEAST", 8000)
        (partial,) = tmp_path.glob(".out.*.partial")
        assert is_prepared(partial)
        if older:
            (tmp_path / "out").rename(tmp_path / ".out.123.old")
        prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=3000)
        assert content(tmp_path / "out") == content(whole)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_of_other_settings_leave_each_other_alone(corpus, tmp_path):
    class Other(ByteTokenizer):
        def encode_batch(self, texts):
            prepare(corpus, tmp_path / "out", load_tokenizer("bytes"), shard_tokens=1000)
            return super().encode_batch(texts)

    prepare(corpus, tmp_path / "out", Other(), shard_tokens=3000).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_at_once_are_refused(corpus, tmp_path):
    class Second(ByteTokenizer):
        def encode_batch(self, texts):
            with pytest.raises(DataError, match="out: another process prepares it"):
                prepare(corpus, tmp_path / "out", load_tokenizer("bytes"))
            return super().encode_batch(texts)

    prepare(corpus, tmp_path / "out", Second()).verify()


def test_a_worker_that_is_killed(corpus, tmp_path):
    with pytest.raises(DataError, match="a worker ended without a word: it was killed"):
        prepare(corpus, tmp_path / "out", Deadly(), workers=2)
    assert not is_prepared(tmp_path / "out")


class Deadly(ByteTokenizer):
    """Kills its process."""

    def encode_batch(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)


# Records that are no text


BAD = ['{"text": "a\\u0000"}', "{", '{"body": "x"}', '{"text": null}', '{"text": "\\ud800"}']


def test_bad_records_can_be_passed_over(tmp_path):
    lines = ['{"text": "one"}', *BAD, '{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'text' holds NUL.* --skip-bad"):
        prepare(paths, tmp_path / "out", load_tokenizer("bytes"))
    with pytest.raises(DataError, match=r"b\.txt is empty or blank, or .* \(7 were passed over\)"):
        prepare(paths, tmp_path / "out", load_tokenizer("bytes"), skip_bad=True)
    dataset = prepare(paths[0], tmp_path / "out", load_tokenizer("bytes"), skip_bad=True)
    assert [bytes(d.tokens.tolist()) for d in dataset.documents()] == [b"one", b"two"]
    assert dataset.manifest["n_bad"] == len(BAD) + 1


def test_bad_documents_of_a_divided_file_can_be_passed_over(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"# 1\na\n# 2\n\0\nb\n# 3\n\xff\n\xff\n# 4\nd\n")
    arguments = (tmp_path / "a.txt", tmp_path / "out", load_tokenizer("bytes"))
    with pytest.raises(DataError, match=r"a\.txt: byte 10 is NUL"):
        prepare(*arguments, split_on="^# ")
    dataset = prepare(*arguments, split_on="^# ", skip_bad=True)
    texts = [bytes(d.tokens.tolist()) for d in dataset.documents()]
    assert (texts, dataset.manifest["n_bad"]) == ([b"# 1\na\n", b"# 4\nd\n"], 2)


@pytest.mark.usefixtures("small_parts")
def test_what_passed_bad_records_over_is_read_again_where_they_count(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": f"{i} " * 4500}) + "\n{\n")
    paths = [str(tmp_path / f"{i}.jsonl") for i in range(3)]
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        prepare(paths, tmp_path / "out", load_tokenizer("bytes"), skip_bad=True)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"0\.jsonl:2: broken JSON"):
        prepare(paths, tmp_path / "out", load_tokenizer("bytes"))


def test_options_out_of_range(tmp_path):
    for option in ("workers", "max_tokens"):
        with pytest.raises(DataError, match=f"{option}=0 must be at least 1"):
            prepare(tmp_path, tmp_path / "out", load_tokenizer("bytes"), **{option: 0})
    with pytest.raises(DataError, match="s3://bucket/out is a URL; prepare into a local folder"):
        prepare(tmp_path, "s3://bucket/out", load_tokenizer("bytes"))


def test_patterns_of_files(tmp_path):
    for name in ("a1.txt", "a2.txt", "b.txt", "a3.png"):
        (tmp_path / name).write_text(name)
    dataset = prepare(tmp_path / "a*", tmp_path / "out", load_tokenizer("bytes"))
    assert [Path(document.source).name for document in dataset.documents()] == ["a1.txt", "a2.txt"]
    with pytest.raises(DataError, match="matches no file of a kind that is read"):
        prepare(tmp_path / "*.png", tmp_path / "out", load_tokenizer("bytes"))
