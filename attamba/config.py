"""Run configuration: dataclass defaults < YAML file < ``key=value`` arguments.

This module knows names, types and ranges, those of the mixers from ``attamba.mixers``; it imports
no model code. What a boundary policy's options mean is known by ``attamba.ops.chunking`` alone and
is checked when a model is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union

from attamba.mixers import MIXERS, AttambaMixer, ConfigError, Mixer, TransformerMixer
from attamba.mixers import at_least as _at_least
from attamba.monitoring import EvalConfig, MetricsConfig, ProfileConfig, SpikesConfig

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
    "from_dict",
    "load_run_config",
    "override_model",
    "parse_overrides",
    "read_tree",
    "to_dict",
]

# --------------------------------------------------------------------------------------------
# Model, data, optimisation, run
# --------------------------------------------------------------------------------------------


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
            self.mixer = [_mixer(m, f"mixer.{i}") for i, m in enumerate(self.mixer)]
        else:
            self.mixer = _mixer(self.mixer, "mixer")
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
        if not self.lr > 0:
            raise ConfigError(f"optim.lr={self.lr} must be above 0")
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
    """Initial weights, data order, random boundaries."""
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
    hangs, and ends. Compiling counts, and waiting for a checkpoint."""

    def validate(self) -> None:
        for name in ("replicate", "tensor", "context"):
            _at_least(getattr(self, name), 1, f"parallel.{name}")
        if self.shard != -1:
            _at_least(self.shard, 1, "parallel.shard", "; -1 means all ranks that are left")
        if not self.hang_timeout > 0:
            raise ConfigError(f"parallel.hang_timeout={self.hang_timeout} must be above 0")


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


# --------------------------------------------------------------------------------------------
# Reading and writing
# --------------------------------------------------------------------------------------------

T = TypeVar("T")


def load_run_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then the YAML file at `path`, then `overrides` ("optim.lr=1e-3").

    Raises ConfigError for an unknown key (naming the nearest), a value of the wrong type, or
    fields that do not fit together; FileNotFoundError for a missing file.
    """
    tree = {} if path is None else read_tree(path)
    config = from_dict(RunConfig, apply_overrides(tree, parse_overrides(overrides)))
    config.validate()
    return config


def read_tree(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, or of a .json one, for which pyyaml is not needed.

    Raises ConfigError for what is neither; FileNotFoundError for a missing file.
    """
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".json":
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
    else:
        yaml = _yaml()
        try:
            tree = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(tree).__name__}")
    return tree


def _yaml() -> types.ModuleType:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError(
            "pyyaml is not installed; it comes with: pip install 'attamba[train]'"
        ) from error
    return yaml


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """["a.b=1", "c=[x]"] -> {"a.b": 1, "c": ["x"]}; values are read as YAML.

    Raises ConfigError for an argument without "=".
    """
    if not arguments:
        return {}
    yaml = _yaml()
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not of the form key=value")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: cannot read {text!r}: {error}") from error
        if isinstance(value, str):  # YAML 1.1 takes 1e-3 for a string
            with contextlib.suppress(ValueError):
                value = float(value) if any(c.isdigit() for c in value) else value
        overrides[key] = value
    return overrides


