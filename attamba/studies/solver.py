"""Transformers that cost what an Attamba costs: the paper's iso-setter, done with exact counts.

kv:      bytes of the decode cache after T tokens (bfloat16; window, states and sink included)
flops:   forward FLOPs per token at T, over what is visible
params:  parameters

Each is met by the attention width (heads of another width), and where that can be by a window or by
fewer key/value heads. The paper's own rule counts chunks alone and dense attention; its widths are
shown beside.

Symbols: d model width, H heads, D width of a head, T tokens, P chunk size, N state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from attamba.config import AttambaMixer, ConfigError, ModelConfig, TransformerMixer
from attamba.display import columns, format_bytes
from attamba.models.accounting import cache_bytes, flops_per_token, n_parameters
from attamba.ops.chunking import policy_named
from attamba.studies.costs import ITEMSIZE

MATCHES = ("kv", "flops", "params")
PAPER_LENGTH = 4096
"""T of the paper's iso-setter."""
PAPER_GRAIN = 8
"""The paper's widths are multiples of this: of its heads."""

Cost = Callable[[ModelConfig, int], float]
COSTS: dict[str, Cost] = {
    "kv": lambda config, seq_len: cache_bytes(config, seq_len, ITEMSIZE),
    "flops": lambda config, seq_len: flops_per_token(config, seq_len, training=False),
    "params": lambda config, seq_len: n_parameters(config),
}


@dataclass(frozen=True)
class Rival:
    """A transformer and how it was made as dear."""

    match: str
    by: str
    """width, window or heads."""
    mixer: TransformerMixer
    config: ModelConfig
    target: float
    """Cost of the Attamba."""
    cost: float
    step: float
    """What the next larger setting costs more: the match is within half of it, where the target
    lies between the smallest and the largest setting."""

    @property
    def width(self) -> int:
        """Attention width, H * D."""
        assert self.mixer.head_dim is not None
        return self.mixer.n_heads * self.mixer.head_dim


def solve(config: ModelConfig, match: str, seq_len: int) -> list[Rival]:
    """The transformers of `config`'s width, layers and vocabulary that cost as much as it does.

    config: all of its layers are one attamba mixer. match: kv, flops or params. seq_len: T.

    Raises ConfigError for a config of other mixers, and for chunk ends that a text or scores
    decide: what those cost is not known beforehand.
    """
    mixer = config.mixer
    if not isinstance(mixer, AttambaMixer):
        kind = "a list of mixers" if isinstance(mixer, list) else mixer.type
        raise ConfigError(f"solve needs a config whose mixer is of type attamba; this has {kind}")
    policy = policy_named(mixer.policy)
    if policy.needs_tokens or not policy.causal:
        raise ConfigError(
            f"mixer.boundary={policy.name} places chunk ends by what is read, so that their cost "
            f"is not known beforehand; solve with mixer.boundary=uniform and mixer.chunk_size set "
            f"to their mean length"
        )
    target = COSTS[match](config, seq_len)
    head_dim = mixer.head_dim or config.dim // mixer.n_heads
    base = TransformerMixer(n_heads=mixer.n_heads, head_dim=head_dim)
    found = [_nearest(config, match, "width", target, seq_len, _widths(mixer.n_heads, config.dim))]
    if match != "params":
        windows = (dataclasses.replace(base, window=w) for w in range(1, seq_len + 1))
        found.append(_nearest(config, match, "window", target, seq_len, windows))
    if match == "kv":
        groups = (
            dataclasses.replace(base, n_kv_heads=g)
            for g in range(1, base.n_heads + 1)
            if base.n_heads % g == 0
        )
        found.append(_nearest(config, match, "heads", target, seq_len, groups))
    return found


