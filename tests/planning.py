"""Small runs for the tests of attamba.plan."""

from __future__ import annotations

from typing import Any

from attamba.config import RunConfig, from_dict

ATTAMBA = {"type": "attamba", "n_heads": 4, "ssm_heads": 2, "state_dim": 16, "leading_tokens": 5}
NARROW = {**ATTAMBA, "kv_proj": True, "n_kv_heads": 2, "ssm_dim": 16}
TRANSFORMER = {"type": "transformer", "n_heads": 4, "n_kv_heads": 2}
MIXERS: dict[str, dict[str, Any]] = {
    "attamba": ATTAMBA,
    "narrow": NARROW,
    "sequence": {**ATTAMBA, "ssm_scope": "sequence"},
    "long chunks": {**ATTAMBA, "chunk_size": 100},
    "mean": {**ATTAMBA, "compressor": "mean"},
    "gated": {**ATTAMBA, "compressor": "gated"},
    "transformer": TRANSFORMER,
    "window": {**TRANSFORMER, "window": 9},
    "mamba2": {"type": "mamba2", "head_dim": 16, "state_dim": 16},
    "mingru": {"type": "mingru", "hidden_dim": 48},
    "minlstm": {"type": "minlstm"},
    "hawk": {"type": "hawk", "hidden_dim": 48},
}
DIM, ROWS = 64, 2


def run_config(mixer: Any = NARROW, **sections: Any) -> RunConfig:
    """A small run; fields of sections as keyword dictionaries."""
    tree = {
        "model": {"vocab_size": 50, "dim": DIM, "n_layers": 3, "ffn_dim": 40, "mixer": mixer},
        "data": {"seq_len": 64, "batch_size": 1},
        "train": {"device": "cpu"},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    config = from_dict(RunConfig, tree)
    config.validate()
    return config
