"""Checkpoints as folders that transformers reads, and back, bit by bit.

<folder>/
    config.json, generation_config.json, model.safetensors (or shards and their index)
    tokenizer.json, tokenizer_config.json    the tokenizer as transformers reads it
    README.md                                model card
    *.py                                     with remote_code: the model's code
    native/tokenizer/                        what Tokenizer.save wrote
    native/training.json                     RunConfig, step, tokens, seconds, fingerprints;
                                             SHA-256 of config and weights
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from attamba.config import ConfigError, RunConfig, from_dict, to_dict
from attamba.data import Tokenizer, load_tokenizer
from attamba.data.files import check_new_folder, sha256
from attamba.hf.card import model_card
from attamba.hf.configuration import AttambaConfig
from attamba.hf.modeling import AttambaForCausalLM
from attamba.hf.remote_code import write_remote_code
from attamba.hf.tokenizer import save_for_transformers
from attamba.train.checkpoint import load, read_config, read_state, save_checkpoint
from attamba.train.storage import CheckpointError, check_unused, find_checkpoint

NATIVE, TRAINING = "native", "training.json"


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    evals: Sequence[str | Path] = (),
    max_shard_size: str = "5GB",
    remote_code: bool = False,
) -> Path:
    """Write a checkpoint as a folder for transformers and return it; weights keep their dtype.

    checkpoint: a run folder (its newest checkpoint) or a checkpoint folder.
    out: a folder that does not exist yet, or is empty.
    evals: files of `attamba eval --json`, on text or tasks, whose scores go into the model card.
    max_shard_size: of a weight file.
    remote_code: put the model's code into the folder, for machines without this package.

    Raises ConfigError for an `out` in use, a size that is none and an unusable eval file,
    CheckpointError as load does, DataError for a tokenizer that transformers cannot reproduce.
    """
    out = Path(out)
    check_new_folder(out)
    _check_size(max_shard_size)
    folder = find_checkpoint(checkpoint)
    decoder, tokenizer = load(folder)
    model = AttambaForCausalLM.from_decoder(decoder, **_special_ids(tokenizer))
    unknown = list(range(tokenizer.vocab_size, decoder.config.vocab_size))
    model.generation_config = GenerationConfig(
        **_special_ids(tokenizer), suppress_tokens=unknown or None
    )
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        if remote_code:
            model.config.auto_map = write_remote_code(aside)
        model.save_pretrained(aside, max_shard_size=max_shard_size)
        native = aside / NATIVE
        tokenizer.save(native / "tokenizer")
        save_for_transformers(tokenizer, native / "tokenizer", aside)
        card = model_card(folder, decoder, tokenizer, evals, remote_code)
        (aside / "README.md").write_text(card, encoding="utf-8")
        _write_training(native / TRAINING, folder, aside)
        if out.exists():
            out.rmdir()
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def import_folder(
    folder: str | Path, run_dir: str | Path, *, tokenizer: str | Path | None = None
) -> Path:
    """Write a transformers folder of this architecture as a checkpoint of `run_dir`; return it.

    tokenizer: as attamba.data.load_tokenizer takes it. Default: the folder's own.

    Config, step and tokenizer are those of the checkpoint that the folder was exported from; a
    folder that another program saved has step 0 and a default RunConfig around its model. The
    optimizer's state does not come along.

    Raises ConfigError for a folder of another architecture or without a config, CheckpointError
    for weights that are missing or altered, for a tokenizer that does not fit, and for a run_dir
    that holds a run.
    """
    folder = Path(folder)
    check_unused(Path(run_dir))
    _check_architecture(folder)
    training = _read_training(folder)
    model = _load(folder)
    config = from_dict(RunConfig, training["config"]) if training else RunConfig()
    own = _tokenizer(folder, tokenizer, training)
    if own.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"tokenizer and weights do not match: the tokenizer has {own.vocab_size} entries, "
            f"vocab_size in {folder / 'config.json'} is {model.config.vocab_size}; give the "
            f"tokenizer that the model was trained with"
        )
    return save_checkpoint(
        run_dir,
        step=training.get("step", 0),
        model=model.decoder,
        config=config,
        tokenizer=own,
        tokens=training.get("tokens", 0),
        seconds=training.get("seconds", 0.0),
        data=training.get("data"),
    )


def check_folder(folder: Path) -> None:
    """Raise ConfigError or CheckpointError for what would fail once `folder` is served.

    Weights or a config that are missing or were altered since the export, no tokenizer, and one
    with more tokens than the model knows.
    """
    _read_training(folder)
    config = AttambaConfig.from_pretrained(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind: the library does not check what it reads
        raise ConfigError(
            f"{folder} holds no tokenizer that can be read (tokenizer.json, "
            f"tokenizer_config.json: {error!r}); export the model again"
        ) from error
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"tokenizer and weights do not match: {folder / 'tokenizer.json'} has "
            f"{len(tokenizer)} entries, vocab_size in {folder / 'config.json'} is "
            f"{config.vocab_size}; put back the tokenizer that the model was trained with"
        )


def _check_size(text: str) -> None:
    if not re.fullmatch(r"[1-9]\d*\s*[KMGT]B", text, re.IGNORECASE):
        raise ConfigError(f"max_shard_size={text} is not a size; say it as 500MB or 5GB")


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {f"{name}_token_id": tokenizer.eos_id for name in ("bos", "eos", "pad")}


def _write_training(path: Path, checkpoint: Path, exported: Path) -> None:
    state = read_state(checkpoint)
    files = [exported / "config.json", *sorted(exported.glob("*.safetensors*"))]
    training = {
        "config": to_dict(read_config(checkpoint)),
        **{key: state[key] for key in ("step", "tokens", "seconds", "data", "tokenizer")},
        "sha256": {file.name: sha256(file) for file in files},
    }
    path.write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")


def _read_training(folder: Path) -> dict[str, Any]:
    """training.json of an exported folder, {} of one from elsewhere; the weights are compared."""
    path = folder / NATIVE / TRAINING
    if not path.is_file():
        return {}
    try:
        training = json.loads(path.read_text(encoding="utf-8"))
        digests = dict(training["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); export the model again") from error
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; export the model again")
        if sha256(file) != digest:
            raise CheckpointError(
                f"{file} was altered after the export; export the model again. If the change is "
                f"meant, delete {folder / NATIVE}, which holds the record"
            )
    return training


def _check_architecture(folder: Path) -> None:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} holds no config.json; give a folder that `attamba export` or "
            f"save_pretrained wrote (of an adapter: merge it into its model first)"
        ) from error
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if found != "attamba":
        raise ConfigError(
            f"{path} is of the architecture {found!r}, not 'attamba'; give a folder that "
            f"`attamba export` wrote"
        )


def _load(folder: Path) -> AttambaForCausalLM:
    from safetensors import SafetensorError

    try:
        return AttambaForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except ConfigError:
        raise
    except (ValueError, OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"the weights of {folder} cannot be read: {error}") from error


def _tokenizer(folder: Path, given: str | Path | None, training: dict[str, Any]) -> Tokenizer:
    if given is not None:
        found = load_tokenizer(given)
    elif (folder / NATIVE / "tokenizer").is_dir():
        found = load_tokenizer(folder / NATIVE / "tokenizer")
    elif (folder / "tokenizer.json").is_file():
        found = load_tokenizer(folder / "tokenizer.json")
    else:
        raise ConfigError(f"{folder} holds no tokenizer; give one with --tokenizer")
    if training and found.fingerprint != training["tokenizer"]:
        raise CheckpointError(
            f"tokenizer and weights do not match: {given or folder} has fingerprint "
            f"{found.fingerprint[:12]}, the model was trained with {training['tokenizer'][:12]}"
        )
    return found
