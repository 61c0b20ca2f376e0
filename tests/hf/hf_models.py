"""Tiny models of every mixer, as decoders and as wrappers."""

from __future__ import annotations

import torch

import attamba
from attamba.hf import AttambaConfig, AttambaForCausalLM

VOCAB = 40
ATTAMBA = {
    "type": "attamba",
    "n_heads": 4,
    "chunk_size": 4,
    "leading_tokens": 5,
    "state_dim": 4,
    "ssm_heads": 2,
}
MIXERS = {
    "cyclic": ATTAMBA,
    "sequence": {**ATTAMBA, "ssm_scope": "sequence"},
    "heads": {**ATTAMBA, "boundary": "head_cyclic", "ssm_scope": "sequence"},
    "separator": {**ATTAMBA, "boundary": {"type": "separator", "tokens": [1, 2, 3]}},
    "jitter": {**ATTAMBA, "boundary": "jitter", "n_kv_heads": 2, "kv_proj": True},
    "whole window": {**ATTAMBA, "leading_tokens": None},
    "transformer": {"type": "transformer", "n_heads": 4, "n_kv_heads": 2},
    "sliding": {"type": "transformer", "n_heads": 4, "window": 5},
    "hybrid": [ATTAMBA, {"type": "transformer", "n_heads": 4}],
    "gated": {**ATTAMBA, "compressor": "gated"},
    "recurrent": [{"type": "mamba2", "head_dim": 16, "state_dim": 4}, {"type": "hawk"}],
    "mamba2": {"type": "mamba2", "state_dim": 4},
    "mingru": {"type": "mingru"},
    "minlstm": {"type": "minlstm"},
    "hawk": {"type": "hawk"},
    "recurrent hybrid": [{"type": "hawk"}, ATTAMBA],
}
EVERY_KIND = [
    *("cyclic", "sequence", "heads", "separator", "transformer", "hybrid"),
    *("mamba2", "mingru", "minlstm", "hawk", "recurrent hybrid"),
]
"""Mixers that each mode of generate() is tried with; plain greedy search is with all."""


def build(mixer=ATTAMBA, tie=False, vocab_size=VOCAB, **others):
    """(decoder, wrapper) of the same weights, which are drawn twice from one seed."""
    config = attamba.ModelConfig(
        vocab_size=vocab_size, dim=32, n_layers=2, ffn_dim=32, mixer=mixer, tie_embeddings=tie
    )
    torch.manual_seed(1)
    decoder = attamba.build_model(config).eval()
    torch.manual_seed(1)
    model = AttambaForCausalLM(AttambaConfig.from_model_config(config, **others)).eval()
    torch.manual_seed(0)
    return decoder, model