def apply_overrides(tree: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`tree` with dotted keys set. A key below a list of mixers goes to each that has the field."""
    tree = _copy(tree)
    for key, value in overrides.items():
        head, _, rest = key.partition(".")
        path = (RunConfig.SHORTCUTS.get(head, head) + ("." + rest if rest else "")).split(".")
        _set(tree, path, value, key)
    return tree


def override_model(config: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    """`config` with dotted keys set ("mixer.chunk_size", "model.mixer.boundary", ...)."""
    tree = apply_overrides({"model": to_dict(config)}, overrides)
    others = sorted(set(tree) - {"model"})
    if others:
        _unknown(others[0], ["model", "mixer"], "model")
    return from_dict(ModelConfig, tree["model"], "model")


def from_dict(cls: type[T], tree: dict[str, Any], where: str = "") -> T:
    """Build a config dataclass from nested dictionaries.

    Raises ConfigError for an unknown key (naming the nearest) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in tree.items():
        if key not in fields:
            _unknown(f"{where}.{key}" if where else str(key), list(fields), where)
        values[key] = _coerce(hints[key], value, f"{where}.{key}" if where else key)
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dictionaries, lists and scalars; from_dict reads it back."""
    return dataclasses.asdict(config)


def _mixer(value: Any, where: str) -> Mixer:
    if isinstance(value, typing.get_args(Mixer)):
        return typing.cast(Mixer, value)
    if not isinstance(value, dict):
        raise ConfigError(
            f'{where}={value!r} must be a dictionary with a "type", e.g. {{"type": "attamba"}}'
        )
    name = value.get("type", "attamba")
    if name not in MIXERS:
        there = ", ".join(MIXERS)
        raise ConfigError(
            f"{where}.type={name!r} is not a mixer (there are: {there}){did_you_mean(name, MIXERS)}"
        )
    return from_dict(MIXERS[name], value, where)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` asks, or a ConfigError."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        options = typing.get_args(hint)
        if any(o in MIXERS.values() for o in options):
            if isinstance(value, list):
                return [_mixer(v, f"{where}.{i}") for i, v in enumerate(value)]
            return _mixer(value, where)
        for option in options:
            if dataclasses.is_dataclass(option) and isinstance(value, dict):
                return _coerce(option, value, where)
        for option in options:
            try:
                return _coerce(option, value, where)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in typing.get_args(hint):
            return value
        choices = [str(choice) for choice in typing.get_args(hint)]
        raise ConfigError(
            f"{where}={value!r} must be one of: {', '.join(choices)}{did_you_mean(value, choices)}"
        )
    elif origin is list and isinstance(value, (list, tuple)):
        return [_coerce(typing.get_args(hint)[0], v, f"{where}.{i}") for i, v in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return dict(value)
    elif dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if isinstance(value, dict):
            return from_dict(hint, value, where)  # type: ignore[arg-type]
    elif hint is type(None):
        if value is None:
            return None
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if math.isfinite(value):
                return float(value)
        elif isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                pass
    elif hint is str and isinstance(value, str):
        return value
    raise ConfigError(f"{where}={value!r} must be {_describe(hint)}")


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(o) for o in typing.get_args(hint))
    if origin is list:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
    }
    if hint in names:
        return names[hint]
    return "a dictionary" if origin is dict or dataclasses.is_dataclass(hint) else str(hint)


def _set(tree: Any, path: list[str], value: Any, key: str) -> None:
    """Set tree[path] = value, making dictionaries on the way."""
    head, *rest = path
    if isinstance(tree, list):
        if head.isdigit():
            if int(head) >= len(tree):
                raise ConfigError(f"{key}: the list has {len(tree)} entries, counted from 0")
            if rest:
                _set(tree[int(head)], rest, value, key)
            else:
                tree[int(head)] = value
            return
        takers = [t for t in tree if _takes(t, head)]
        if not takers:
            _unknown(key, sorted({n for t in tree for n in _field_names(t)}), key)
        for taker in takers:
            _set(taker, path, value, key)
        return
    if not rest:
        tree[head] = value
        return
    child = tree.get(head)
    if isinstance(child, str) and head == "boundary":
        child = {"type": child}
    if not isinstance(child, (dict, list)):
        child = {}
    tree[head] = child
    _set(child, rest, value, key)


def _field_names(mixer: dict[str, Any]) -> list[str]:
    cls = MIXERS.get(mixer.get("type", "attamba"))
    return [f.name for f in dataclasses.fields(cls)] if cls else []


def _takes(mixer: Any, name: str) -> bool:
    return isinstance(mixer, dict) and name in _field_names(mixer)


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _copy(v) for k, v in tree.items()}
    return [_copy(v) for v in tree] if isinstance(tree, list) else tree


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _unknown(key: str, known: Sequence[str], where: str) -> typing.NoReturn:
    nearest = difflib.get_close_matches(key.rsplit(".", 1)[-1], known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"
    raise ConfigError(f"unknown key {key!r}{hint}")


def _check_chunk_sizes(sizes: list[int], mixers: list[Mixer]) -> None:
    """train.chunk_sizes must have an effect in every layer that has chunks."""
    chunked = [mixer for mixer in mixers if isinstance(mixer, AttambaMixer)]
    if not chunked:
        raise ConfigError(
            f"train.chunk_sizes={sizes} needs a mixer with chunks, of type attamba; leave it out"
        )
    for mixer in chunked:
        boundary = mixer.boundary
        name = boundary if isinstance(boundary, str) else boundary["type"]
        if name in ("separator", "given"):
            raise ConfigError(
                f"train.chunk_sizes={sizes} has no effect on boundary={name}, whose chunks follow "
                f"the text; set mixer.boundary=cyclic, or leave it out"
            )
