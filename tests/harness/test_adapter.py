"""The adapter's scores against a plain loop, `attamba eval`, and the harness's own adapter."""

import logging
import math
import re

import pytest
import torch
from lm_eval.api.instance import Instance

import attamba
from attamba.config import ConfigError, RunConfig, from_dict
from attamba.data import load_tokenizer, train_bpe
from attamba.evaluate import evaluate
from attamba.harness import AttambaLM
from attamba.train import save_checkpoint

TOKENIZER = load_tokenizer("bytes")
TEXTS = ["The cat sat on the mat.", "é", "x" * 33, "Grüße aus Köln, " * 9, "two\n\nlines " * 3]
ATTAMBA = {"type": "attamba", "n_heads": 4, "chunk_size": 4, "leading_tokens": 5}
MIXERS = {
    "cyclic": ATTAMBA,
    "separator": {**ATTAMBA, "boundary": {"type": "separator", "tokens": [32]}},
    "heads": {**ATTAMBA, "boundary": "head_cyclic", "ssm_scope": "sequence"},
    "sliding": {"type": "transformer", "n_heads": 4, "window": 5},
    "hybrid": [ATTAMBA, {"type": "transformer", "n_heads": 4}],
    "recurrent": [{"type": "mamba2", "state_dim": 4}, {"type": "mingru"}],
}
PAIRS = [
    ("The cat", " sat"),
    ("The cat", " sat on the mat, and more"),
    ("", "no prompt"),
    ("Trailing space ", "goes on"),
    ("é" * 40, "ü"),
    ("a b c d e f g h i j k l m n o p q r s t u v w x y z" * 2, " end"),
]


def build(mixer=ATTAMBA, vocab_size: int = 256) -> attamba.Decoder:
    torch.manual_seed(0)
    config = attamba.ModelConfig(vocab_size=vocab_size, dim=32, n_layers=2, mixer=mixer)  # type: ignore[arg-type]
    return attamba.build_model(config)


def requests(kind: str, arguments) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)
    ]


def rolling(lm, texts=TEXTS) -> list[float]:
    asked = requests("loglikelihood_rolling", [(text,) for text in texts])
    return lm.loglikelihood_rolling(asked, disable_tqdm=True)


def likelihoods(lm, pairs=PAIRS) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


@torch.no_grad()
def reference(model, ids: list[int], scored: int) -> tuple[float, bool]:
    """log p of the last `scored` ids, each from a forward pass of its own in float64."""
    total, greedy = 0.0, True
    for at in range(len(ids) - scored, len(ids)):
        log_p = model(torch.tensor([ids[:at]]))[0, -1].double().log_softmax(0)
        total += float(log_p[ids[at]])
        greedy &= int(log_p.argmax()) == ids[at]
    return total, greedy


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_scores_are_those_of_eval_to_a_millionth(mixer, batch_size):
    model = build(mixer)
    lm = AttambaLM(model, TOKENIZER, context=24, batch_size=batch_size)
    for text, log_p in zip(TEXTS, rolling(lm)):
        own = evaluate(model, TOKENIZER, [text], context=24, stride=24)
        assert abs(-log_p / own.n_tokens - own.nats_per_token) < 1e-6
    short = evaluate(model, TOKENIZER, TEXTS, context=1000)
    lm = AttambaLM(model, TOKENIZER, context=1000, batch_size=batch_size)
    assert abs(-sum(rolling(lm)) / short.n_tokens - short.nats_per_token) < 1e-6


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_answers_of_unequal_lengths_score_what_a_plain_loop_scores(mixer, batch_size):
    model = build(mixer)
    lm = AttambaLM(model, TOKENIZER, context=200, batch_size=batch_size)
    for (prompt, answer), got in zip(PAIRS, likelihoods(lm)):
        moved = len(prompt) - len(prompt.rstrip())  # spaces at the end belong to the answer
        ids = [0, *prompt.encode(), *answer.encode()]
        want = reference(model, ids, len(answer.encode()) + moved)
        assert got == (pytest.approx(want[0], rel=1e-6), want[1])


def test_of_a_long_prompt_the_end_is_read(caplog):
    model = build()
    lm = AttambaLM(model, TOKENIZER, context=10)
    with caplog.at_level(logging.WARNING):
        (got,) = likelihoods(lm, [("a long prompt is cut", " off")])
    assert "1 of 1 requests are longer than context=10" in caplog.text
    ids = list(b"a long prompt is cut off")[-11:]
    assert got[0] == pytest.approx(reference(model, ids, 4)[0], rel=1e-6)
    with pytest.raises(ValueError, match="context=10 is shorter than an answer of 12 tokens"):
        likelihoods(lm, [("a", "eleven bytes")])


def test_greedy_answers_are_known():
    model = build()
    lm = AttambaLM(model, TOKENIZER, context=64)
    prompt = torch.tensor([[0, *b"abc"]])
    said = attamba.generate(model, prompt, max_new_tokens=1)[0, -1:].tolist()
    (hit, miss) = lm._loglikelihood_tokens(
        [
            (("", ""), prompt[0].tolist(), said),
            (("", ""), prompt[0].tolist(), [(said[0] + 1) % 256]),
        ],
        disable_tqdm=True,
    )
    assert (hit[1], miss[1]) == (True, False)
    assert hit[0] > miss[0]


