"""A server that speaks the API of OpenAI's clients: `transformers serve`, told of this model."""

from __future__ import annotations

import json
import socket
import tempfile
from pathlib import Path
from typing import Any

import attamba.hf
from attamba.config import ConfigError


def serve(checkpoint: str | Path, *, host: str = "localhost", port: int = 8000) -> int:
    """Serve a run folder, a checkpoint folder or an exported one until interrupted; returns 0.

    Raises ImportError where the extra `attamba[serve]` is not installed, ConfigError for a port
    that cannot be used and a folder of another architecture, ValueError for weights that cannot be
    loaded, and what attamba.hf.export raises for a checkpoint that cannot be exported.
    """
    require_serving()
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="attamba-serve-") as room:
        folder = served_folder(Path(checkpoint), Path(room))
        print(
            f"{checkpoint}: http://{host}:{port}/v1 answers completions and chats\n"
            f"model, as requests name it: {folder}\n"
            f"talk to it: transformers chat {folder} http://{host}:{port}/v1",
            flush=True,
        )
        start(folder, host=host, port=port)
    return 0


def require_serving() -> None:
    """Raise ImportError, naming the extra, where the server's packages are missing."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError(
            "the server's packages are not installed; they come with: pip install 'attamba[serve]'"
        )


def check_port(host: str, port: int) -> None:
    """Raise ConfigError where nobody can listen there; the server itself would only log it."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port={port} must be in 1..65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            trial.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host={host} --port={port} cannot be listened on ({error.strerror}); name another "
            f"port, or stop what uses it"
        ) from error


def served_folder(checkpoint: Path, room: Path) -> Path:
    """The folder to serve: an exported one as it is, a checkpoint exported into `room`.

    Raises ConfigError for another architecture's folder, and what check_folder raises.
    """
    from attamba.hf.export import check_folder, export

    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if "model_type" in config:
        if config["model_type"] != attamba.hf.AttambaConfig.model_type:
            raise ConfigError(
                f"{checkpoint} is of the architecture {config['model_type']!r}, not 'attamba'; "
                f"serve it with: transformers serve"
            )
        check_folder(checkpoint)
        return checkpoint.resolve()
    return export(checkpoint, room / checkpoint.resolve().name)


class Sampling(attamba.hf.AttambaForCausalLM):
    """The model as servers have it: what a request's temperature does not set to 0 is drawn."""

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        model = super().from_pretrained(*args, **options)
        model.generation_config.do_sample = True
        model.generation_config.top_k = 0  # the library's default would leave the 50 likeliest
        return model


def start(folder: Path, *, host: str, port: int, non_blocking: bool = False) -> Any:
    """Run the server on a folder that transformers can load.

    non_blocking: in a thread; the object returned has kill_server(). Else it returns when the
    server is interrupted.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    # The server looks classes up in transformers itself, and lists the hub's folder.
    model_manager.transformers.AttambaForCausalLM = Sampling
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    return Serve(force_model=str(folder), host=host, port=port, non_blocking=non_blocking)
