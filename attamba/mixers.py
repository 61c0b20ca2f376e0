"""Settings of the mixers, the part of a layer that mixes over time.

This module knows names, types and ranges; it imports no model code. What a boundary policy's
options mean is known by ``attamba.ops.chunking`` alone and is checked when a model is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

Backend = Literal["auto", "torch", "triton", "reference"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the text names the field, the value and the remedy."""


@dataclass(kw_only=True)
class TransformerMixer:
    """Softmax attention over per-token keys and values."""

    type: Literal["transformer"] = "transformer"
    n_heads: int = 8
    """H, query heads."""
    n_kv_heads: int | None = None
    """G, key/value heads; divides n_heads. Default: n_heads."""
    head_dim: int | None = None
    """D, width of a head (even). Default: dim / n_heads. Smaller: reduced attention width."""
    window: int | None = None
    """Keys a query sees, ITSELF INCLUDED (a sliding window). Default: all earlier tokens."""
    backend: Backend = "auto"
    """How attention is computed; see attamba.ops."""

    def validate(self, dim: int, where: str) -> None:
        _check_heads(self, dim, where)
        if self.window is not None:
            at_least(self.window, 1, f"{where}.window")


@dataclass(kw_only=True)
class AttambaMixer:
    """Attention over chunk states plus the last tokens (arXiv 2411.17685)."""

    type: Literal["attamba"] = "attamba"
    n_heads: int = 8
    """H, query heads."""
    n_kv_heads: int | None = None
    """G, key/value heads; divides n_heads. Default: n_heads. Fewer need kv_proj."""
    head_dim: int | None = None
    """D, width of a head (even). Default: dim / n_heads. Without kv_proj, G * D must be dim."""
    chunk_size: int = 8
    """P, tokens per chunk (the mean, for policies of variable length)."""
    leading_tokens: int | None = 64
    """L, EARLIER tokens that a query sees one by one, besides itself. null: all of them."""
    boundary: str | dict[str, Any] = "cyclic"
    """Boundary policy: a name, or {"type": name, option: value, ...}; see ops.chunking."""
    compressor: Literal["ssm", "mean", "gated"] = "ssm"
    """What makes a chunk one key and one value: a state-space model, the mean of its tokens, or a
    softmax-gated sum of them (as in DeepSeek-V4). The last two start afresh with each chunk."""
    ssm_scope: Literal["chunk", "sequence", "strided"] = "chunk"
    """Does the compressor's state start afresh with each chunk, or run through? strided: it flows
    between equal positions of chunks alone, which compresses nothing (what the code of arXiv
    2411.17685 computed; slow, for studies)."""
    sink: bool = True
    """Position 0 of a document is a chunk of its own."""
    kv_proj: bool = False
    """Linear map on the path around the compressor (r in k = r(u) + SSM(u)); else identity."""
    state_dim: int = 32
    """N, state per channel of compressor ssm."""
    ssm_dim: int | None = None
    """E, inner width of each compressor ssm. Default: dim / 2."""
    ssm_heads: int = 8
    """S, heads of compressor ssm; divides ssm_dim."""
    conv_width: int = 4
    """Taps of compressor ssm's causal convolution, the current token's included."""
    ssm_init: float = 0.1
    """Size of compressor ssm's output when training begins: 1 for about that of the token itself
    (as in arXiv 2411.17685), 0 for keys and values that begin as the token's own."""
    gate_positions: int = 8
    """First tokens of a chunk with a learned bias of their own in compressor gated; those that
    follow share the last one's."""
    backend: Backend = "auto"
    """How attention and scan are computed; see attamba.ops."""

    def validate(self, dim: int, where: str) -> None:
        _check_heads(self, dim, where)
        at_least(self.chunk_size, 1, f"{where}.chunk_size")
        if self.leading_tokens is not None:
            at_least(
                self.leading_tokens, 0, f"{where}.leading_tokens", "; null means all earlier tokens"
            )
        for name in ("state_dim", "ssm_heads", "conv_width", "gate_positions"):
            at_least(getattr(self, name), 1, f"{where}.{name}")
        at_least(self.ssm_init, 0, f"{where}.ssm_init")
        heads, width = self.n_kv_heads or self.n_heads, self.head_dim or dim // self.n_heads
        if not self.kv_proj and heads * width != dim:
            raise ConfigError(
                f"{where}: n_kv_heads * head_dim = {heads} * {width} = {heads * width} must equal "
                f"dim = {dim} when kv_proj is false, because keys and values are the hidden state "
                f"itself plus the compressor's output; set {where}.kv_proj=true or fit the heads"
            )
        if self.ssm_dim is not None:
            at_least(self.ssm_dim, 1, f"{where}.ssm_dim")
        if self.compressor == "ssm" and (self.ssm_dim or dim // 2) % self.ssm_heads:
            raise ConfigError(
                f"{where}.ssm_heads={self.ssm_heads} does not divide "
                f"ssm_dim={self.ssm_dim or dim // 2}"
            )
        self._check_boundary(where)

    @property
    def policy(self) -> Any:
        """The name of the boundary policy, as it was given: whether there is one of this name is
        known where policies are (attamba.ops.chunking)."""
        return self.boundary if isinstance(self.boundary, str) else self.boundary.get("type")

    def _check_boundary(self, where: str) -> None:
        policy = self.policy
        if policy is None:
            raise ConfigError(f'{where}.boundary={self.boundary} needs a "type"')
        self._check_pooling(policy == "head_cyclic", where)
        if policy == "head_cyclic" and self.ssm_scope != "sequence":
            raise ConfigError(
                f"{where}.boundary=head_cyclic needs {where}.ssm_scope=sequence, not "
                f"{self.ssm_scope} (each head has its own chunk ends, so states must not depend on "
                f"them); set it, or another boundary, such as {where}.boundary=cyclic"
            )
        if self.ssm_scope == "strided" and self.backend == "triton":
            raise ConfigError(
                f"{where}.backend=triton has no kernels for ssm_scope=strided; use auto or torch"
            )

    def _check_pooling(self, per_head: bool, where: str) -> None:
        """per_head: are chunks those of boundary head_cyclic?"""
        needed = [] if self.ssm_scope == "chunk" else [f"{where}.ssm_scope=chunk"]
        needed += [f"{where}.boundary=cyclic"] if per_head else []
        if self.compressor == "ssm" or not needed:
            return
        is_chunk = self.ssm_scope == "chunk"
        given = "boundary=head_cyclic" if is_chunk else f"ssm_scope={self.ssm_scope}"
        raise ConfigError(
            f"{where}.{given} needs {where}.compressor=ssm; {self.compressor} pools the tokens of "
            f"a chunk alone, and goes with {' and '.join(needed)}"
        )


@dataclass(kw_only=True)
class Mamba2Mixer:
    """A state-space model with one decay per head and no attention (Mamba-2, arXiv 2405.21060)."""

    type: Literal["mamba2"] = "mamba2"
    ssm_dim: int | None = None
    """E, inner width. Default: 2 * dim."""
    head_dim: int = 64
    """W, width of a head; divides ssm_dim."""
    state_dim: int = 128
    """N, state per channel."""
    conv_width: int = 4
    """Taps of the causal convolution, the current token's included."""
    backend: Backend = "auto"
    """How the scan is computed; see attamba.ops."""

    def inner(self, dim: int) -> int:
        """E."""
        return self.ssm_dim or 2 * dim

    def validate(self, dim: int, where: str) -> None:
        for name in ("head_dim", "state_dim", "conv_width"):
            at_least(getattr(self, name), 1, f"{where}.{name}")
        if self.ssm_dim is not None:
            at_least(self.ssm_dim, 1, f"{where}.ssm_dim")
        if self.inner(dim) % self.head_dim:
            raise ConfigError(
                f"{where}.head_dim={self.head_dim} does not divide ssm_dim={self.inner(dim)}"
            )


@dataclass(kw_only=True)
class MinGRUMixer:
    """A GRU whose gate does not look at the state, so that it can be scanned (arXiv 2410.01201)."""

    type: Literal["mingru"] = "mingru"
    hidden_dim: int | None = None
    """Channels of the state. Default: 4/3 dim, rounded up to a multiple of 64: about as many
    weights as full attention."""
    conv_width: int = 4
    """Taps of the causal convolution before it, the current token's included."""
    backend: Backend = "auto"
    """How the scan is computed; see attamba.ops."""

    def inner(self, dim: int) -> int:
        """Channels of the state."""
        return self.hidden_dim or _round_up(4 * dim / 3, 64)

    def validate(self, dim: int, where: str) -> None:
        _check_recurrent(self, where)


@dataclass(kw_only=True)
class MinLSTMMixer:
    """An LSTM whose gates do not look at the state and sum to one (arXiv 2410.01201)."""

    type: Literal["minlstm"] = "minlstm"
    hidden_dim: int | None = None
    """Channels of the state. Default: dim: as many weights as full attention."""
    conv_width: int = 4
    """Taps of the causal convolution before it, the current token's included."""
    backend: Backend = "auto"
    """How the scan is computed; see attamba.ops."""

    def inner(self, dim: int) -> int:
        """Channels of the state."""
        return self.hidden_dim or dim

    def validate(self, dim: int, where: str) -> None:
        _check_recurrent(self, where)


@dataclass(kw_only=True)
class HawkMixer:
    """A gated linear recurrent unit, RG-LRU, beside a GeLU branch (Hawk, arXiv 2402.19427)."""

    type: Literal["hawk"] = "hawk"
    hidden_dim: int | None = None
    """Channels of the state. Default: 4/3 dim, rounded up to a multiple of 8 * n_blocks."""
    n_blocks: int = 8
    """Blocks on the diagonal of the gates' matrices; divides hidden_dim."""
    conv_width: int = 4
    """Taps of the causal convolution, the current token's included."""
    backend: Backend = "auto"
    """How the scan is computed; see attamba.ops."""

    def inner(self, dim: int) -> int:
        """Channels of the state."""
        return self.hidden_dim or _round_up(4 * dim / 3, 8 * self.n_blocks)

    def validate(self, dim: int, where: str) -> None:
        _check_recurrent(self, where)
        at_least(self.n_blocks, 1, f"{where}.n_blocks")
        if self.inner(dim) % self.n_blocks:
            raise ConfigError(
                f"{where}.n_blocks={self.n_blocks} does not divide hidden_dim={self.inner(dim)}"
            )


Mixer = AttambaMixer | TransformerMixer | Mamba2Mixer | MinGRUMixer | MinLSTMMixer | HawkMixer
MIXERS: dict[str, type[Mixer]] = {
    "attamba": AttambaMixer,
    "transformer": TransformerMixer,
    "mamba2": Mamba2Mixer,
    "mingru": MinGRUMixer,
    "minlstm": MinLSTMMixer,
    "hawk": HawkMixer,
}


def attends(mixer: Mixer) -> TypeGuard[AttambaMixer | TransformerMixer]:
    """Does a mixer have queries, keys and values?"""
    return isinstance(mixer, (AttambaMixer, TransformerMixer))


def at_least(value: float, least: int, name: str, extra: str = "") -> None:
    """Raises ConfigError where a number is too small."""
    if value < least:
        raise ConfigError(f"{name}={value} must be at least {least}{extra}")


def _round_up(value: float, multiple: int) -> int:
    return -int(-value // multiple) * multiple


def _check_recurrent(mixer: MinGRUMixer | MinLSTMMixer | HawkMixer, where: str) -> None:
    at_least(mixer.conv_width, 1, f"{where}.conv_width")
    if mixer.hidden_dim is not None:
        at_least(mixer.hidden_dim, 1, f"{where}.hidden_dim")


def _check_heads(mixer: AttambaMixer | TransformerMixer, dim: int, where: str) -> None:
    at_least(mixer.n_heads, 1, f"{where}.n_heads")
    if mixer.n_kv_heads is not None:
        at_least(mixer.n_kv_heads, 1, f"{where}.n_kv_heads")
        if mixer.n_heads % mixer.n_kv_heads:
            raise ConfigError(
                f"{where}.n_kv_heads={mixer.n_kv_heads} does not divide n_heads={mixer.n_heads}"
            )
    if mixer.head_dim is None and dim % mixer.n_heads:
        projected = isinstance(mixer, TransformerMixer) or mixer.kv_proj
        raise ConfigError(
            f"{where}.n_heads={mixer.n_heads} does not divide dim={dim}; set {where}.head_dim"
            f"{'' if projected else f' and {where}.kv_proj=true'}, or a number that divides it"
        )
    width = mixer.head_dim if mixer.head_dim is not None else dim // mixer.n_heads
    if width < 2 or width % 2:
        raise ConfigError(f"{where}.head_dim={width} must be even and at least 2 (rotary halves)")
