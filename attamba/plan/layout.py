"""How ranks share a run: copies, shards, parts of a layer, parts of a row."""

from __future__ import annotations

from dataclasses import dataclass

from attamba.config import ConfigError, RunConfig
from attamba.models.parts import check_parts


@dataclass(frozen=True)
class Layout:
    """One step's work, as it falls on each rank. Made by make_layout."""

    replicate: int
    """Copies of the model."""
    shard: int
    """Groups of a copy that have rows of their own."""
    tensor: int
    """Ranks that share the heads and inner widths of a layer."""
    context: int
    """Ranks that share the tokens of a row."""
    rows: int
    """Rows of a rank's forward pass, of which it holds 1/context."""
    passes: int
    """Forward and backward passes of a step: train.accumulate."""
    seq_len: int
    """T, tokens of a whole row."""

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.tensor * self.context

    @property
    def holders(self) -> int:
        """Ranks over which weights, gradients and optimizer state are sharded.

        Those that share a row are among them, as in torchtitan's ParallelDims: they need the same
        weights, and nobody else holds a part of them.
        """
        return self.shard * self.context

    @property
    def tokens(self) -> float:
        """Tokens of a rank's forward pass."""
        return self.rows * self.seq_len / self.context


def make_layout(
    config: RunConfig,
    ranks: int | None = None,
    tensor: int | None = None,
    context: int | None = None,
) -> Layout:
    """The layout of a configuration on `ranks` ranks.

    ranks: default: as many as config.parallel names (parallel.shard=-1 counts as 1).
    tensor, context: default: those of config.parallel.

    Raises ConfigError where they do not divide each other, the rows, the tokens or the heads.
    """
    parallel = config.parallel
    tensor = parallel.tensor if tensor is None else tensor
    context = parallel.context if context is None else context
    for name, value in (("ranks", ranks), ("tensor", tensor), ("context", context)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}={value} must be at least 1")
    others = parallel.replicate * tensor * context
    shard = parallel.shard
    if shard == -1:
        shard = 1 if ranks is None else max(1, ranks // others)
    if ranks is not None and others * shard != ranks:
        raise ConfigError(
            f"replicate={parallel.replicate}, shard={parallel.shard}, tensor={tensor} and "
            f"context={context} make {others * shard} ranks, not --ranks={ranks}; set "
            f"parallel.shard=-1 and --ranks to a multiple of {others}"
        )
    check_parts(config.model, config.data.seq_len, context=context, tensor=tensor)
    parts = parallel.replicate * shard * config.train.accumulate
    if config.data.batch_size % parts:
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} rows cannot be divided among "
            f"{parallel.replicate * shard} ranks in train.accumulate={config.train.accumulate} "
            f"parts each; make it a multiple of {parts}"
        )
    rows = config.data.batch_size // parts
    return Layout(
        replicate=parallel.replicate,
        shard=shard,
        tensor=tensor,
        context=context,
        rows=rows,
        passes=config.train.accumulate,
        seq_len=config.data.seq_len,
    )
