"""Prepared folders at URLs, their cache, and checksums."""

import errno
import json
import socket
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from attamba.cli import main
from attamba.data import (
    DataError,
    TokenDataset,
    UnreachableError,
    is_prepared,
    load_tokenizer,
    prepare,
    read_documents,
    train_bpe,
)
from attamba.exit_status import FAILED, MISTAKE

fsspec = pytest.importorskip("fsspec")

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAMBA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def prepared(tmp_path):
    """Five documents in as many shards."""
    lines = [json.dumps({"text": f"document {i * i * i}: {i + 7919**i}"}) for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = train_bpe(tmp_path / "a.jsonl", 270, tmp_path / "bpe")
    prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, shard_tokens=1)
    return tmp_path / "out"


@pytest.fixture
def memory(prepared):
    """The same folder at memory://prepared."""
    fs = fsspec.filesystem("memory")
    fs.put(str(prepared), "/prepared", recursive=True)
    yield fs
    fs.rm("/prepared", recursive=True)


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, lists it, and keeps what was asked for in `asked`."""

    def log_message(self, *args):
        self.server.asked.append(f"{self.command} {self.path}")


class Unlisted(Quiet):
    """Lists nothing, says no sizes, and refuses what is called secret."""

    def do_GET(self):
        if "secret" in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    def list_directory(self, path):
        self.send_error(403)

    def send_header(self, key, value):
        if key.lower() != "content-length":
            super().send_header(key, value)


@pytest.fixture
def serve(tmp_path):
    """serve(handler): a server of tmp_path, and its URL."""
    pytest.importorskip("aiohttp")
    servers = []

    def start(handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
        server.asked = []
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def same(a, b):
    assert a.n_tokens == b.n_tokens
    assert np.array_equal(a.tokens(0, a.n_tokens), b.tokens(0, b.n_tokens))
    assert np.array_equal(a.doc_ids(0, a.n_tokens), b.doc_ids(0, b.n_tokens))
    for x, y in zip(a.documents(), b.documents(), strict=True):
        assert np.array_equal(x.tokens, y.tokens) and x.source == y.source
    assert a.tokenizer.fingerprint == b.tokenizer.fingerprint


def test_shards_at_a_url_are_those_on_the_disk(prepared, memory):
    here = TokenDataset.open(prepared)
    assert len(here.manifest["shards"]) == 5
    for url in ("memory://prepared", "memory://prepared/", f"file://{prepared}"):
        assert is_prepared(url)
        there = TokenDataset.open(url)
        assert there.folder == url
        same(here, there)
        there.verify()


def test_a_shard_is_fetched_once_and_when_it_is_needed(prepared, memory, cache, monkeypatch):
    fetched = []
    get = memory.get_file
    monkeypatch.setattr(
        type(memory), "get_file", lambda self, path, to: (fetched.append(path), get(path, to))
    )
    dataset = TokenDataset.open("memory://prepared")
    assert not fetched
    dataset.tokens(0, 3)
    dataset.tokens(1, 5)
    assert fetched == ["/prepared/tokens-00000-000.bin"]
    again = TokenDataset.open("memory://prepared")
    again.tokens(0, 5)
    assert len(fetched) == 1
    (kept,) = [path for path in cache.rglob("*") if path.is_file()]
    kept.write_bytes(kept.read_bytes()[:-1])  # cut: fetched anew
    TokenDataset.open("memory://prepared").tokens(0, 5)
    assert len(fetched) == 2


def test_a_shard_that_was_altered_at_its_url_is_refused(memory, cache):
    name = "/prepared/tokens-00000-001.bin"
    data = memory.cat_file(name)
    memory.pipe_file(name, bytes([data[0] ^ 1]) + data[1:])
    dataset = TokenDataset.open("memory://prepared")
    dataset.tokens(0, 5)
    with pytest.raises(DataError, match=r"memory://prepared/tokens-00000-001\.bin is not what its"):
        dataset.tokens(0, dataset.n_tokens)
    with pytest.raises(DataError, match=r"tokens-00000-001\.bin was altered"):
        dataset.verify()
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 1


def test_verify_looks_at_the_cache_as_well(memory, cache):
    """What was damaged there after it was read is read again."""
    dataset = TokenDataset.open("memory://prepared")
    tokens = dataset.tokens(0, dataset.n_tokens)
    kept = next(path for path in sorted(cache.rglob("*.bin")) if path.is_file())
    kept.write_bytes(bytes([kept.read_bytes()[0] ^ 1]) + kept.read_bytes()[1:])
    dataset = TokenDataset.open("memory://prepared")
    dataset.verify()
    assert np.array_equal(dataset.tokens(0, dataset.n_tokens), tokens)


def test_a_shard_that_is_cut_at_its_url_is_refused(memory):
    name = "/prepared/tokens-00000-001.bin"
    data = memory.cat_file(name)
    memory.pipe_file(name, data[:-2])
    with pytest.raises(DataError, match=rf"has {len(data) - 2} bytes, .* says {len(data)} bytes"):
        TokenDataset.open("memory://prepared")
    memory.rm(name)
    with pytest.raises(DataError, match=r"tokens-00000-001\.bin is missing"):
        TokenDataset.open("memory://prepared")


@pytest.mark.parametrize("handler", [Quiet, Unlisted])
def test_shards_over_http(prepared, serve, handler):
    """A listing over HTTP has no sizes, if there is one; a server may not tell them at all."""
    _, url = serve(handler)
    assert is_prepared(f"{url}/out")
    there = TokenDataset.open(f"{url}/out")
    same(TokenDataset.open(prepared), there)
    there.verify()


@pytest.mark.parametrize("handler", [Quiet, Unlisted])
def test_shards_over_http_that_are_cut_or_missing(prepared, serve, handler):
    _, url = serve(handler)
    path = prepared / "tokens-00000-001.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    if handler is Quiet:
        with pytest.raises(DataError, match=rf"has {len(data) - 2} bytes, .* {len(data)} bytes"):
            TokenDataset.open(f"{url}/out")
    else:  # found out when it is fetched
        with pytest.raises(DataError, match=r"001\.bin is not what its manifest says"):
            list(TokenDataset.open(f"{url}/out").documents())
    path.unlink()
    with pytest.raises(DataError, match=r"tokens-00000-001\.bin is missing, manifest\.json says"):
        TokenDataset.open(f"{url}/out")


def test_shards_over_http_that_may_not_be_read(prepared, serve):
    _, url = serve(Unlisted)
    prepared.rename(prepared.with_name("secret"))
    with pytest.raises(DataError, match=rf"{url}/secret/manifest\.json is refused \(403, "):
        TokenDataset.open(f"{url}/secret")


@pytest.mark.parametrize("status", [503, 429])
def test_a_server_that_is_busy_may_be_asked_again(serve, status):
    class Busy(Quiet):
        def do_GET(self):
            self.send_error(status)

        do_HEAD = do_GET

    _, url = serve(Busy)
    for ask in (is_prepared, TokenDataset.open, lambda path: list(read_documents(path))):
        with pytest.raises(UnreachableError, match=rf"{url}/out.* cannot be reached \({status}, "):
            ask(f"{url}/out")


def test_a_url_that_cannot_be_reached_on_the_command_line(tmp_path, capsys):
    pytest.importorskip("aiohttp")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
    for command, asked in [
        (["data", "verify", url], f"{url}/manifest.json"),
        (["data", "prepare", f"{tmp_path}/out", url], url),
        (["train", str(TINY), f"data.train={url}", f"out={tmp_path}/run"], f"{url}/manifest.json"),
    ]:
        assert main(command) == FAILED
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith(f"attamba: error: {asked} cannot be reached (Cannot connect to host")


def test_a_url_that_does_not_exist_is_a_mistake(serve, tmp_path, capsys):
    _, url = serve(Quiet)
    assert not is_prepared(f"{url}/none")
    assert not is_prepared(f"file://{tmp_path}/a.jsonl")
    assert main(["train", str(TINY), f"data.train={url}/none", f"out={tmp_path}/run"]) == MISTAKE
    assert f"data.train: {url}/none does not exist; check the path" in capsys.readouterr().err


class Failing:
    """Stands for get_file of the file system at memory://; fails as told, then no more."""

    def __init__(self, memory, monkeypatch, *errors):
        self.errors, self.asked, get = list(errors), 0, memory.get_file

        def get_file(fs, path, to):
            self.asked += 1
            if self.errors:
                Path(to).write_bytes(b"the begin of it")
                raise self.errors.pop(0)
            get(path, to)

        monkeypatch.setattr(type(memory), "get_file", get_file)
        monkeypatch.setattr("attamba.data.folders.PAUSES", (0, 0, 0))


