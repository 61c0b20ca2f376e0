"""The wrapper: its config, its forward pass, and how it is saved and loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hf_models import ATTAMBA, MIXERS, VOCAB, build
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig

import attamba
from attamba.config import ConfigError
from attamba.hf import AttambaConfig, AttambaForCausalLM, AttambaModel


def prompt(rows=2, length=9):
    return torch.randint(VOCAB, (rows, length))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
def test_config_round_trip(name, tmp_path):
    config = attamba.ModelConfig(
        vocab_size=99, dim=32, n_layers=3, ffn_dim=7, mixer=MIXERS[name], rope_theta=5e5,
        norm_eps=1e-6, tie_embeddings=True,
    )  # fmt: skip
    theirs = AttambaConfig.from_model_config(config, eos_token_id=3)
    assert theirs.to_model_config() == config
    theirs.save_pretrained(tmp_path)
    back = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(back, AttambaConfig) and back.eos_token_id == 3
    assert back.to_model_config() == config


def test_every_field_of_the_model_is_in_the_config():
    fields = set(attamba.ModelConfig.__dataclass_fields__)
    theirs = AttambaConfig(vocab_size=1, hidden_size=32, mixer=ATTAMBA).to_model_config()
    assert set(vars(theirs)) == fields
    assert AttambaConfig().to_model_config() == attamba.ModelConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": {"type": "atamba"}}, "did you mean 'attamba'"),
        ({"mixer": [ATTAMBA, {"type": "mamba9"}]}, r"mixer.1.type='mamba9' is not a mixer"),
        ({"mixer": {**ATTAMBA, "chunksize": 4}}, "did you mean 'chunk_size'"),
        ({"mixer": {**ATTAMBA, "chunk_size": 0}}, "chunk_size=0 must be at least 1"),
        ({"hidden_size": 30}, "does not divide"),
    ],
)
def test_bad_configs(fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        AttambaConfig(**{"hidden_size": 32, "mixer": ATTAMBA, **fields})
    AttambaConfig(hidden_size=32, mixer=ATTAMBA).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ConfigError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_another_architecture(tmp_path):
    LlamaConfig(hidden_size=32).save_pretrained(tmp_path)
    for cls in (AttambaConfig, AttambaForCausalLM):
        with pytest.raises(ValueError, match="model_type='llama' is another architecture"):
            cls.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
def test_the_decoders_logits(name):
    decoder, model = build(MIXERS[name])
    ids = prompt()
    assert torch.equal(model(ids, use_cache=False).logits, decoder(ids))
    prefix = "model.decoder."
    theirs = {key.removeprefix(prefix): value for key, value in model.state_dict().items()}
    assert list(theirs) == list(decoder.state_dict())


def test_loss_is_the_mean_over_labels():
    decoder, model = build()
    ids = prompt()
    labels = ids.clone()
    labels[0, :4] = -100
    loss = model(ids, labels=labels).loss
    kept = labels[:, 1:] != -100
    want = torch.nn.functional.cross_entropy(decoder(ids)[:, :-1][kept], labels[:, 1:][kept])
    close(loss, want)
    assert model(ids, labels=labels).past_key_values is None


def test_right_padding_changes_nothing_without_a_cache():
    _, model = build()
    ids = prompt(2, 9)
    mask = torch.tensor([[1] * 9, [0] * 2 + [1] * 5 + [0] * 2])
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    close(logits[0], model(ids[:1]).logits[0])
    close(logits[1, 2:7], model(ids[1:, 2:7]).logits[0])
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="padding between tokens"):
        model(ids, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match=r"must be \[B, T\] with T=9"):
        model(ids, attention_mask=mask[:, :5])


def test_packed_documents():
    _, model = build()
    ids = prompt(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    doc_ids = torch.tensor([[0] * 5 + [1] * 7])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    assert torch.equal(packed, model(ids, doc_ids=doc_ids, use_cache=False).logits)
    close(packed[:, 5:], model(ids[:, 5:]).logits)
    with pytest.raises(ValueError, match="position_ids are not those"):
        model(ids, position_ids=positions + 1, use_cache=False)
    with pytest.raises(ValueError, match="either doc_ids or position_ids"):
        model(ids, position_ids=positions, doc_ids=doc_ids, use_cache=False)


def test_positions_that_the_model_counts_itself():
    _, model = build()
    ids = prompt()
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    counted = mask.cumsum(1) - 1
    first = model(ids, attention_mask=mask, position_ids=counted.clamp(min=0))
    assert torch.equal(first.logits, model(ids, attention_mask=mask).logits)
    step, cache = prompt(2, 1), first.past_key_values
    with pytest.raises(ValueError, match="position_ids are not those"):
        model(step, position_ids=torch.tensor([[9], [9]]), past_key_values=cache)
    model(step, position_ids=torch.tensor([[9], [5]]), past_key_values=cache)


def test_outputs():
    decoder, model = build()
    ids = prompt()
    out = model(ids, output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 9, 32)] * 3
    assert torch.equal(decoder.head(out.hidden_states[-1]), out.logits)
    assert torch.equal(out.hidden_states[0], decoder.embed(ids))
    logits = out.logits
    assert torch.equal(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])
    assert torch.equal(model(ids, return_dict=False)[0], logits)
    embeds = decoder.embed(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, logits)
    assert model(ids, use_cache=False).past_key_values is None
    with pytest.raises(ValueError, match="attention weights are never formed"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeds)
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(ids + VOCAB)


def test_random_ends_are_drawn_anew_in_training():
    _, model = build(MIXERS["jitter"])
    ids = prompt(2, 24)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(0)
    first, second = model(ids).logits, model(ids).logits
    assert not torch.allclose(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, first)


def test_resized_vocabulary():
    _, model = build()
    model.resize_token_embeddings(VOCAB + 8)
    assert model(prompt() + 8).logits.shape[-1] == VOCAB + 8
    assert model.config.to_model_config() == model.decoder.config


# --------------------------------------------------------------------------------------------
# Saved and loaded
# --------------------------------------------------------------------------------------------


def same(a, b):
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other and x.dtype == y.dtype and torch.equal(x, y), name


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_save_and_load(tie, dtype, shard, tmp_path):
    _, model = build(MIXERS["hybrid"], tie=tie)
    model.to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, AttambaForCausalLM) and not loaded.training
    same(loaded, model)
    assert (loaded.decoder.head.weight is loaded.decoder.embed.weight) == tie
    assert int(loaded.decoder.draw) == 0
    ids = prompt()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_load_in_another_dtype(tmp_path):
    _, model = build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    same(loaded, model.to(torch.bfloat16))


def test_the_model_without_its_head(tmp_path):
    decoder, model = build()
    model.save_pretrained(tmp_path / "whole")
    bare = AutoModel.from_pretrained(tmp_path / "whole")
    assert isinstance(bare, AttambaModel) and not hasattr(bare.decoder, "head")
    ids = prompt()
    out = bare(ids, output_hidden_states=True)
    assert torch.equal(decoder.head(out.last_hidden_state), decoder(ids))
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    same(AutoModel.from_pretrained(tmp_path / "bare"), bare)


@pytest.mark.parametrize("where", ["auto", "cpu", {"": "cpu"}])
def test_device_map(where, tmp_path):
    pytest.importorskip("accelerate")
    _, model = build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where)
    ids = prompt().to(loaded.device)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    got = loaded.generate(ids, **options)
    if loaded.device.type == "cpu":
        assert torch.equal(got, model.generate(ids, **options))


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (
            {"device_map": {"embed": "cpu", "layers": "disk", "norm": "cpu", "head": "cpu"}},
            "cpu, disk",
        ),
        ({"device_map": {"": "disk"}}, "disk"),
        ({"device_map": "auto", "max_memory": {"cpu": "10KB"}}, "disk"),
    ],
)
def test_a_device_map_over_several_devices_or_a_disk(options, where, tmp_path):
    pytest.importorskip("accelerate")
    _, model = build()
    model.save_pretrained(tmp_path)
    if isinstance(options["device_map"], dict):
        parts = {
            "model.decoder." + part if part else "": to
            for part, to in options["device_map"].items()
        }
        options = {"device_map": parts}
    with pytest.raises(ValueError, match=f"device_map puts the model on {where}, but"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, offload_folder=tmp_path / "offload", **options
        )


def test_from_decoder_shares_its_parameters():
    decoder, _ = build(tie=True)
    model = AttambaForCausalLM.from_decoder(decoder, eos_token_id=2)
    assert model.decoder.head.weight is decoder.embed.weight and model.config.eos_token_id == 2
    ids = prompt()
    assert torch.equal(model(ids).logits, decoder(ids))
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_altered_weights(tmp_path):
    _, model = build()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    name = "model.decoder.layers.0.mixer.wq.weight"

    def load_with(tensors):
        save_file(tensors, path, metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match=f"1 tensors are not in the checkpoint .{name}"):
        load_with({key: value for key, value in whole.items() if key != name})
    with pytest.raises(ValueError, match="1 tensors are in the checkpoint, but not"):
        load_with(whole | {"model.decoder.layers.7.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"1 tensors have another shape in the checkpoint .{name}"):
        load_with(whole | {name: torch.zeros(3, 3)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"the weights are damaged .*restore the file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_missing_weights(tmp_path):
    _, model = build()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_package_does_not_load_transformers():
    code = (
        "import sys, attamba, attamba.config, attamba.cli\n"
        "attamba.cli.build_parser()\n"
        "assert not {'transformers', 'torch', 'huggingface_hub'} & set(sys.modules)\n"
        "attamba.build_model, attamba.generate, attamba.load, attamba.ops\n"
        "assert not {'transformers', 'huggingface_hub', 'tokenizers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_hidden_states_of_a_step_in_kernels():
    """Kernels may join layers, but not those that somebody looks at."""
    pytest.importorskip("triton")
    ids, states = torch.randint(20, (2, 7)), []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        mixer = {"type": "attamba", "n_heads": 2, "state_dim": 4, "ssm_heads": 2, "chunk_size": 3}
        mixer |= {"leading_tokens": 4, "backend": backend}
        config = attamba.ModelConfig(vocab_size=20, dim=32, n_layers=2, mixer=mixer)
        model = AttambaForCausalLM.from_decoder(attamba.build_model(config)).eval()
        with torch.no_grad():
            cache = model(ids[:, :6], use_cache=True).past_key_values
            out = model(ids[:, 6:], past_key_values=cache, output_hidden_states=True)
        states.append(out.hidden_states)
    assert len(states[0]) == len(states[1]) == 3
    for a, b in zip(*states):
        torch.testing.assert_close(a, b)
