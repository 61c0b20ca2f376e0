"""An exported folder on a machine without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hf_models import build

from attamba.cli import main
from attamba.hf.remote_code import write_remote_code

ALONE = """
import sys
class Without:  # the package and Triton are as if they were not installed
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("attamba", "triton"):
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import json
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["the cat", "a dog sees"], return_tensors="pt", padding=True)
tokens = model.generate(**inputs, max_new_tokens=24)
bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
hidden = bare(inputs["input_ids"]).last_hidden_state
assert torch.equal(model.decoder.head(hidden), model(inputs["input_ids"]).logits)
model.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
assert torch.equal(again.generate(**inputs, max_new_tokens=24), tokens)
assert not {"attamba", "triton"} & {name.partition(".")[0] for name in sys.modules}
print(json.dumps([inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(),
                  tokens.tolist(), type(model).__module__]))
"""


def alone(folder, tmp_path):
    """A Python without the package opens the folder."""
    return subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )


def test_without_the_package(make_run, tmp_path):
    make_run()
    folder = tmp_path / "hf"
    assert main(["export", str(tmp_path / "run"), str(folder), "--trust-remote-code"]) == 0
    done = alone(folder, tmp_path)
    assert done.returncode == 0, done.stderr
    ids, mask, tokens, module = json.loads(done.stdout)
    assert module.startswith("transformers_modules.")
    _, model = build(vocab_size=256)
    want = model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=24,
        eos_token_id=0,
        pad_token_id=0,
    )
    assert tokens == want.tolist()
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    assert main(["import", str(folder), str(tmp_path / "back")]) == 0


def test_a_folder_without_code(make_run, tmp_path):
    make_run()
    folder = tmp_path / "hf"
    assert main(["export", str(tmp_path / "run"), str(folder)]) == 0
    assert not list(folder.glob("*.py"))
    done = alone(folder, tmp_path)
    assert done.returncode and "attamba" in done.stderr


def test_every_mixer_is_there(tmp_path):
    """The files are the package's, whatever the model: no name of the package is left."""
    auto_map = write_remote_code(tmp_path)
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for path in tmp_path.glob("*.py"):
        text = path.read_text()
        assert "from attamba" not in text and "import triton" not in text, path
        compile(text, str(path), "exec")


def test_unknown_form_of_import():
    from attamba.hf.remote_code import _flattened

    with pytest.raises(NotImplementedError, match="import what is used from the submodule"):
        _flattened("attamba.ops.chunk_attention.triton")