def test_a_short_outage_is_waited_for(prepared, memory, monkeypatch, caplog):
    failing = Failing(memory, monkeypatch, ConnectionResetError("reset by peer"), TimeoutError())
    there = TokenDataset.open("memory://prepared")
    assert np.array_equal(there.tokens(0, 5), TokenDataset.open(prepared).tokens(0, 5))
    assert failing.asked == 3
    name = "memory://prepared/tokens-00000-000.bin"
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} cannot be reached ({why}); trying again in 0 s"
        for why in ("reset by peer", "TimeoutError")
    ]


@pytest.mark.parametrize(
    ("error", "raised", "times"),
    [
        (ConnectionRefusedError("refused"), UnreachableError, 4),
        (OSError(errno.EIO, "busy"), UnreachableError, 4),
        (FileNotFoundError("none"), FileNotFoundError, 1),
        (PermissionError("Forbidden"), DataError, 1),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, 1),
    ],
)
def test_what_is_tried_again(memory, cache, monkeypatch, error, raised, times):
    failing = Failing(memory, monkeypatch, *[error] * 9)
    with pytest.raises(raised, match=str(error.args[-1])):
        TokenDataset.open("memory://prepared").tokens(0, 5)
    assert failing.asked == times
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_what_was_altered_is_not_fetched_again(memory, monkeypatch):
    name = "/prepared/tokens-00000-000.bin"
    memory.pipe_file(name, bytes(len(memory.cat_file(name))))
    failing = Failing(memory, monkeypatch)
    with pytest.raises(DataError, match="is not what its manifest says"):
        TokenDataset.open("memory://prepared").tokens(0, 5)
    assert failing.asked == 1


