"""The folder of a run: one process at a time, one configuration for its whole life.

<out>/config.json, metrics.jsonl, checkpoints/ (see checkpoint.py), data/ (text prepared on the
fly); as they are asked for tensorboard/, profile/, tracking.json (name of the run in wandb and
trackio), eval.jsonl and eval.log (see follow.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba.config import ConfigError, RunConfig, to_dict
from attamba.data import is_prepared
from attamba.data.files import hold, write_json
from attamba.train.checkpoint import OPTIMIZER, check_shapes, read_config, read_state
from attamba.train.storage import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    remove_leftovers,
    set_aside,
    verify,
    weights_digest,
)

if TYPE_CHECKING:
    from attamba.train.distributed import Ranks

FREE = frozenset(
    {
        "out",
        "train.device",
        "train.keep",
        "train.log_every",
        "train.eval_every",
        "train.save_every",
        "train.progress",
        "train.tensorboard",
        "eval.tasks",
        "eval.every",
        "eval.limit",
        "eval.mode",
        "eval.device",
        "spikes.max_in_a_row",
        "spikes.max_skipped",
        "data.verify",
        "train.accumulate",
        "train.cuda_graphs",
        "parallel.replicate",
        "parallel.shard",
        "parallel.tensor",
        "parallel.context",
        "parallel.activation_checkpointing",
        "parallel.hang_timeout",
    }
)
"""Keys that may change on resume: no weight depends on them, but for the order of sums, or before
training ends."""


def is_free(key: str) -> bool:
    """May this key change on resume?"""
    return key in FREE or key.partition(".")[0] in ("metrics", "profile")


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process, making it if need be.

    The system drops the lock when the process ends, however it ends. Raises ConfigError if another
    process holds it, or `out` cannot be a folder.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"out={run_dir} is, or is below, a file that is no folder; set another out"
        ) from error
    with hold(run_dir / ".lock") as is_held:
        if not is_held:
            raise ConfigError(
                f"out={run_dir}: another process is training in this folder; wait for it, stop "
                f"it, or set another out"
            )
        yield


STATUS = "status.json"


@contextmanager
def told_status(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Keep <run_dir>/status.json while entered: {"state": ...}, for those who look from outside.

    training (also where the process was killed), then done, diverged, stopped (the same command
    goes on) or failed.
    """
    from attamba.train.interrupt import TrainingInterrupted
    from attamba.train.run import TrainingDiverged

    def tell(state: str) -> None:
        if ranks.is_main:
            write_json(run_dir / STATUS, {"state": state})

    tell("training")
    try:
        yield
    except TrainingDiverged:
        tell("diverged")
        raise
    except TrainingInterrupted:
        tell("stopped")
        raise
    except BaseException:
        tell("failed")
        raise
    tell("done")


def open_run_folder(
    run_dir: Path,
    config: RunConfig,
    ranks: Ranks,
    *,
    resume: bool,
    say: Callable[[str], None],
) -> Path | None:
    """Tidy the folder and return the checkpoint to go on from, if any.

    The newest one that is whole: a damaged one is told to `say` and renamed. All ranks call this,
    rank 0 alone changes the folder, and they share the work of verifying. Raises ConfigError if
    there is a checkpoint and resume is false, or it is of another configuration; CheckpointError
    if none is whole.
    """
    checkpoints = ranks.on_main(lambda: _tidy(run_dir, resume))
    newest = _newest_whole(checkpoints, ranks, say)
    if newest is not None:
        ranks.on_main(lambda: _check_same(newest, config, run_dir))
    return newest


def _tidy(run_dir: Path, resume: bool) -> list[Path]:
    remove_leftovers(run_dir)
    checkpoints = list_checkpoints(run_dir)
    if checkpoints and not resume:
        raise ConfigError(
            f"out={run_dir} already holds a run and resume is off; set another out, or delete "
            f"the folder"
        )
    return checkpoints