def test_logits_in_slices_and_the_mode_of_the_model(monkeypatch):
    model = build({**ATTAMBA, "boundary": "jitter"}).train()
    lm = AttambaLM(model, TOKENIZER, context=24)
    at_once = rolling(lm)
    monkeypatch.setattr("attamba.harness.adapter.LOGITS", 256 * 5)
    model.set_draw(3)
    assert rolling(lm) == pytest.approx(at_once, rel=1e-6)
    assert model.training
    assert rolling(lm, [""]) == [0.0]
    assert rolling(lm, []) == []


def test_generation_is_generate_of_each_prompt_alone():
    model = build()
    lm = AttambaLM(model, TOKENIZER, context=20, batch_size=4)
    prompts = ["a", "some longer prompt", "x" * 50, "é", "fifth"]
    options = {"until": ["\n"], "max_gen_toks": 9}
    asked = requests("generate_until", [(p, options) for p in prompts[:4]])
    asked += requests("generate_until", [(prompts[4], {"max_gen_toks": 3})])
    for prompt, text, length in zip(prompts, lm.generate_until(asked), [9, 9, 9, 9, 3]):
        ids = [0, *prompt.encode()][-20:]
        (row,) = attamba.generate(model, [ids], max_new_tokens=length, eos_id=0)
        assert text == TOKENIZER.decode(row[len(ids) :].tolist()).partition("\n")[0]


def test_stop_strings_and_sampling():
    model = build()
    lm = AttambaLM(model, TOKENIZER, context=64)

    def say(**options: object) -> str:
        return lm.generate_until(requests("generate_until", [("abc", options)]), True)[0]

    said = say(max_gen_toks=12)
    stop = said[4:6]
    assert say(max_gen_toks=12, until=[stop, ""]) == said.partition(stop)[0]
    sampling = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 50}
    torch.manual_seed(1)
    drawn = say(**sampling)
    torch.manual_seed(1)
    assert say(**sampling) == drawn != said
    with pytest.raises(ValueError, match=re.escape("options {'num_beams': 4} are not known")):
        say(num_beams=4)


def test_the_harness_s_own_adapter_over_an_export_says_the_same(tmp_path):
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attamba.hf.export import export

    (tmp_path / "text.txt").write_text(" ".join(TEXTS * 3))
    tokenizer = train_bpe([tmp_path / "text.txt"], 300, tmp_path / "bpe")
    model = build(vocab_size=tokenizer.vocab_size)
    config = from_dict(RunConfig, {"data": {"train": "x"}})
    folder = save_checkpoint(tmp_path, step=1, model=model, config=config, tokenizer=tokenizer)
    out = export(folder, tmp_path / "export")
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(out),
        tokenizer=AutoTokenizer.from_pretrained(out),
        backend="causal",
        max_length=200,
        batch_size=3,
    )
    ours = AttambaLM(model, tokenizer, context=200, batch_size=16)
    for got, want in zip(likelihoods(ours), likelihoods(theirs)):
        assert got == (pytest.approx(want[0], rel=1e-5), want[1])
    # The export's tokenizer begins a text with the separator. The harness puts one before whole
    # texts itself, and would score the second: add_bos_token=False keeps it away.
    theirs.add_bos_token = False
    assert rolling(theirs) == pytest.approx(rolling(ours), rel=1e-5)


# --------------------------------------------------------------------------------------------
# From a checkpoint
# --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    config = from_dict(RunConfig, {"data": {"train": "x", "seq_len": 24}})
    return save_checkpoint(tmp_path, step=1, model=build(), config=config, tokenizer=TOKENIZER)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default device is there")
def test_the_default_device_of_the_command_line_may_be_missing(folder, caplog):
    made = AttambaLM.create_from_arg_obj({"pretrained": str(folder)}, {"device": "cuda:0"})
    assert made.model.embed.weight.device.type == "cpu"
    assert "there is no cuda:0" in caplog.text
    with pytest.raises(ValueError, match="cuda:1"):
        AttambaLM.create_from_arg_obj({"pretrained": str(folder)}, {"device": "cuda:1"})


def test_model_args_of_the_command_line(folder):
    from lm_eval.api.registry import get_model

    made = get_model("attamba").create_from_arg_string(
        f"pretrained={folder},mixer.chunk_size=16", {"batch_size": "4", "device": "cpu"}
    )
    assert isinstance(made, AttambaLM)
    assert (made.context, made.batch_size) == (24, 4)
    assert made.model.config.layer_mixers()[0].chunk_size == 16
    assert made.get_model_info()["context"] == 24
    plain = AttambaLM.create_from_arg_obj({"pretrained": str(folder), "device": "cpu"})
    assert rolling(plain) == pytest.approx(rolling(AttambaLM(build(), TOKENIZER, context=24)))
    assert not math.isclose(sum(rolling(plain)), sum(rolling(made)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": None}, "there is no model: give --model_args pretrained="),
        ({"batch_size": "auto"}, "batch_size=auto must be a whole number of at least 1"),
        ({"context": 0}, "context=0 must be a whole number of at least 1"),
        ({"mixer.chunk_sise": 8}, "did you mean 'chunk_size'"),
    ],
)
def test_arguments_that_cannot_be(folder, arguments, message):
    with pytest.raises((ValueError, ConfigError), match=re.escape(message)):
        AttambaLM.from_checkpoint(**{"pretrained": folder, "device": "cpu", **arguments})


def test_a_tokenizer_that_is_not_the_model_s():
    with pytest.raises(ValueError, match="the tokenizer has 256 tokens, the model knows 100"):
        AttambaLM(build(vocab_size=100), TOKENIZER, context=8)
