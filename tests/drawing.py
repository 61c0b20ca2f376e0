"""Hypothesis strategies for models, and the comparisons that the property tests share."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

import attamba
from attamba.models import Decoder

VOCAB = 20
HEADS = 4

POLICIES: list[Any] = [
    "uniform",
    "cyclic",
    "head_cyclic",
    "jitter",
    "random",
    {"type": "separator", "tokens": [1, 2, 3]},
    {"type": "separator", "tokens": [5], "max_chunk": 3},
    {"type": "budget", "max_chunks": 6},
    "given",
]
UNBOUNDED = ["random", {"type": "budget", "max_chunks": 6}, "given"]
"""Policies whose chunks may have any length."""
CHUNKS = [1, 2, 3, 4, 7, 8, 16]
LEADS = [0, 1, 3, 8, 20, None]


def cases(n: int) -> settings:
    """n examples, the same ones on every run."""
    return settings(
        max_examples=n,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def attamba_mixers(draw, scopes=("chunk", "sequence", "strided"), policies=POLICIES, leads=LEADS):
    boundary = draw(st.sampled_from(policies))
    scope = "sequence" if boundary == "head_cyclic" else draw(st.sampled_from(scopes))
    if scope == "strided" and boundary in UNBOUNDED:
        scope = "sequence"
    groups = draw(st.sampled_from([1, 2, 4]))
    rivals = ["ssm", "mean", "gated"] if scope == "chunk" else []
    return {
        "type": "attamba",
        "n_heads": HEADS,
        "n_kv_heads": groups,
        "chunk_size": draw(st.sampled_from(CHUNKS)),
        "leading_tokens": draw(st.sampled_from(leads)),
        "boundary": boundary,
        "ssm_scope": scope,
        "compressor": draw(st.sampled_from(["ssm", *rivals])),
        "gate_positions": draw(st.sampled_from([1, 3])),
        "sink": draw(st.booleans()),
        "kv_proj": groups < HEADS or draw(st.booleans()),
        "state_dim": 4,
        "ssm_heads": 2,
        "conv_width": draw(st.sampled_from([1, 4])),
        "ssm_init": draw(st.sampled_from([0.5, 1.0])),
    }


@st.composite
def transformer_mixers(draw):
    return {
        "type": "transformer",
        "n_heads": HEADS,
        "n_kv_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": draw(st.sampled_from([None, 4])),
        "window": draw(st.sampled_from([None, 1, 5, 9])),
    }


RECURRENT: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 16, "state_dim": 4},
    "mingru": {"hidden_dim": 24},
    "minlstm": {},
    "hawk": {"n_blocks": 2},
}
"""Mixers without attention, with options that suit a width of 32."""


@st.composite
def recurrent_mixers(draw):
    name = draw(st.sampled_from(list(RECURRENT)))
    return {"type": name, "conv_width": draw(st.sampled_from([1, 4])), **RECURRENT[name]}


def mixers():
    attention = [attamba_mixers(), attamba_mixers(), transformer_mixers()]
    one = st.one_of(*attention, recurrent_mixers())
    second = st.one_of(transformer_mixers(), recurrent_mixers())
    hybrid = st.tuples(attamba_mixers(), second).map(list)
    return st.one_of(one, one, one, hybrid)


def build(mixer: Any, training: bool = False, seed: int = 0, n_layers: int = 3) -> Decoder:
    torch.manual_seed(seed)
    config = attamba.ModelConfig(
        vocab_size=VOCAB, dim=32, n_layers=n_layers, ffn_dim=32, mixer=mixer
    )
    model = attamba.build_model(config).train(training)
    model.set_draw(seed)
    return model.requires_grad_(False)


def ends_for(model: Decoder, batch: int, seq: int) -> Tensor | None:
    """Random ends where a layer's boundary is "given": of each head where states allow it."""
    mixers = [m for m in model.config.layer_mixers() if getattr(m, "boundary", "") == "given"]
    if not mixers:
        return None
    n = model.config.n_layers
    heads = min(m.n_kv_heads if m.ssm_scope == "sequence" else 1 for m in mixers)
    heads = heads if all((m.n_kv_heads or HEADS) == heads for m in mixers) else 1
    return torch.rand(n, batch, heads, seq) < 0.25


def at(ends: Tensor | None, rows: Any = slice(None), columns: Any = slice(None)) -> Any:
    """Keyword arguments that give a call its part of the ends, [n, B, g, T]."""
    return {} if ends is None else {"ends": ends[:, rows][..., columns]}


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    """Same logits to 1e-4 relative."""
    assert got.shape == want.shape, what
    error = float((got - want).norm() / want.norm())
    assert error < 1e-4, f"{what}: relative error {error:.2e}"


def pieces(total: int, rng: torch.Generator, most: int = 9) -> list[slice]:
    """[0, total) cut into calls of 1..most tokens."""
    cuts, begin = [], 0
    while begin < total:
        size = int(torch.randint(1, most + 1, (), generator=rng))
        cuts.append(slice(begin, min(begin + size, total)))
        begin += size
    return cuts