def _newest_whole(checkpoints: list[Path], ranks: Ranks, say: Callable[[str], None]) -> Path | None:
    """The last checkpoint that its checksums hold for; raises the newest one's error if none is."""
    damaged: dict[Path, CheckpointError] = {}
    for checkpoint in reversed(checkpoints):
        try:
            ranks.on_each(partial(verify, checkpoint, part=(ranks.rank, ranks.size)))
        except CheckpointError as error:
            damaged[checkpoint] = error
            continue
        for path, why in damaged.items():
            aside = ranks.on_main(partial(set_aside, path))
            say(f"{why}. It is {aside} now, and the run goes on from {checkpoint.name}")
        return checkpoint
    if damaged:
        raise damaged[checkpoints[-1]]
    return None


def find_given(config: RunConfig, ranks: Ranks) -> Path | None:
    """The checkpoint that train.init_from means, verified by all ranks together; None without one.

    Raises CheckpointError where there is none, or it is damaged, ConfigError where it is of a model
    of other shapes.
    """
    path = config.train.init_from
    if path is None:
        return None
    part = (ranks.rank, ranks.size)
    try:
        found = ranks.on_main(lambda: find_checkpoint(path))
        ranks.on_each(partial(verify, found, leave_out=(OPTIMIZER,), part=part))
    except CheckpointError as error:
        told = CheckpointError(f"train.init_from={path}: {error}")
        told.is_echo = getattr(error, "is_echo", False)  # type: ignore[attr-defined]
        raise told from error
    given = f"train.init_from={path}"
    ranks.on_each(lambda: check_shapes(given, read_config(found).model, config.model))
    return found


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Keep what the run goes on with; others read it, so nothing that is refused comes here."""
    write_json(run_dir / "config.json", to_dict(config))


def check_same_data(
    saved: Mapping[str, str | None], now: Mapping[str, str | None], run_dir: Path
) -> None:
    """Raise ConfigError if the fingerprints of the data are not those of the checkpoint."""
    if saved.get("tokenizer") != now["tokenizer"]:
        raise ConfigError(
            f"tokenizer and checkpoint do not match: the data was made with another tokenizer than "
            f"the run in {run_dir}; {_remedy(run_dir)}"
        )
    changed = [f"data.{key}" for key in ("train", "valid") if saved.get(key) != now[key]]
    if changed:
        raise ConfigError(
            f"{' and '.join(changed)}: the tokens are not those that the run in {run_dir} was "
            f"trained on, so it cannot go on; {_remedy(run_dir)}"
        )


def _check_same(checkpoint: Path, config: RunConfig, run_dir: Path) -> None:
    there, here = dotted(to_dict(read_config(checkpoint))), dotted(to_dict(config))
    differing = [
        f"  {key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not _may_change(key, here.get(key), checkpoint)
    ]
    if differing:
        lines = "\n".join(differing)
        raise ConfigError(
            f"out={run_dir} holds a run of another configuration, which cannot go on with this "
            f"one:\n{lines}\nPut these back, or {_remedy(run_dir)}"
        )


def _may_change(key: str, value: Any, checkpoint: Path) -> bool:
    # A prepared folder may move: its content is compared by fingerprint (check_same_data).
    is_path = re.fullmatch(r"data\.(train|valid|sources\.\d+\.path)", key)
    moved = is_path and isinstance(value, str) and is_prepared(value)
    if key == "train.init_from":
        moved = value is not None and _began_with(checkpoint, value)
    return is_free(key) or bool(moved)


def _began_with(checkpoint: Path, path: str) -> bool:
    """Are the weights at `path` those that the checkpoint's run began with?"""
    try:
        return weights_digest(find_checkpoint(path)) == read_state(checkpoint).get("init_weights")
    except CheckpointError:
        return False


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries, and lists of them (mixers), as dotted keys."""
    if isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        tree = {str(i): value for i, value in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(dotted(value, f"{prefix}.{key}" if prefix else key))
    return flat


def _remedy(run_dir: Path) -> str:
    return f"set another out, or delete {run_dir} to start afresh"
