"""Run configuration: dataclass defaults < YAML file < ``key=value`` arguments.

This module knows names, types and ranges, those of the mixers from ``attamba.mixers``; it imports
no model code. What a boundary policy's options mean is known by ``attamba.ops.chunking`` alone and
is checked when a model is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from attamba.mixers import MIXERS, AttambaMixer, ConfigError, Mixer, TransformerMixer
from attamba.mixers import at_least as _at_least
from attamba.monitoring import EvalConfig, MetricsConfig, ProfileConfig, SpikesConfig
from attamba.parsing import (
    did_you_mean,
    from_dict,
    parse_mixer,
    parse_overrides,
    read_tree,
    set_key,
    to_dict,
    unknown_key,
)

__all__ = [
    "MIXERS",
    "AttambaMixer",
    "ConfigError",
    "DataConfig",
    "DataSource",
    "EvalConfig",
    "MetricsConfig",
    "Mixer",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RunConfig",
    "SpikesConfig",
    "TrainConfig",
    "TransformerMixer",
    "apply_overrides",
    "did_you_mean",
    "from_dict",
    "load_run_config",
    "override_model",
    "parse_overrides",
    "read_tree",
    "to_dict",
]


@dataclass(kw_only=True)
class ModelConfig:
    """A decoder-only language model. Raises ConfigError where fields do not fit together."""

    vocab_size: int = 256
    """V, tokens."""
    dim: int = 512
    """d, model width."""
    n_layers: int = 8
    """n, layers."""
    ffn_dim: int | None = None
    """Inner width of SwiGLU. Default: 3 * dim."""
    mixer: Mixer | list[Mixer] = field(default_factory=AttambaMixer)
    """One mixer for all layers, or a list that is cycled over them (a hybrid)."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Share the input embedding with the output head."""

    def __post_init__(self) -> None:
        if isinstance(self.mixer, (list, tuple)):
            if not self.mixer:
                raise ConfigError("mixer=[] is empty; give one mixer or a list of at least one")
            self.mixer = [parse_mixer(m, f"mixer.{i}") for i, m in enumerate(self.mixer)]
        else:
            self.mixer = parse_mixer(self.mixer, "mixer")
        self.validate()

    def validate(self) -> None:
        for name in ("vocab_size", "dim", "n_layers"):
            _at_least(getattr(self, name), 1, name)
        if self.ffn_dim is not None:
            _at_least(self.ffn_dim, 1, "ffn_dim")
        if not self.rope_theta > 0:
            raise ConfigError(f"rope_theta={self.rope_theta} must be above 0")
        if self.norm_eps < 0:
            raise ConfigError(f"norm_eps={self.norm_eps} must not be negative")
        if isinstance(self.mixer, list):
            for i, mixer in enumerate(self.mixer):
                mixer.validate(self.dim, f"mixer.{i}")
        else:
            self.mixer.validate(self.dim, "mixer")

    def layer_mixers(self) -> list[Mixer]:
        """The mixer of each layer, n_layers of them."""
        mixers = self.mixer if isinstance(self.mixer, list) else [self.mixer]
        return [mixers[i % len(mixers)] for i in range(self.n_layers)]


@dataclass(kw_only=True)
class DataSource:
    """One of several texts to train on."""

    path: str | list[str] = ""
    """As data.train."""
    weight: float = 1.0
    """Its share of the tokens trained on, over the sum of all weights."""


