"""The server over a checkpoint: completions, chats and streams, by OpenAI's client and by hand."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import attamba
from attamba.cli import main
from attamba.config import RunConfig
from attamba.data import load_tokenizer
from attamba.exit_status import INTERRUPTED
from attamba.train import save_checkpoint

MAIN = "import sys; from attamba.cli import main; sys.exit(main())"
MIXER = {"type": "attamba", "n_heads": 4, "chunk_size": 4, "leading_tokens": 5, "ssm_heads": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    config = attamba.ModelConfig(vocab_size=256, dim=32, n_layers=2, mixer=MIXER)
    folder = tmp_path_factory.mktemp("run")
    return save_checkpoint(
        folder,
        step=1,
        model=attamba.build_model(config),
        config=RunConfig(),
        tokenizer=load_tokenizer("bytes"),
    )


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """(url, model) of `attamba serve` in a process of its own, until the tests are done."""
    for attempt in range(3):
        log = tmp_path_factory.mktemp("home") / "log.txt"
        process, url = start_server(checkpoint, free_port(), log)
        if process.poll() is None:
            break
        # Between the choice of a port and the server's start another process may take it.
        assert "address already in use" in log.read_text().lower() and attempt < 2, log.read_text()
    yield url, re.search(r"transformers chat (\S+) ", log.read_text())[1]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == INTERRUPTED, log.read_text()


def start_server(checkpoint, port, log):
    """The process, when it answers or has ended, and its address."""
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", str(checkpoint), "--port", str(port)],
            env=os.environ | {"HF_HOME": str(log.parent), "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url, deadline = f"http://localhost:{port}", time.time() + 90
    while process.poll() is None and not answers(url):
        assert time.time() < deadline, log.read_text()
        time.sleep(0.3)
    return process, url


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def answers(url):
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture
def want(checkpoint):
    """want(text) -> the 8 tokens that follow it, as text; a chat begins without the separator."""
    model, tokenizer = attamba.load(checkpoint)

    def follow(text, begin=()):
        ids = [*begin, *tokenizer.encode(text)]
        out = attamba.generate(model, [ids], max_new_tokens=8, eos_id=tokenizer.eos_id)[0]
        return tokenizer.decode(out[len(ids) :].tolist())

    return follow


def post(server, path, **body):
    url, model = server
    request = urllib.request.Request(
        url + path,
        json.dumps({"model": model, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    return json.loads(urllib.request.urlopen(request, timeout=60).read())


def test_completion(server, want):
    answer = post(server, "/v1/completions", prompt="the cat", max_tokens=8, temperature=0)
    assert answer["choices"][0]["text"] == want("the cat", begin=[0])


def test_a_temperature_draws(server):
    def drawn(**options):
        body = {"prompt": "the cat", "max_tokens": 8, **options}
        return post(server, "/v1/completions", **body)["choices"][0]["text"]

    assert drawn(temperature=1.0, seed=5) == drawn(temperature=1.0, seed=5)
    assert len({drawn(temperature=2.0, seed=seed) for seed in range(4)}) > 1
    assert drawn(temperature=0) == drawn(temperature=0)


def test_every_token_can_be_drawn(checkpoint, tmp_path):
    """The library's own default, top_k=50, is not OpenAI's; a request cannot undo it."""
    from attamba.serve import Sampling, served_folder

    model = Sampling.from_pretrained(served_folder(checkpoint, tmp_path))
    torch.manual_seed(0)
    ids = torch.zeros(2000, 1, dtype=torch.long)
    drawn = model.generate(ids, max_new_tokens=1, temperature=2.0)[:, 1]
    assert len(drawn.unique()) > 150


def test_chat(server, want):
    messages = [{"role": "user", "content": "the cat"}]
    answer = post(server, "/v1/chat/completions", messages=messages, max_tokens=8, temperature=0)
    assert answer["choices"][0]["message"]["content"] == want("user: the cat\nassistant:")


def test_models(server):
    assert urllib.request.urlopen(f"{server[0]}/v1/models", timeout=20).status == 200


def test_openai_client(server, want):
    openai = pytest.importorskip("openai")
    url, model = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages = [{"role": "user", "content": "a dog"}]
    options = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    assert whole == want("user: a dog\nassistant:")
    stream = client.chat.completions.create(**options, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream if part.choices) == whole


def test_transformers_chat(server):
    url, model = server
    done = subprocess.run(
        [Path(sys.executable).parent / "transformers", "chat", model, f"{url}/v1",
         "max_new_tokens=8", "do_sample=false"],
        input="hello\nN\n!exit\n",  # N: do not go on past the limit
        capture_output=True,
        text=True,
        timeout=90,
        env=os.environ | {"TERM": "dumb", "HF_HUB_OFFLINE": "0"},  # it refuses localhost too
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "reaching the token limit" in done.stdout


def test_an_exported_folder_is_served_as_it_is(checkpoint, tmp_path):
    from attamba.serve import served_folder

    first = served_folder(checkpoint, tmp_path)
    assert first == tmp_path / checkpoint.name
    assert served_folder(first, tmp_path / "room") == first


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_ports_that_are_none(checkpoint, port, capsys):
    assert main(["serve", str(checkpoint), f"--port={port}"]) == 2
    assert f"--port={port} must be in 1..65535" in capsys.readouterr().err


def test_a_port_in_use(checkpoint, capsys):
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", str(checkpoint), "--host=127.0.0.1", f"--port={port}"]) == 2
    assert (
        f"--port={port} cannot be listened on (Address already in use)" in capsys.readouterr().err
    )


def test_another_architecture_is_not_served(tmp_path, capsys):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    assert main(["serve", str(tmp_path / "llama"), "--port", str(free_port())]) == 2
    assert "is of the architecture 'llama', not 'attamba'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda path: flip(path), "was altered after the export"),
        ("model.safetensors", lambda path: path.unlink(), "is missing; export the model again"),
        ("config.json", lambda path: path.write_text('{"model_type": "attamba"}'), "was altered"),
        ("tokenizer.json", lambda path: path.unlink(), "holds no tokenizer that can be read"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "holds no tokenizer that can be"),
        ("tokenizer.json", lambda path: one_more(path), "has 257 entries, vocab_size in"),
    ],
)
def test_exported_folders_that_cannot_be_served(
    checkpoint, file, change, message, tmp_path, capsys
):
    from attamba.serve import served_folder

    folder = served_folder(checkpoint, tmp_path)
    change(folder / file)
    assert main(["serve", str(folder), "--port", str(free_port())]) == 2
    assert message in capsys.readouterr().err


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def one_more(path):
    """A tokenizer with a token that the model does not know."""
    found = json.loads(path.read_text())
    found["model"]["vocab"]["more"] = 256
    path.write_text(json.dumps(found))


def test_without_the_servers_packages(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", str(checkpoint)]) == 2
    assert "pip install 'attamba[serve]'" in capsys.readouterr().err
