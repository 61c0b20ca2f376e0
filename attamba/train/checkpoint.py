"""Checkpoints: written aside and renamed, verified when read, without pickle.

<run_dir>/checkpoints/step-00000500/
    model.safetensors       parameters under the model's names, a tied one once
    optimizer.safetensors   AdamW's state as "<parameter>.<exp_avg, exp_avg_sq or step>"
    state.json              step, tokens, seconds, random states, fingerprints of the data and of
                            the weights that training began with, steps that were left out
    config.json             the RunConfig
    tokenizer/              what Tokenizer.save wrote
    manifest.json           size and SHA-256 of every other file; written last

Several ranks write shards/ in the place of the first two, see sharded.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from attamba.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    from_dict,
    override_model,
    to_dict,
    woven_differences,
)
from attamba.data.files import sync
from attamba.models import Decoder, build_model
from attamba.train.optim import (
    is_spread,
    named_tensors,
    optimizer_tensors,
    placed_as,
    restore_optimizer,
)
from attamba.train.runtime import resolve_device, rng_state, set_rng_state
from attamba.train.storage import (
    SHARDS,
    TOKENIZER,
    WEIGHTS,
    CheckpointError,
    cannot_save,
    check_unused,
    find_checkpoint,
    remedy,
    seal,
    verify,
)

if TYPE_CHECKING:
    from attamba.data import Tokenizer

MODEL, OPTIMIZER = WEIGHTS, "optimizer.safetensors"
STATE, CONFIG = "state.json", "config.json"

LEAVES_ALONE = "chunk_size, leading_tokens, boundary, ..."
"""Keys of a mixer that no parameter's shape depends on, for messages."""

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
    skips: Mapping[str, Any] | None = None,
    init_weights: str | None = None,
) -> Path:
    """Write <run_dir>/checkpoints/step-<step> and return it.

    model: a Decoder, or what torch.compile made of one; its own config is the one saved.
    optimizer: without it the checkpoint can be loaded, but training cannot resume from it.
    tokens, seconds: spent in training so far.
    data: fingerprints of what it trains on, compared on resume.
    skips: what Guard.state gave of steps that were left out.
    init_weights: fingerprint of train.init_from's weights; compared on resume where that has moved.

    Raises CheckpointError if it cannot be written (the disk is full, ...); nothing of it is left
    then, and older checkpoints are untouched.
    """
    decoder = cast(Decoder, getattr(model, "_orig_mod", model))

    def write(aside: Path) -> None:
        _save_tensors(aside / MODEL, named_tensors(decoder))
        if optimizer is not None:
            _save_tensors(aside / OPTIMIZER, optimizer_tensors(optimizer, decoder))
        save_about(
            aside,
            step=step,
            config=replace(config, model=decoder.config),
            tokenizer=tokenizer,
            device=next(decoder.parameters()).device,
            tokens=tokens,
            seconds=seconds,
            data=data,
            skips=skips,
            init_weights=init_weights,
        )

    return _publish(Path(run_dir), step, write)


