"""Checkpoint folders of a run: found, tidied, sealed with a manifest, verified against it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from attamba.data.files import sha256, sync

MANIFEST, TOKENIZER, SHARDS = "manifest.json", "tokenizer", "shards"
WEIGHTS = "model.safetensors"
FORMAT = 1

_NAME = re.compile(r"step-(\d{8,})")
LEFTOVERS = {
    ".": r"\.(config|status|tracking)\.json\.\d+|\.(metrics|eval)\.jsonl\.\d+",
    "checkpoints": r"\.tmp-.*",
    "data": r"\.(train|valid|source-\d+)\.\d+\.old",
}
"""What is written aside in a run's folder, by the folder in it: nothing else is deleted."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the text names the file and the remedy."""


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; empty where there are none."""
    folder = Path(run_dir) / "checkpoints"
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(checkpoint.resolve().name)
    assert match is not None
    return int(match.group(1))


def find_checkpoint(path: str | Path, step: int | None = None) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a run folder.

    step: of a run folder, this step's instead of the newest. Raises CheckpointError if there is
    none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give a run folder or a checkpoint folder")
    if _NAME.fullmatch(path.resolve().name) or (path / MANIFEST).is_file():
        if step is not None:
            raise CheckpointError(
                f"step={step}: {path} is one checkpoint; give the run folder to choose by step"
            )
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(_what_instead(path))
    if step is None:
        return checkpoints[-1]
    for checkpoint in checkpoints:
        if step_of(checkpoint) == step:
            return checkpoint
    steps = ", ".join(str(step_of(c)) for c in checkpoints)
    raise CheckpointError(f"step={step} is not in {path}; it holds steps {steps}")


def _what_instead(folder: Path) -> str:
    """What a folder without a checkpoint seems to be, and what to do."""
    config = folder / "config.json"
    if not config.is_file():
        return (
            f"{folder} holds no checkpoint (looked for {folder / 'checkpoints' / 'step-*'}); "
            f"give the folder that training wrote to, its config key `out`"
        )
    if "model_type" in config.read_text(encoding="utf-8", errors="replace"):  # a run's has none
        return (
            f"{folder} holds no checkpoint, but looks like a folder of transformers; read it "
            f"first: attamba import {folder} RUN_FOLDER"
        )
    return (
        f"{folder} holds a run that has written no checkpoint yet; train it: attamba train {config}"
    )


def check_unused(run_dir: Path) -> None:
    """Raise CheckpointError where a run is that would be mixed with another's weights."""
    if (run_dir / "config.json").exists() or list_checkpoints(run_dir):
        raise CheckpointError(f"{run_dir} holds a run already; name another folder, or delete it")


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed run was writing or deleting; text half prepared is gone on with."""
    for folder, ours in LEFTOVERS.items():
        for path in (run_dir / folder).glob(".*"):
            if not re.fullmatch(ours, path.name):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def remove_old(run_dir: Path, keep: int) -> None:
    """Delete all checkpoints but the last `keep`; each vanishes at once, never by halves.

    One that cannot be deleted, as where another program reads it on NFS, ends nothing: what is left
    of it is a leftover.
    """
    for old in list_checkpoints(run_dir)[:-keep]:
        aside = old.with_name(f".tmp-{old.name}.{os.getpid()}")
        try:
            os.rename(old, aside)
        except OSError as error:
            warnings.warn(f"{old} cannot be deleted ({error}); delete it by hand", stacklevel=2)
            continue
        shutil.rmtree(aside, ignore_errors=True)


def seal(folder: Path, known: Mapping[str, Any] | None = None, **about: Any) -> None:
    """Write the manifest of all files in `folder` and bring everything to the disk.

    A rename that follows cannot outrun the content then.

    known: entries of files that others have hashed and brought to the disk.
    """
    known = known or {}
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {name: path for name, path in paths.items() if path.is_file()}
    entries = {name: known.get(name) or entry(path) for name, path in files.items()}
    manifest = folder / MANIFEST
    text = json.dumps({"format": FORMAT, **about, "files": entries}, indent=1) + "\n"
    manifest.write_text(text, encoding="utf-8")
    own = [path for name, path in files.items() if name not in known]
    for path in [*own, manifest, *(p for p in paths.values() if p.is_dir()), folder]:
        sync(path)


def entry(path: Path, on_block: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What the manifest says of a file. on_block: see sha256."""
    return {"size": path.stat().st_size, "sha256": sha256(path, on_block)}


def verify(
    folder: Path, leave_out: Iterable[str] = (), part: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """Compare the files of a checkpoint with its manifest and return that.

    leave_out: files not to look at. part: (i, n) looks at every n-th file from the i-th on, for
    ranks that share the work. Raises CheckpointError for one that is missing, truncated or
    altered, naming it and what to do.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _check_format(path, manifest["format"])
        files = {
            name: (int(entry["size"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {remedy(folder)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); {remedy(folder)}") from error
    for name, (size, digest) in list(files.items())[part[0] :: part[1]]:
        if name not in leave_out:
            _verify_file(folder, name, size, digest)
    return manifest


def weights_digest(checkpoint: Path) -> str:
    """SHA-256 of the weights, by the manifest: the same for the same checkpoint wherever it is.

    Raises CheckpointError where that is missing or damaged.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        weights = {n: e["sha256"] for n, e in files.items() if n == WEIGHTS or SHARDS in n}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} is missing or damaged ({error!r}); {remedy(checkpoint)}"
        ) from error
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that no run finds it any more; return where it is now."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(checkpoint, aside)
    return aside


def _check_format(path: Path, version: Any) -> None:
    if not isinstance(version, int):  # prepared text has a manifest too
        raise CheckpointError(
            f"{path} is not the manifest of a checkpoint; give a run folder or a checkpoint folder"
        )
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, this program reads format {FORMAT}; use the version of "
            f"attamba that wrote it"
        )


def remedy(folder: Path) -> str:
    """What to do about a checkpoint that is damaged."""
    folder = folder.resolve()
    text = "restore it from a copy"
    if not _NAME.fullmatch(folder.name):
        return text
    older = [c for c in list_checkpoints(folder.parent.parent) if step_of(c) < step_of(folder)]
    if not older:
        return f"{text}, or delete {folder} and train anew"
    return f"{text}, or delete {folder} to go on from {older[-1].name}"


def cannot_save(final: Path, error: Exception) -> str:
    """What to tell about a checkpoint that could not be written."""
    older = list_checkpoints(final.parent.parent)
    still = "There is no older checkpoint"
    if older:
        still = f"{older[-1]} is whole, and the same command goes on from it"
    return (
        f"cannot save {final}: {error}. If the disk is full, make room there or lower train.keep "
        f"(one more is written before the oldest is deleted). {still}"
    )


def _verify_file(folder: Path, name: str, expected: int, digest: str) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {remedy(folder)}")
    # A tokenizer from elsewhere is the likeliest reason for a change in its folder.
    why = "; tokenizer and checkpoint do not match" if name.startswith(f"{TOKENIZER}/") else ""
    size = path.stat().st_size
    if size < expected:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes of {expected}{why}; {remedy(folder)}"
        )
    if size > expected or sha256(path) != digest:
        raise CheckpointError(
            f"{path} was altered after it was saved: its SHA-256 is not the manifest's{why}; "
            f"{remedy(folder)}"
        )