def test_http_without_its_package(monkeypatch):
    for name in ("aiohttp", "fsspec.implementations.http"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "http", raising=False)
    with pytest.raises(DataError, match=r'http://a/b cannot be opened: .*"aiohttp" to be'):
        TokenDataset.open("http://a/b")


def test_urls_that_lead_nowhere():
    with pytest.raises(DataError, match=r"memory://none is no prepared folder"):
        TokenDataset.open("memory://none")
    assert not is_prepared("memory://none")
    with pytest.raises(DataError, match=r"nowhere://a cannot be opened: Protocol not known"):
        TokenDataset.open("nowhere://a")
    with pytest.raises(DataError, match=r"nowhere://a cannot be opened: Protocol not known"):
        list(read_documents("nowhere://a"))


def test_verify_on_the_command_line(prepared, capsys):
    assert main(["data", "verify", str(prepared)]) == 0
    files = [path for path in prepared.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files if path.name != "manifest.json")
    assert capsys.readouterr().out == (
        f"{prepared}: {len(files) - 1} files, {total:,} bytes, all as they were written\n"
    )
    for number in (0, 2):
        path = prepared / f"tokens-00000-00{number}.bin"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["data", "verify", str(prepared)]) == 2
    told = capsys.readouterr().err
    assert "tokens-00000-000.bin, " in told and "tokens-00000-002.bin were altered" in told


def test_prepare_on_the_command_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 2}\n{"text": "three"}\n')
    command = ["data", "prepare", str(tmp_path / "out"), str(tmp_path / "a.jsonl")]
    assert main([*command, "--workers", "1"]) == 2
    assert "a.jsonl:2: 'text' is int, not text" in capsys.readouterr().err
    assert main([*command, "--skip-bad", "--max-tokens", "3", "--shard-tokens", "4"]) == 0
    told = capsys.readouterr().out
    assert "1 documents, 4 tokens, 3 bytes, vocabulary 256" in told
    assert main([*command, "--skip-bad"]) == 0
    assert capsys.readouterr().out.endswith("1 records that are no text were passed over\n")
    dataset = TokenDataset.open(tmp_path / "out")
    assert dataset.n_documents == 2
    assert dataset.fingerprint == load_tokenizer("bytes").fingerprint
