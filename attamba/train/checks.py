"""What is wrong with a run wherever it is started, seen before anything is done for it."""

from __future__ import annotations

import torch

from attamba.config import AttambaMixer, ConfigError, RunConfig
from attamba.data.generated import GeneratedRows, make_task
from attamba.models import build_model
from attamba.train.distributed import check_ranks


def check_run(config: RunConfig, n_ranks: int) -> None:
    """Raise ConfigError for what cannot be trained on so many ranks, whatever the machine.

    Before texts are prepared, and before a job waits in a queue.
    """
    config.validate()
    check_ranks(config, n_ranks)
    _check_model(config)
    _check_data(config)
    if n_ranks > 1:
        _check_shared(config, n_ranks)


def _check_model(config: RunConfig) -> None:
    for mixer in config.model.layer_mixers():
        if isinstance(mixer, AttambaMixer) and mixer.policy == "given":
            raise ConfigError(
                "mixer.boundary=given takes chunk ends from whoever calls the model, and training "
                "has none to give; set another, e.g. mixer.boundary=cyclic"
            )
    try:
        with torch.device("meta"):
            build_model(config.model)
    except ValueError as error:  # of a boundary's options, too, which the policies know
        raise ConfigError(str(error)) from error


def _check_data(config: RunConfig) -> None:
    data = config.data
    if data.generate is None:
        if not (data.train or data.sources):
            raise ConfigError(
                "data.train is not set; give text files or folders, or a folder made by "
                "`attamba data prepare`"
            )
        return
    task = make_task(data.generate)
    if task.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than what data.generate needs; "
            f"set model.vocab_size={task.vocab_size} or more"
        )
    GeneratedRows(task, data.seq_len, 1, config.train.seed).batch(0)  # is seq_len enough?


def _check_shared(config: RunConfig, n_ranks: int) -> None:
    """What several ranks cannot have."""
    if config.eval.tasks and config.eval.mode == "inline":
        names = config.eval.tasks
        raise ConfigError(
            f"eval.tasks={names} are scored by one process, and there are {n_ranks} ranks; "
            f"set eval.mode=process, or leave them out and score checkpoints: "
            f"attamba eval --tasks {','.join(names)}"
        )
    if config.train.cuda_graphs:
        raise ConfigError(
            f"train.cuda_graphs=true is for one process, and there are {n_ranks} ranks, which "
            f"gather parameters in between; set train.cuda_graphs=false"
        )
    if ":" in config.train.device:
        raise ConfigError(
            f"train.device={config.train.device!r} names one device for all ranks; set "
            f"train.device=auto"
        )
