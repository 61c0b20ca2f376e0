"""Training with transformers' Trainer, PEFT and TRL; pipelines; torch.compile."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import ATTAMBA, MIXERS, VOCAB, build
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from attamba.data import load_tokenizer
from attamba.hf.tokenizer import save_for_transformers

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")


@pytest.fixture
def tokenizer(tmp_path):
    own = load_tokenizer("bytes")
    folder = tmp_path / "tokenizer"
    own.save(folder)
    save_for_transformers(own, folder, folder)
    return AutoTokenizer.from_pretrained(folder)


def rows(n=24, seq=16):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (n, seq), generator=draw).tolist()
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def train(model, out, resume=None, **options):
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
        **{"learning_rate": 1e-2, "max_steps": 6, "save_steps": 3, **options},
    )
    trainer = Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(6))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --------------------------------------------------------------------------------------------
# Trainer
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hybrid", "jitter"])
def test_trainer_learns_evaluates_and_resumes(name, tmp_path):
    fresh, model = (build(MIXERS[name], tie=True)[1] for _ in range(2))
    still = train(fresh, tmp_path / "still", max_steps=1, learning_rate=0)
    whole = train(model, tmp_path / "whole")
    before, after = (t.evaluate(rows())["eval_loss"] for t in (still, whole))  # of the same rows
    assert 0 < after < before
    resumed = train(build(MIXERS[name], tie=True)[1], tmp_path / "whole",
                    resume=str(tmp_path / "whole" / "checkpoint-3"))  # fmt: skip
    for (key, a), b in zip(model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), key
    config = json.loads((tmp_path / "whole" / "checkpoint-6" / "config.json").read_text())
    assert config["model_type"] == "attamba"
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    _, plain = build(MIXERS["hybrid"])
    _, model = build(MIXERS["hybrid"])
    kept = []
    for each in (plain, model):
        each.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    calls = count_calls(model.decoder.layers[0].mixer)
    ids = torch.randint(VOCAB, (2, 9))
    for each in (plain, model):
        each(ids, labels=ids).loss.backward()
        kept.append([p.grad for p in each.parameters()])
    assert len(calls) == 2  # forward, and again in backward
    for a, b in zip(*kept, strict=True):
        torch.testing.assert_close(a, b)
    model.activation_checkpointing_disable()
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_no_cache(reentrant):
    """What is computed anew would be in it twice, and gradients wrong."""
    _, model = build(MIXERS["hybrid"])
    model.train()
    ids = torch.randint(VOCAB, (2, 9))
    kept = []
    for use_cache in (False, True):
        model.zero_grad()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        out = model(ids, labels=ids, use_cache=use_cache)
        assert out.past_key_values is None
        out.loss.backward()
        kept.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*kept, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert cache.seen == 9
    with pytest.raises(ValueError, match="past_key_values with gradient checkpointing: what the"):
        model(ids, labels=ids, past_key_values=cache)


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_trainer_with_activation_checkpointing(tmp_path):
    _, plain = build()
    _, model = build()
    want = losses(train(plain, tmp_path / "a", save_steps=100))
    got = losses(train(model, tmp_path / "b", save_steps=100, activation_checkpointing=True))
    assert got == pytest.approx(want, rel=1e-4)


# --------------------------------------------------------------------------------------------
# torch.compile
# --------------------------------------------------------------------------------------------


def test_compile():
    _, model = build(MIXERS["cyclic"])
    ids = torch.randint(VOCAB, (2, 16))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.train()
    got = compiled(ids, labels=ids).loss
    got.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    want = model(ids, labels=ids).loss
    want.backward()
    torch.testing.assert_close(got, want)
    for p, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------
# PEFT, TRL, pipelines
# --------------------------------------------------------------------------------------------


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    _, model = build(MIXERS["hybrid"])
    ids = torch.randint(1, VOCAB, (2, 9))
    before = model(ids).logits
    config = peft.LoraConfig(
        r=2, target_modules=["wq", "wo", "w13", "in_proj"], task_type="CAUSAL_LM", lora_alpha=4
    )
    adapted = peft.get_peft_model(model, config)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    trainer = train(adapted, tmp_path / "run", activation_checkpointing=True)
    assert losses(trainer)[-1] < losses(trainer)[0]
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    after = adapted(ids).logits
    assert not torch.allclose(after, before)
    tokens = adapted.generate(input_ids=ids, max_new_tokens=8, pad_token_id=0)
    fresh = peft.PeftModel.from_pretrained(build(MIXERS["hybrid"])[1], tmp_path / "adapter").eval()
    torch.testing.assert_close(fresh(ids).logits, after)
    merged = fresh.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.generate(ids, max_new_tokens=8, pad_token_id=0), tokens)


@pytest.mark.parametrize("packing", [False, True])
def test_sft(packing, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    _, model = build(vocab_size=256, eos_token_id=0, pad_token_id=0)
    texts = [{"text": "the cat sees the dog " * (1 + i % 3)} for i in range(12)]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=3,
        max_length=48,
        packing=packing,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_pipeline(tokenizer):
    _, model = build({**ATTAMBA, "boundary": {"type": "separator", "tokens": [32]}}, vocab_size=256)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["the cat", "a dog sees the river"]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    together = generate(prompts, batch_size=2, **options)
    alone = [generate(prompt, **options) for prompt in prompts]
    assert together == alone
    assert generate([{"role": "user", "content": "hello"}], **options)[0]["generated_text"]
