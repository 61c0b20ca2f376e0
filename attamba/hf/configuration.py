"""ModelConfig under the names that transformers' tools expect."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from attamba.config import ModelConfig, from_dict, to_dict

_NAMES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "ffn_dim": "intermediate_size",
    "mixer": "mixer",
    "rope_theta": "rotary_base",  # transformers rewrites what is called rope_theta
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Fields of ModelConfig, and what they are called here."""


@strict
class AttambaConfig(PreTrainedConfig):
    """A decoder of any mixer. Fields and defaults are ModelConfig's, see attamba.config.

    intermediate_size: None for 3 * hidden_size.
    mixer: a dictionary with a "type" and that mixer's options, or a list of them that is cycled
        over the layers. Options left out are filled in with their defaults.
    rotary_base: ModelConfig's rope_theta.
    use_cache: does a forward pass without labels, outside training, return a cache?

    Raises ConfigError (a ValueError) for an unknown mixer or option, naming the nearest, and for
    fields that do not fit together.
    """

    model_type: ClassVar[str] = "attamba"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 512
    num_hidden_layers: int = 8
    intermediate_size: int | None = None
    mixer: dict | list | None = None
    rotary_base: float | int = 10_000.0
    rms_norm_eps: float | int = 1e-5
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.mixer = to_dict(self.to_model_config())["mixer"]

    def to_model_config(self) -> ModelConfig:
        """The same model's ModelConfig."""
        tree = {name: getattr(self, here) for name, here in _NAMES.items()}
        if tree["mixer"] is None:
            del tree["mixer"]
        return from_dict(ModelConfig, tree)

    @classmethod
    def from_model_config(cls, config: ModelConfig, **others: Any) -> AttambaConfig:
        """The config of a model; others: fields that ModelConfig has not (eos_token_id, ...)."""
        tree = to_dict(config)
        return cls(**{here: tree[name] for name, here in _NAMES.items()}, **others)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the base class. Raises ValueError for the config of another architecture."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"model_type={found!r} is another architecture than {cls.model_type!r}; load the "
                f"folder with AutoModelForCausalLM, or give one that `attamba export` wrote"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the first layer that has some, which a few tools ask for; 0 for none."""
        mixers = self.to_model_config().layer_mixers()
        return next((m.n_heads for m in mixers if hasattr(m, "n_heads")), 0)
