"""A tiny run to export; nothing here asks the network."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from attamba.config import RunConfig, from_dict
from attamba.data import load_tokenizer
from attamba.train import save_checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"
if importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def make_run(tmp_path):
    """make_run(tokenizer=..., dtype=..., tie=...) -> the checkpoint folder of a run at step 7.

    more: entries of the vocabulary beyond the tokenizer's.
    """
    from hf_models import build

    def make(tokenizer="bytes", dtype=torch.float32, tie=False, name="run", more=0):
        own = load_tokenizer(tokenizer)
        decoder, _ = build(tie=tie, vocab_size=own.vocab_size + more)
        tree = {"out": str(tmp_path / name), "data": {"train": "texts/books", "seq_len": 64}}
        return save_checkpoint(
            tmp_path / name,
            step=7,
            model=decoder.to(dtype),
            config=from_dict(RunConfig, tree),
            tokenizer=own,
            tokens=448,
            seconds=1.5,
            data={"train": "0123", "valid": None},
        )

    return make
