"""Which models can be divided among ranks that share their layers or the tokens of their rows."""

from __future__ import annotations

from attamba.config import AttambaMixer, ConfigError, ModelConfig
from attamba.mixers import HawkMixer, Mamba2Mixer, Mixer, attends
from attamba.models.registry import future_policy

__all__ = ["check_parts"]


def check_parts(model: ModelConfig, seq_len: int, *, context: int, tensor: int) -> None:
    """Raises ConfigError where `context` ranks cannot share the tokens or `tensor` ranks a layer.

    seq_len: T, tokens of a row.
    """
    if context == 1 and tensor == 1:
        return
    name = f"parallel.context={context}" if context > 1 else f"parallel.tensor={tensor}"
    policy = future_policy(model)
    if policy is not None:
        raise ConfigError(
            f"{name} does not go with mixer.boundary={policy}, which looks at whole rows of whole "
            f"heads; set it to 1, or use a causal policy, e.g. mixer.boundary=cyclic"
        )
    if any(getattr(mixer, "ssm_scope", "") == "strided" for mixer in model.layer_mixers()):
        raise ConfigError(
            f"{name} does not go with mixer.ssm_scope=strided, whose states of many places are for "
            f"studies; set it to 1, or use mixer.ssm_scope=chunk or sequence"
        )
    if seq_len % context:
        raise ConfigError(
            f"parallel.context={context} does not divide data.seq_len={seq_len}; each rank has "
            f"as many tokens of a row"
        )
    for mixer in model.layer_mixers():
        for what, value in parts_of(mixer, model.dim).items():
            _divides(tensor, value, what)
    _divides(tensor, model.ffn_dim or 3 * model.dim, "model.ffn_dim")
    _divides(tensor, model.vocab_size, "model.vocab_size")


def parts_of(mixer: Mixer, dim: int) -> dict[str, int]:
    """What ranks that share a layer each need a whole number of, and how many there are."""
    if attends(mixer):
        parts = {"key/value heads": mixer.n_kv_heads or mixer.n_heads}
        if isinstance(mixer, AttambaMixer) and mixer.compressor == "ssm":
            parts["mixer.ssm_heads"] = mixer.ssm_heads
        return parts
    if isinstance(mixer, Mamba2Mixer):
        return {"heads (ssm_dim / head_dim)": mixer.inner(dim) // mixer.head_dim}
    if isinstance(mixer, HawkMixer):
        return {"mixer.n_blocks": mixer.n_blocks}
    return {"mixer.hidden_dim": mixer.inner(dim)}  # type: ignore[union-attr]


def _divides(tensor: int, value: int, what: str) -> None:
    if value % tensor:
        told = f"{what}={value}" if "." in what else f"the {value} {what} of a layer"
        raise ConfigError(
            f"parallel.tensor={tensor} does not divide {told}; each rank has as many of them, so "
            f"make one a multiple of the other"
        )