@dataclass(kw_only=True)
class DataConfig:
    """What is trained and validated on."""

    train: str | list[str] = ""
    """A folder made by `attamba data prepare`, or the URL of one (s3://...), or text files and
    folders (prepared on the fly)."""
    sources: list[DataSource] = field(default_factory=list)
    """Several texts by weight, instead of train: [{path: data/web, weight: 3}, {path: data/code}].
    One that is used up begins anew."""
    generate: dict[str, Any] | None = None
    """A task to make rows of instead of text: {"type": "recall", ...}; see data.generated."""
    valid: str | list[str] | None = None
    """As train. Default: the last valid_fraction of the training tokens is held out."""
    valid_fraction: float = 0.02
    """Share held out where valid is not given, of each source; 0 for none."""
    verify: bool = False
    """Compare the checksums of prepared folders before the first step; each file is read."""
    tokenizer: str = "bytes"
    """For text: bytes, a tokenizer.json, or a SentencePiece .model."""
    seq_len: int = 1024
    """T, tokens per row."""
    batch_size: int = 16
    """Rows per optimizer step, over all accumulation steps."""
    packing: Literal["stream", "best_fit"] = "stream"
    """What a row is. stream: T tokens of all documents end to end, so that rows tear documents.
    best_fit: whole documents that fill it up best (arXiv 2404.10830); only longer ones are cut."""
    doc_mask: bool = True
    """Cross-document masking: documents packed into one row do not see each other."""

    def validate(self) -> None:
        _at_least(self.seq_len, 1, "data.seq_len")
        _at_least(self.batch_size, 1, "data.batch_size")
        if not 0 <= self.valid_fraction < 1:
            raise ConfigError(f"data.valid_fraction={self.valid_fraction} must be in [0, 1)")
        if self.train and self.sources:
            raise ConfigError(
                f"data.train={self.train} and data.sources both say what to train on; put all into "
                f"data.sources, or leave it out"
            )
        for i, source in enumerate(self.sources):
            if not source.path:
                raise ConfigError(f"data.sources.{i}.path is not set; name what to train on")
            if not source.weight > 0:
                raise ConfigError(
                    f"data.sources.{i}.weight={source.weight} must be above 0; leave a source out "
                    f"that is not to be trained on"
                )
        if self.generate is not None:
            self._check_generated()

    def _check_generated(self) -> None:
        for name, default in (("train", ""), ("valid", None), ("sources", [])):
            if getattr(self, name) != default:
                raise ConfigError(
                    f"data.generate={self.generate} makes its own rows, so data.train, data.valid "
                    f"and data.sources would have no effect; give one or the other"
                )
        if self.packing != "stream" or self.verify:
            raise ConfigError(
                f"data.generate={self.generate} makes its own rows, so data.packing and "
                f"data.verify would have no effect; leave them out"
            )

    def training_paths(self) -> list[str | list[str]]:
        """What is trained on: of each source, or data.train."""
        return [source.path for source in self.sources] or [self.train]


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 3e-3
    """Peak learning rate."""
    min_lr_ratio: float = 1e-6
    """Final learning rate over the peak."""
    warmup_steps: int = 200
    """Steps of linear warm-up."""
    weight_decay: float = 0.033
    """On matrices; none on vectors and embeddings' gains."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the moments."""
    eps: float = 1e-8
    """Denominator's epsilon."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 for no clipping."""

    def validate(self) -> None:
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be above 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers in [0, 1)")
        _at_least(self.warmup_steps, 0, "optim.warmup_steps")
        for name in ("weight_decay", "grad_clip", "min_lr_ratio"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must not be negative")


@dataclass(kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Optimizer steps."""
    accumulate: int = 1
    """Forward/backward passes per step; divides data.batch_size."""
    seed: int = 0
    """Initial weights (without train.init_from), data order, random boundaries."""
    init_from: str | None = None
    """Run folder (its newest checkpoint) or checkpoint whose weights training begins with; steps,
    optimizer and data begin anew. The model must have parameters of the same names and shapes, and
    the data its tokenizer. Default: random weights."""
    device: str = "auto"
    """auto (CUDA if there is one, else CPU), cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast; weights and optimizer stay float32."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """The layers' linear maps in float8 while training, with one scale per tensor (faster) or per
    row (more accurate); see docs/train.md. Needs train.dtype=bfloat16, torchao, and a CUDA device
    of compute capability 8.9 or higher."""
    compile: bool = False
    """torch.compile the model."""
    cuda_graphs: bool = False
    """Replay passes from CUDA graphs, for models so small that the host cannot launch their kernels
    as fast as a GPU runs them. The same numbers; what a pass holds keeps its memory. Needs a CUDA
    device and one process."""
    chunk_sizes: list[int] | None = None
    """P of each step, drawn from these: one model for many P. Default: the mixer's own."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    eval_every: int = 250
    """Steps between validations; 0 for none but the last."""
    eval_rows: int = 64
    """Rows of seq_len per validation; the same ones each time."""
    save_every: int = 500
    """Steps between checkpoints; 0 for none but the last."""
    keep: int = 2
    """Checkpoints kept."""
    tensorboard: bool = False
    """Short for tensorboard in metrics.sinks."""
    progress: bool = True
    """Show a live bar with loss, tokens/s and time left (lines where there is no terminal)."""

    def validate(self) -> None:
        for name in ("steps", "accumulate", "log_every", "eval_rows", "keep"):
            _at_least(getattr(self, name), 1, f"train.{name}")
        for name in ("eval_every", "save_every", "seed"):
            _at_least(getattr(self, name), 0, f"train.{name}")
        if self.seed >= 1 << 63:
            raise ConfigError(f"train.seed={self.seed} must be below 2^63")
        if self.init_from == "":
            raise ConfigError(
                "train.init_from is empty; name a run folder or a checkpoint, or leave it out for "
                "random weights"
            )
        if self.chunk_sizes is not None:
            if not self.chunk_sizes:
                raise ConfigError("train.chunk_sizes=[] is empty; name one size, or leave it out")
            for size in self.chunk_sizes:
                _at_least(size, 1, "train.chunk_sizes")


@dataclass(kw_only=True)
class ParallelConfig:
    """How the ranks that torchrun starts share the work, and what each keeps in memory.

    The product of replicate, shard, context and tensor is the number of ranks.
    """

    replicate: int = 1
    """Copies of the model, each with rows of its own."""
    shard: int = -1
    """Ranks that share the parameters, gradients and optimizer of a copy; -1: all that are left."""
    tensor: int = 1
    """Ranks that share the heads and inner widths of a layer; see docs/scaling-out.md."""
    context: int = 1
    """Ranks that share the tokens of a row: each has data.seq_len / context of them."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes anew: nothing, all of a layer but its matrix products, or
    whole layers."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters that ranks send each other. bfloat16 halves the traffic and rounds gains
    and decay rates too; it needs train.dtype=bfloat16."""
    hang_timeout: float = 600.0
    """Seconds without progress in the loop after which a run on several ranks names the one that
    hangs, and ends. Compiling counts, and waiting for a checkpoint. Before the loop it is the
    seconds in which a rank does not answer at all."""

    def validate(self) -> None:
        for name in ("replicate", "tensor", "context"):
            _at_least(getattr(self, name), 1, f"parallel.{name}")
        if self.shard != -1:
            _at_least(self.shard, 1, "parallel.shard", "; -1 means all ranks that are left")
        if not 0 < self.hang_timeout <= 1e6:
            raise ConfigError(
                f"parallel.hang_timeout={self.hang_timeout} must be above 0 and at most 1e6 seconds"
            )


@dataclass(kw_only=True)
class RunConfig:
    """Everything that `attamba train` needs."""

    out: str = "runs/first"
    """Folder of the run: config, metrics, checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    profile: bool | ProfileConfig = False
    """Write a trace of a few steps, and on CUDA a snapshot of the memory, into `profile`. A
    dictionary says which: wait (default 10) steps before them, and how many steps (default 3)."""

    SHORTCUTS: ClassVar[dict[str, str]] = {"mixer": "model.mixer"}
    """First parts of keys that may be written without their section."""

    def validate(self) -> None:
        if not self.out:
            raise ConfigError("out is empty; name the folder of the run, e.g. out=runs/mine")
        self.model.validate()
        self.data.validate()
        self.optim.validate()
        self.train.validate()
        self.eval.validate()
        self.parallel.validate()
        self.metrics.validate()
        self.spikes.validate()
        if isinstance(self.profile, ProfileConfig):
            self.profile.validate()
        if self.parallel.gather_dtype == "bfloat16" and self.train.dtype != "bfloat16":
            raise ConfigError(
                f"parallel.gather_dtype=bfloat16 needs train.dtype=bfloat16, not "
                f"{self.train.dtype}; set both, or leave it out"
            )
        if self.train.float8 != "none" and self.train.dtype != "bfloat16":
            raise ConfigError(
                f"train.float8={self.train.float8} needs train.dtype=bfloat16, for all else, not "
                f"{self.train.dtype}; set both, or leave it out"
            )
        if self.data.batch_size % self.train.accumulate:
            raise ConfigError(
                f"train.accumulate={self.train.accumulate} does not divide "
                f"data.batch_size={self.data.batch_size}"
            )
        if self.train.chunk_sizes is not None:
            _check_chunk_sizes(self.train.chunk_sizes, self.model.layer_mixers())


def load_run_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then the YAML file at `path`, then `overrides` ("optim.lr=1e-3").

    Raises ConfigError for an unknown key (naming the nearest), a value of the wrong type, or
    fields that do not fit together; FileNotFoundError for a missing file.
    """
    tree = {} if path is None else read_tree(path)
    config = from_dict(RunConfig, apply_overrides(tree, parse_overrides(overrides)))
    config.validate()
    return config


def apply_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`tree` with dotted keys set. A key below a list of mixers goes to each that has the field."""
    tree = deepcopy(tree)
    for key, value in overrides.items():
        head, _, rest = key.partition(".")
        path = (RunConfig.SHORTCUTS.get(head, head) + ("." + rest if rest else "")).split(".")
        set_key(tree, path, value, key)
    return tree


def override_model(config: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    """`config`, which weights were trained for, with dotted keys set: "mixer.chunk_size", ...

    Raises ConfigError for unknown keys and for those of WOVEN.
    """
    tree = apply_overrides({"model": to_dict(config)}, overrides)
    others = sorted(set(tree) - {"model"})
    if others:
        unknown_key(others[0], ["model", "mixer"])
    changed = from_dict(ModelConfig, tree["model"], "model")
    for name, was, now in woven_differences(config, changed):
        raise ConfigError(
            f"mixer.{name}={now} cannot be set on trained weights, which were made for {was}; "
            f"train a model with it instead"
        )
    return changed


WOVEN = ("n_heads", "ssm_heads", "n_blocks", "ssm_init")
"""Fields of mixers by which weights of the same shapes mean something else, or began as such."""


def woven_differences(there: ModelConfig, here: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Names of WOVEN fields that a layer of two models has otherwise, with both values."""
    pairs = [
        (name, getattr(old, name, None), getattr(new, name, None))
        for old, new in zip(there.layer_mixers(), here.layer_mixers())
        for name in WOVEN
    ]
    return [(name, was, now) for name, was, now in pairs if None not in (was, now) and was != now]


def _check_chunk_sizes(sizes: list[int], mixers: list[Mixer]) -> None:
    """train.chunk_sizes must have an effect in every layer that has chunks."""
    chunked = [mixer for mixer in mixers if isinstance(mixer, AttambaMixer)]
    if not chunked:
        raise ConfigError(
            f"train.chunk_sizes={sizes} needs a mixer with chunks, of type attamba; leave it out"
        )
    for mixer in chunked:
        if mixer.policy in ("separator", "given"):
            raise ConfigError(
                f"train.chunk_sizes={sizes} has no effect on boundary={mixer.policy}, whose chunks "
                f"follow the text; set mixer.boundary=cyclic, or leave it out"
            )
