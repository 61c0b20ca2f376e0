"""Checkpoints: written aside and renamed, verified when read, without pickle.

<run_dir>/checkpoints/step-00000500/
    model.safetensors       parameters under the model's names, a tied one once
    optimizer.safetensors   AdamW's state as "<parameter>.<exp_avg, exp_avg_sq or step>"
    state.json              step, tokens, seconds, random states, fingerprints of the data
    config.json             the RunConfig
    tokenizer/              what Tokenizer.save wrote
    manifest.json           size and SHA-256 of every other file; written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from attamba.config import ConfigError, ModelConfig, RunConfig, from_dict, override_model, to_dict
from attamba.data.files import sync
from attamba.models import Decoder, build_model
from attamba.train.optim import optimizer_tensors, restore_optimizer
from attamba.train.runtime import resolve_device, rng_state, set_rng_state
from attamba.train.storage import (
    TOKENIZER,
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    remedy,
    seal,
    verify,
)

if TYPE_CHECKING:
    from attamba.data import Tokenizer

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, CONFIG = "state.json", "config.json"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_checkpoint(
    run_dir: str | Path,
    *,
    step: int,
    model: nn.Module,
    config: RunConfig,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer | None = None,
    tokens: int = 0,
    seconds: float = 0.0,
    data: Mapping[str, str | None] | None = None,
) -> Path:
    """Write <run_dir>/checkpoints/step-<step> and return it.

    model: a Decoder, or what torch.compile made of one; its own config is the one saved.
    optimizer: without it the checkpoint can be loaded, but training cannot resume from it.
    tokens, seconds: spent in training so far.
    data: fingerprints of what it trains on, compared on resume.

    Raises CheckpointError if it cannot be written (the disk is full, ...); nothing of it is left
    then, and older checkpoints are untouched.
    """
    from safetensors import SafetensorError

    decoder = cast(Decoder, getattr(model, "_orig_mod", model))
    folder = Path(run_dir) / "checkpoints"
    final = folder / f"step-{step:08d}"
    aside = folder / f".tmp-{final.name}"
    if final.exists():
        raise CheckpointError(f"{final} exists already; delete it or save into another folder")
    state = {
        "step": step,
        "tokens": tokens,
        "seconds": seconds,
        "rng": rng_state(next(decoder.parameters()).device),
        "tokenizer": tokenizer.fingerprint,
        "data": dict(data or {}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        _save_tensors(aside / MODEL, named_tensors(decoder))
        if optimizer is not None:
            _save_tensors(aside / OPTIMIZER, optimizer_tensors(optimizer, decoder))
        _save_json(aside / STATE, state)
        _save_json(aside / CONFIG, to_dict(replace(config, model=decoder.config)))
        tokenizer.save(aside / TOKENIZER)
        seal(aside, step=step)
        os.rename(aside, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"cannot save {final}: {error}. If the disk is full, make room there or lower "
            f"train.keep (one more is written before the oldest is deleted). "
            f"{_still_there(Path(run_dir))}"
        ) from error
    return final


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; one that has two names (tied) by its first."""
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def _save_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _still_there(run_dir: Path) -> str:
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return "There is no older checkpoint"
    return f"{checkpoints[-1]} is whole, and the same command goes on from it"


def load(
    path: str | Path,
    *,
    step: int | None = None,
    overrides: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
) -> tuple[Decoder, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a checkpoint.

    path: a run folder (its newest checkpoint) or a checkpoint folder.
    step: of a run folder, this step's checkpoint instead of the newest.
    overrides: config keys to change, e.g. {"mixer.chunk_size": 4}; they must keep every tensor's
        name and shape.
    device: "cpu", "cuda", "cuda:1", "auto", ...
    dtype: "float32", "bfloat16", "float16" or a torch dtype. Default: as saved.

    Raises CheckpointError for a file that is missing, truncated or altered, for tensors that do
    not fit the model, and for a tokenizer that is not the checkpoint's; ConfigError for an
    override that is unknown or out of range.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r} must be one of: {', '.join(_DTYPES)}")
        dtype = _DTYPES[dtype]
    target = resolve_device(device)
    folder = find_checkpoint(path, step)
    verify(folder, leave_out=(OPTIMIZER,))
    model_config = read_config(folder).model
    if overrides:
        model_config = override_model(model_config, overrides)
    tokenizer = _load_tokenizer(folder, model_config)
    with torch.random.fork_rng(devices=[]):  # the initial weights that load_weights replaces
        model = build_model(model_config)
    load_weights(model, folder, overrides)
    return model.to(device=target, dtype=dtype).eval(), tokenizer


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Put a checkpoint into a fresh model and optimizer and torch's random state.

    Returns state.json's content. Raises CheckpointError as load does, and if the checkpoint was
    saved without an optimizer.
    """
    manifest = verify(folder)
    if OPTIMIZER not in manifest["files"]:
        raise CheckpointError(
            f"{folder} was saved without {OPTIMIZER}, so training cannot resume from it; train "
            f"into another `out`"
        )
    load_weights(model, folder)
    try:
        restore_optimizer(optimizer, model, _load_tensors(folder / OPTIMIZER))
    except ValueError as error:
        raise CheckpointError(f"{folder / OPTIMIZER} does not fit the model: {error}") from error
    state = read_state(folder)
    set_rng_state(state["rng"], device)
    return state


def read_config(folder: Path) -> RunConfig:
    """The RunConfig of a verified checkpoint."""
    return from_dict(RunConfig, json.loads((folder / CONFIG).read_text(encoding="utf-8")))


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a verified checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def _load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    from attamba.data import load_tokenizer

    tokenizer = load_tokenizer(folder / TOKENIZER)
    trained_with = read_state(folder)["tokenizer"]
    if tokenizer.fingerprint != trained_with:
        raise CheckpointError(
            f"tokenizer and checkpoint do not match: {folder / TOKENIZER} has fingerprint "
            f"{tokenizer.fingerprint[:12]}, the model was trained with {trained_with[:12]}; "
            f"put back the tokenizer that it was trained with"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"tokenizer and checkpoint do not match: the tokenizer has {tokenizer.vocab_size} "
            f"entries, model.vocab_size is {config.vocab_size}; put back the tokenizer that the "
            f"model was trained with"
        )
    return tokenizer


def load_weights(
    model: nn.Module, folder: Path, overrides: Mapping[str, Any] | None = None
) -> None:
    """Copy model.safetensors into `model`, in place.

    overrides: what was changed in the checkpoint's config, for the message. Raises CheckpointError
    for a tensor that is missing, left over or of another shape.
    """
    saved, wanted = _load_tensors(folder / MODEL), named_tensors(model)
    why = f"; {folder / CONFIG} and {MODEL} are not of one model"
    if overrides:
        keys = ", ".join(f"{key}={value}" for key, value in overrides.items())
        why = (
            f": the override {keys} changes the model's parameters, for which there are no "
            f"weights; override only what leaves them alone (chunk_size, leading_tokens, "
            f"boundary, ...)"
        )
    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        if name not in saved:
            raise CheckpointError(f"tensor {name} is not in {folder / MODEL}{why}")
        if name not in wanted:
            raise CheckpointError(f"tensor {name} of {folder / MODEL} is not in the model{why}")
        if saved[name].shape != wanted[name].shape:
            raise CheckpointError(
                f"tensor {name} is {list(saved[name].shape)} in {folder / MODEL} and "
                f"{list(wanted[name].shape)} in the model{why}"
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); {remedy(path.parent)}") from error
