"""With torch, numpy and safetensors alone, training on prepared bytes works."""

import json
import subprocess
import sys

from attamba.config import to_dict
from attamba.train import load

SCRIPT = """
import json, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import attamba
from attamba.config import RunConfig, from_dict
from attamba.train import train

assert "safetensors" not in sys.modules  # touched only when a checkpoint is
result = train(from_dict(RunConfig, json.loads(sys.argv[1])))
model, tokenizer = attamba.load(result.run_dir)
print(result.step, tokenizer.kind)
"""

EXTRAS = "yaml,rich,tensorboard,fsspec,pyarrow,tokenizers,sentencepiece,zstandard,matplotlib"


def test_training_needs_no_extra(make_config):
    config = make_config({"train.steps": 2, "train.progress": True})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(to_dict(config)), EXTRAS],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 bytes"
    assert load(config.out)[0].config == config.model