def _publish(run_dir: Path, step: int, write: Callable[[Path], None]) -> Path:
    """A new checkpoint of what `write` puts into the folder that it is given; all or nothing."""
    from safetensors import SafetensorError

    folder = run_dir / "checkpoints"
    final = folder / f"step-{step:08d}"
    aside = folder / f".tmp-{final.name}"
    if final.exists():
        raise CheckpointError(f"{final} exists already; delete it or save into another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        write(aside)
        seal(aside, step=step)
        os.rename(aside, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(cannot_save(final, error)) from error
    return final


def save_about(
    folder: Path,
    *,
    step: int,
    config: RunConfig,
    tokenizer: Tokenizer,
    device: torch.device,
    tokens: int = 0,
    seconds: float = 0.0,
    data: Mapping[str, str | None] | None = None,
    skips: Mapping[str, Any] | None = None,
    init_weights: str | None = None,
) -> None:
    """Write what a checkpoint holds beside tensors: state, configuration, tokenizer."""
    state = {
        "step": step,
        "tokens": tokens,
        "seconds": seconds,
        "rng": rng_state(device),
        "tokenizer": tokenizer.fingerprint,
        "data": dict(data or {}),
        "init_weights": init_weights,
    }
    if skips is not None:
        state["skips"] = dict(skips)
    _save_json(folder / STATE, state)
    _save_json(folder / CONFIG, to_dict(config))
    tokenizer.save(folder / TOKENIZER)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def _save_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


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
    dtype: "float32", "bfloat16", "float16" or a torch dtype. Default: as saved, float32 where the
        tensors differ.

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
    why = None
    if overrides:
        keys = ", ".join(f"{key}={value}" for key, value in overrides.items())
        why = (
            f"the override {keys} changes the model's parameters, for which there are no weights; "
            f"override only what leaves them alone ({LEAVES_ALONE})"
        )
    saved = load_weights(model, folder, why)
    return model.to(device=target, dtype=dtype or saved).eval(), tokenizer


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Put a verified checkpoint into a fresh model and optimizer and torch's random state.

    A model that is sharded over ranks takes any checkpoint, on all ranks at once, and so does one
    that is not. Returns state.json's content. Raises CheckpointError for tensors that do not fit,
    and if the checkpoint was saved without an optimizer.
    """
    sharded = (folder / SHARDS).is_dir()
    if not sharded and not (folder / OPTIMIZER).is_file():
        raise CheckpointError(
            f"{folder} was saved without {OPTIMIZER}, so training cannot resume from it; train "
            f"into another `out`"
        )
    try:
        if sharded and any(map(is_spread, model.parameters())):
            from attamba.train.sharded import restore_shards

            restore_shards(folder, model, optimizer)
        else:
            load_weights(model, folder)
            restore_optimizer(optimizer, model, read_tensors(folder, OPTIMIZER))
    except ValueError as error:
        raise CheckpointError(f"the optimizer of {folder} does not fit: {error}") from error
    state = read_state(folder)
    set_rng_state(state["rng"], device)
    return state


def consolidate(path: str | Path, run_dir: str | Path) -> Path:
    """Write a checkpoint, of however many ranks, as one of whole files that says the same.

    path: a run folder (its newest checkpoint) or a checkpoint folder.
    run_dir: the folder to put it in, as <run_dir>/checkpoints/step-<step>; returned. Training with
        this `out` goes on from it.

    Raises CheckpointError for a checkpoint that is damaged, where one cannot be written, and for a
    run_dir that holds a run.
    """
    check_unused(Path(run_dir))
    folder = find_checkpoint(path)
    verify(folder)

    def write(aside: Path) -> None:
        for file in (MODEL, OPTIMIZER):
            if (folder / SHARDS).is_dir() or (folder / file).is_file():
                _save_tensors(aside / file, read_tensors(folder, file))
        for file in (STATE, CONFIG):
            shutil.copy(folder / file, aside / file)
        shutil.copytree(folder / TOKENIZER, aside / TOKENIZER)

    return _publish(Path(run_dir), read_state(folder)["step"], write)


def read_config(folder: Path) -> RunConfig:
    """The RunConfig of a verified checkpoint, or of a run's folder."""
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


def load_weights(model: nn.Module, folder: Path, why: str | None = None) -> torch.dtype | None:
    """Copy model.safetensors into `model`, in place, which keeps its dtype; returns the saved one.

    That is None where tensors differ. A model that is spread over ranks takes its parts, on all
    ranks at once. why: what the message says of a tensor that does not fit. Default: that the
    checkpoint's own files disagree. Raises CheckpointError for a tensor that is missing, left over
    or of another shape.
    """
    saved, wanted = read_tensors(folder, MODEL), named_tensors(model)
    why = why or f"{folder / CONFIG} and {MODEL} are not of one model"
    for name in [*wanted, *(name for name in saved if name not in wanted)]:
        if name not in saved:
            raise CheckpointError(f"tensor {name} is not in {folder / MODEL}: {why}")
        if name not in wanted:
            raise CheckpointError(f"tensor {name} of {folder / MODEL} is not in the model: {why}")
        if saved[name].shape != wanted[name].shape:
            raise CheckpointError(
                f"tensor {name} is {list(saved[name].shape)} in {folder / MODEL} and "
                f"{list(wanted[name].shape)} in the model: {why}"
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(placed_as(tensor, saved[name]))
    dtypes = {tensor.dtype for tensor in saved.values()}
    return dtypes.pop() if len(dtypes) == 1 else None


def check_shapes(given: str, there: ModelConfig, here: ModelConfig) -> None:
    """Raise ConfigError unless the parameters of two models have the same names and shapes, and
    mean the same (WOVEN).

    given: what has those of the first, for the message.
    """
    with torch.device("meta"):
        saved, wanted = (
            {name: list(tensor.shape) for name, tensor in named_tensors(build_model(c)).items()}
            for c in (there, here)
        )
    for name in wanted | saved:
        if saved.get(name) != wanted.get(name):
            raise ConfigError(
                f"{given} has no weights for this model: {name} is "
                f"{saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here; "
                f"change only what leaves the parameters alone ({LEAVES_ALONE})"
            )
    for name, was, now in woven_differences(there, here):
        if name != "ssm_init":  # what weights were before they were trained
            raise ConfigError(
                f"{given} has weights for mixer.{name}={was}, which mean something else with "
                f"mixer.{name}={now}; set mixer.{name}={was}"
            )


def read_tensors(folder: Path, file: str) -> dict[str, Tensor]:
    """All tensors of MODEL or OPTIMIZER, whole and on the CPU, from shards too."""
    if not (folder / SHARDS).is_dir():
        return _load_tensors(folder / file)
    from attamba.train.sharded import read_shards

    return read_shards(folder, "model." if file == MODEL else "optimizer.")


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); {remedy(path.parent)}") from error