def paper_width(config: ModelConfig, match: str) -> int | None:
    """Attention width by the paper's iso-setter, as a multiple of 8; None for params, and for fewer
    key/value heads than heads, which it does not know.

    Its equations (iso_study/iso_setter.py of the paper's code), with E for d, D for N, L = 4096:
        kv:     F = E / P + D / L
        flops:  3 F^2 + 2 L F = E^2 + 6 E D + 21 D + 2 L E / P
    """
    mixer = config.mixer
    assert isinstance(mixer, AttambaMixer)
    if mixer.n_kv_heads not in (None, mixer.n_heads):
        return None
    E, D, L, P = config.dim, mixer.state_dim, PAPER_LENGTH, mixer.chunk_size
    if match == "kv":
        width = E / P + D / L
    elif match == "flops":
        right = E**2 + 6 * E * D + 21 * D + 2 * L * E / P
        width = (-2 * L + math.sqrt(4 * L**2 + 12 * right)) / 6
    else:
        return None
    return PAPER_GRAIN * round(width / PAPER_GRAIN)


def _widths(n_heads: int, dim: int) -> Iterator[TransformerMixer]:
    """Mixers in order of attention width, up to four times d; fewer heads where that is finer.

    A head's width is even (rotary halves), so H heads alone would give steps of 2 H. At least
    half of the heads stay.
    """
    by_width: dict[int, TransformerMixer] = {}
    for heads in (n_heads, n_heads // 2):
        for head_dim in range(2, 4 * dim // max(1, heads) + 1, 2) if heads else ():
            width = heads * head_dim
            by_width.setdefault(width, TransformerMixer(n_heads=heads, head_dim=head_dim))
    return (by_width[width] for width in sorted(by_width))


def _nearest(
    config: ModelConfig,
    match: str,
    by: str,
    target: float,
    seq_len: int,
    mixers: Iterator[TransformerMixer],
) -> Rival:
    """The mixer whose cost is nearest to the target; costs rise along `mixers`."""
    choices = list(mixers)

    def cost(i: int) -> float:
        return COSTS[match](dataclasses.replace(config, mixer=choices[i]), seq_len)

    low, high = 0, len(choices) - 1  # the last choice that is no dearer lies in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    best = min((low, high), key=lambda i: abs(cost(i) - target))
    return Rival(
        match=match,
        by=by,
        mixer=choices[best],
        config=dataclasses.replace(config, mixer=choices[best]),
        target=target,
        cost=cost(best),
        step=cost(high) - cost(low),
    )


def table(config: ModelConfig, seq_len: int, matches: tuple[str, ...] = MATCHES) -> str:
    """The rivals as text: what each is, what it costs, and keys for a configuration."""
    rivals = [rival for match in matches for rival in solve(config, match, seq_len)]
    head = ["equal", "by", "width", "paper's", "parameters", "MFLOP/token", "cache", "off by"]
    rows = [head, ["(this)", "", "", "", *_costs(config, seq_len), ""]]
    keys = []
    for rival in rivals:
        theirs = paper_width(config, rival.match) if rival.by == "width" else None
        rows.append(
            [
                rival.match,
                rival.by,
                str(rival.width),
                "" if theirs is None else str(theirs),
                *_costs(rival.config, seq_len),
                f"{100 * (rival.cost / rival.target - 1):+.2f}%",
            ]
        )
        keys.append(f"{rival.match} by {rival.by}: mixer={_yaml(rival.mixer)}")
    title = f"Transformers that cost as much after {seq_len:,} tokens (cache in bfloat16)"
    return "\n".join([title, columns(rows), "", *keys])


def _costs(config: ModelConfig, seq_len: int) -> list[str]:
    return [
        f"{n_parameters(config) / 1e6:.2f}M",
        f"{flops_per_token(config, seq_len, training=False) / 1e6:.1f}",
        format_bytes(cache_bytes(config, seq_len, ITEMSIZE)),
    ]


def _yaml(mixer: TransformerMixer) -> str:
    """The fields that differ from the defaults, as an argument of the command line."""
    plain = TransformerMixer()
    fields = {
        name: value
        for name, value in dataclasses.asdict(mixer).items()
        if name == "type" or value != getattr(plain, name)
    }
    return "{" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}"
