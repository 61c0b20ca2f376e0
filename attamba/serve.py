"""A server that speaks the API of OpenAI's clients: `transformers serve`, told of this model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import attamba.hf


def serve(checkpoint: str | Path, *, host: str = "localhost", port: int = 8000) -> int:
    """Serve a run folder, a checkpoint folder or an exported one until interrupted; returns 0.

    Raises ImportError where the extra `attamba[serve]` is not installed, and what
    attamba.hf.export raises for a checkpoint that cannot be exported.
    """
    require_serving()
    with tempfile.TemporaryDirectory(prefix="attamba-serve-") as room:
        folder = served_folder(Path(checkpoint), Path(room))
        print(
            f"{checkpoint}: http://{host}:{port}/v1 answers completions and chats; talk to it: "
            f"transformers chat {folder} http://{host}:{port}/v1",
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


def served_folder(checkpoint: Path, room: Path) -> Path:
    """The folder to serve: an exported one as it is, a checkpoint exported into `room`."""
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if "model_type" in config:
        return checkpoint.resolve()
    from attamba.hf.export import export

    return export(checkpoint, room / checkpoint.resolve().name)


def start(folder: Path, *, host: str, port: int, non_blocking: bool = False) -> Any:
    """Run the server on a folder that transformers can load.

    non_blocking: in a thread; the object returned has kill_server(). Else it returns when the
    server is interrupted.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    # The server looks classes up in transformers itself, and lists the hub's folder.
    model_manager.transformers.AttambaForCausalLM = attamba.hf.AttambaForCausalLM
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    return Serve(force_model=str(folder), host=host, port=port, non_blocking=non_blocking)
