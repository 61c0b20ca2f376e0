"""Generation: the cache changes nothing, rows do not touch each other, text is never torn."""

import re
from typing import Any

import pytest
import torch

import attamba
from attamba.data import load_tokenizer
from attamba.generation import GenerationStats, Step, stream
from attamba.models.accounting import cache_bytes
from attamba.sampling import Sampler, StopMatcher

PROMPTS = [[1, 2, 3], [5] * 17, [9], [200, 100] * 6]

MIXERS: dict[str, Any] = {
    "attamba": {"chunk_size": 4, "leading_tokens": 6},
    "per head": {"chunk_size": 4, "boundary": "head_cyclic", "ssm_scope": "sequence"},
    "transformer": {"type": "transformer"},
    "window": {"type": "transformer", "window": 5},
    "hybrid": [{"chunk_size": 4, "n_heads": 4}, {"type": "transformer", "n_heads": 4}],
    "mean": {"chunk_size": 4, "leading_tokens": 6, "compressor": "mean"},
    "gated": {"chunk_size": 4, "leading_tokens": 6, "compressor": "gated"},
    "recurrent": [{"type": "mamba2", "state_dim": 4}, {"type": "minlstm"}],
    "hybrid of hawk": [{"type": "hawk"}, {"type": "transformer", "n_heads": 4, "window": 5}],
}


def build(mixer: Any = None, vocab_size: int = 256) -> attamba.Decoder:
    mixer = mixer or MIXERS["attamba"]
    if isinstance(mixer, dict):
        mixer = {"n_heads": 4, **mixer}
    config = attamba.ModelConfig(vocab_size=vocab_size, dim=32, n_layers=2, mixer=mixer)
    return attamba.build_model(config)


@pytest.fixture(scope="module")
def model() -> attamba.Decoder:
    torch.manual_seed(0)
    return build()


def _lists(rows: Any) -> list[list[int]]:
    return [row.tolist() for row in rows]


class Scripted(torch.nn.Module):
    """A model that says what it is told: the token after position t is script[t + 1]."""

    def __init__(self, model: attamba.Decoder, script: bytes) -> None:
        super().__init__()
        self.embed, self.config, self.script = model.embed, model.config, script

    def forward(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        following = torch.tensor([[self.script[ids.shape[1]]] * ids.shape[1]] * ids.shape[0])
        return torch.nn.functional.one_hot(following, 256).float()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


# --------------------------------------------------------------------------------------------
# The same tokens, however they are computed
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
def test_ragged_batches_caches_and_pieces_agree(name):
    model = build(MIXERS[name])
    together = _lists(attamba.generate(model, PROMPTS, max_new_tokens=12))
    assert [len(row) for row in together] == [len(p) + 12 for p in PROMPTS]
    uncached = attamba.generate(model, PROMPTS, max_new_tokens=12, use_cache=False)
    pieces = attamba.generate(model, PROMPTS, max_new_tokens=12, prefill_chunk=5)
    alone = [attamba.generate(model, [p], max_new_tokens=12)[0] for p in PROMPTS]
    assert together == _lists(uncached) == _lists(pieces) == _lists(alone)


def test_greedy_takes_the_likeliest_token(model):
    ids = torch.tensor(PROMPTS[3:])
    out = attamba.generate(model, ids, max_new_tokens=5)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.int64 and out.shape == (1, 17)
    assert torch.equal(out[:, :12], ids)
    assert torch.equal(model(out)[:, 11:-1].argmax(-1), out[:, 12:])


def test_given_ends_are_cut_to_each_step():
    model = build({"boundary": "given"})
    ids = torch.randint(256, (2, 9))
    ends = torch.rand(2, 2, 9 + 8) < 0.3
    for shape in (ends, ends[0], ends[:, :, None].expand(-1, -1, 4, -1)[:, :, :1]):
        cached = attamba.generate(model, ids, max_new_tokens=8, ends=shape, prefill_chunk=4)
        again = attamba.generate(model, ids, max_new_tokens=8, ends=shape, use_cache=False)
        assert torch.equal(cached, again)
    other = attamba.generate(model, ids, max_new_tokens=8, ends=~ends)
    assert not torch.equal(cached, other)


def test_prompts_may_be_tensors_or_arrays_and_any_integers(model):
    lists = _lists(attamba.generate(model, PROMPTS, max_new_tokens=3))
    tensors = [torch.tensor(p, dtype=torch.int32) for p in PROMPTS]
    arrays = [t.numpy() for t in tensors]
    assert lists == _lists(attamba.generate(model, tensors, max_new_tokens=3))
    assert lists == _lists(attamba.generate(model, arrays, max_new_tokens=3))


@pytest.mark.parametrize("ids", [torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3]]])
def test_no_new_tokens_give_the_prompts_back(model, ids):
    out = attamba.generate(model, ids, max_new_tokens=0)
    assert [list(map(int, row)) for row in out] == [list(map(int, row)) for row in ids]


def test_the_mode_of_the_model_comes_back():
    model = build({"boundary": "random"}).train()
    attamba.generate(model, [[1]], max_new_tokens=2)
    assert model.training
    steps = stream(model, [[1]], max_new_tokens=9)
    next(steps)
    assert not model.training
    assert not torch.is_inference_mode_enabled()
    steps.close()
    assert model.training


# --------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------


def _sample(logits: list[float], n: int, **options: Any) -> list[int]:
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0, **options}
    sampler = Sampler(rows=n, device=torch.device("cpu"), **settings)
    return sampler(torch.tensor([logits] * n)).tolist()


def test_a_row_s_samples_depend_on_the_seed_and_its_place_alone(model):
    options = {"max_new_tokens": 16, "temperature": 1.0}
    first = _lists(attamba.generate(model, PROMPTS, seed=3, **options))
    others = [PROMPTS[0], [7] * 30, PROMPTS[2]]
    second = _lists(attamba.generate(model, others, seed=3, **options))
    assert (first[0], first[2]) == (second[0], second[2])
    assert first == _lists(attamba.generate(model, PROMPTS, seed=3, **options))
    assert first != _lists(attamba.generate(model, PROMPTS, seed=4, **options))
    twins = _lists(attamba.generate(model, [[1], [1]], seed=3, **options))
    assert twins[0] != twins[1]


def test_without_a_seed_torch_s_own_counts(model):
    def run(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return _lists(attamba.generate(model, [[1]], max_new_tokens=8, temperature=1.0))

    assert run(0) == run(0) != run(1)


def test_samples_follow_the_probabilities():
    probs = torch.tensor([0.5, 0.1, 0.0, 0.4])
    counts = torch.tensor(_sample(probs.log().tolist(), 4000)).bincount(minlength=4) / 4000
    assert counts[2] == 0
    assert torch.allclose(counts, probs, atol=0.03)


def test_temperature():
    logits = [0.0, 1.0, 0.9]
    assert set(_sample(logits, 50, temperature=0.0)) == {1}
    assert set(_sample(logits, 50, temperature=1e-30)) == {1}
    assert set(_sample(logits, 200, temperature=1e30)) == {0, 1, 2}


def test_top_k_keeps_exactly_k_also_of_equals():
    assert set(_sample([1.0] * 6, 400, top_k=2)) == {0, 1}
    assert set(_sample([0.0, 3.0, 1.0], 50, top_k=1)) == {1}
    assert set(_sample([0.0, 0.1], 50, top_k=99)) == {0, 1}


def test_top_p_keeps_the_fewest_that_reach_it_and_one_at_least():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert set(_sample(logits, 400, top_p=1e-9)) == {0}
    assert set(_sample(logits, 400, top_p=0.49)) == {0}
    assert set(_sample(logits, 400, top_p=0.6)) == {0, 1}
    assert set(_sample(logits, 400, top_p=1.0)) == {0, 1, 2, 3}
    # After top_k: two are left, with 5/8 and 3/8.
    assert set(_sample(logits, 400, top_k=2, top_p=0.62)) == {0}


# --------------------------------------------------------------------------------------------
# Ends of rows
# --------------------------------------------------------------------------------------------


def test_rows_end_at_eos_and_are_filled(model):
    free = attamba.generate(model, torch.tensor([[1], [2]]), max_new_tokens=10)
    eos = next(t for t in free[0, 1:].tolist() if t not in free[1].tolist())
    at = free[0].tolist().index(eos)
    out = attamba.generate(model, torch.tensor([[1], [2]]), max_new_tokens=10, eos_id=eos)
    assert out[0].tolist() == free[0, : at + 1].tolist() + [eos] * (10 - at)
    assert torch.equal(out[1], free[1])
    cut = attamba.generate(model, [[1], [2]], max_new_tokens=10, eos_id=eos)
    assert _lists(cut) == [free[0, : at + 1].tolist(), free[1].tolist()]


def test_an_ended_row_is_frozen_in_the_cache(model):
    free = attamba.generate(model, [[1], [2]], max_new_tokens=10)
    eos = next(t for t in free[0][1:].tolist() if t not in free[1].tolist())
    lengths = [len(r) for r in attamba.generate(model, [[1], [2]], max_new_tokens=10, eos_id=eos)]
    stats = GenerationStats()
    attamba.generate(model, [[1], [2]], max_new_tokens=10, eos_id=eos, stats=stats)
    # The last token of a row is not read any more.
    assert stats.cache_bytes_used == sum(cache_bytes(model.config, n - 1) for n in lengths)


def test_all_rows_ended_end_the_loop(model):
    first = int(attamba.generate(model, [[1]], max_new_tokens=1)[0][-1])
    steps = list(stream(model, [[1]], max_new_tokens=50, eos_id=first))
    assert steps == [Step(tokens=[first], text=[""], finish=["eos"])]


def test_the_last_step_says_length(model):
    steps = list(stream(model, [[1], [2]], max_new_tokens=3))
    assert [step.finish for step in steps] == [[None, None], [None, None], ["length", "length"]]


def _scripted(model: attamba.Decoder, text: str, **options: Any) -> list[Step]:
    """Steps of a model that writes `text` after a prompt of one token."""
    scripted: Any = Scripted(model, b"\0" + text.encode() + b"\0")
    options = {"max_new_tokens": len(text.encode()) + 1, **options}
    tokenizer = load_tokenizer("bytes")
    return list(stream(scripted, [[0]], tokenizer=tokenizer, use_cache=False, **options))


def _text(steps: list[Step]) -> str:
    return "".join(step.text[0] for step in steps)


def test_text_comes_in_whole_characters(model):
    steps = _scripted(model, "aé漢!")
    assert [s.text[0] for s in steps] == ["a", "", "é", "", "", "漢", "!", ""]
    assert steps[-1].finish == ["eos"]


def test_a_character_begun_by_the_prompt_is_completed(model):
    scripted: Any = Scripted(model, b"\xc3\xa9b")
    tokenizer = load_tokenizer("bytes")
    steps = stream(scripted, [[0xC3]], max_new_tokens=2, tokenizer=tokenizer, use_cache=False)
    assert _text(list(steps)) == "éb"


def test_text_that_stays_torn_comes_at_the_end(model):
    steps = _scripted(model, "aé", max_new_tokens=2)
    assert _text(steps) == "a\ufffd"
    assert steps[-1].finish == ["length"]


def test_a_stop_string_is_found_across_tokens_and_never_shown(model):
    steps = _scripted(model, "one\n\ntwo", stop="\n\n")
    assert [s.text[0] for s in steps] == ["o", "n", "e", "", ""]
    assert [s.finish[0] for s in steps] == [None] * 4 + ["stop"]


def test_what_only_looked_like_a_stop_string_is_shown(model):
    steps = _scripted(model, "aab", stop=["aac", "zz"])
    assert [s.text[0] for s in steps] == ["", "", "aab", ""]
    assert _text(_scripted(model, "xaa", stop="aac")) == "xaa"


def test_generate_keeps_the_token_that_completed_the_stop(model):
    scripted: Any = Scripted(model, b"\0ab.cd")
    seen: list[Step] = []
    (out,) = attamba.generate(
        scripted,
        [[0]],
        max_new_tokens=5,
        stop=".",
        tokenizer=load_tokenizer("bytes"),
        use_cache=False,
        on_token=seen.append,
    )
    assert bytes(out.tolist()) == b"\0ab."
    assert _text(seen) == "ab"


@pytest.mark.parametrize("stops", [["ab"], ["abab", "ba"], ["aab", "abc"], ["c"], []])
def test_a_matcher_agrees_with_a_search(stops):
    for number in range(3**7):
        text = "".join("abc"[number // 3**i % 3] for i in range(7))
        matcher, shown, stopped = StopMatcher(stops), "", False
        for i in range(7):
            new, stopped = matcher.push(text[i])
            shown += new
            if stopped:
                break
        shown += "" if stopped else matcher.flush()
        hits = [text[: i + 1].find(s) for s in stops if s in text[: i + 1]]
        assert stopped == bool(hits)
        assert shown == (text[: min(hits)] if hits else text)


def test_a_matcher_takes_the_earliest_of_several_in_one_push():
    assert StopMatcher(["cd", "b"]).push("abcd") == ("a", True)


def test_tokens_beyond_the_tokenizer_are_not_drawn():
    model = build(vocab_size=300)
    model.head.weight.data[256:] *= 100
    assert max(attamba.generate(model, [[1]], max_new_tokens=20)[0]) >= 256
    tokenizer = load_tokenizer("bytes")
    assert max(attamba.generate(model, [[1]], max_new_tokens=20, tokenizer=tokenizer)[0]) < 256


# --------------------------------------------------------------------------------------------
# What it cost
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attamba", "transformer", "window", "recurrent"])
def test_stats(name):
    model, stats = build(MIXERS[name]), GenerationStats()
    attamba.generate(model, torch.ones(2, 30, dtype=torch.long), max_new_tokens=11, stats=stats)
    assert (stats.prompt_tokens, stats.new_tokens, stats.decode_tokens) == (60, 22, 20)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    assert stats.tokens_per_second == pytest.approx(20 / stats.decode_seconds)
    assert stats.cache_bytes_used == cache_bytes(model.config, 40, batch_size=2)
    assert stats.cache_bytes_allocated > stats.cache_bytes_used


def test_stats_count_no_padding_and_no_fill(model):
    stats = GenerationStats()
    assert stats.tokens_per_second == 0.0
    attamba.generate(model, PROMPTS, max_new_tokens=2, use_cache=False, stats=stats)
    assert (stats.prompt_tokens, stats.new_tokens) == (sum(map(len, PROMPTS)), 8)
    assert stats.cache_bytes_used == stats.cache_bytes_allocated == 0


# --------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "ids=[] holds no prompt"),
        (torch.zeros(0, 3, dtype=torch.long), "no prompt; give at least one row"),
        ([[1], []], "prompt 1 is empty: a prompt needs at least one token"),
        (torch.zeros(2, 0, dtype=torch.long), "ids is empty"),
        ([1, 2], "ids is one flat list; give a list of prompts: [ids]"),
        (torch.tensor([1, 2]), "ids has shape (2,); it must be [batch, tokens]"),
        (torch.ones(1, 2), "ids has dtype torch.float32; token ids must be integers"),
        (torch.ones(1, 2, dtype=torch.bool), "ids has dtype torch.bool"),
        ([[1, 256]], "prompt 0 contains 256; token ids must be from 0 to 255 (vocab_size=256)"),
        (torch.tensor([[1, -1]]), "ids contains -1"),
    ],
)
def test_prompts_that_cannot_be(model, ids, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stream(model, ids, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0 (0 is greedy)"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 must be at least 1"),
        ({"stop": "x"}, "stop=['x'] needs tokenizer="),
        ({"stop": [""], "tokenizer": load_tokenizer("bytes")}, "stop contains an empty string"),
        ({"ends": torch.ones(1, 4, dtype=torch.bool)}, 'ends is for boundary "given"'),
    ],
)
def test_options_that_cannot_be(model, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stream(model, [[1]], **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (None, 'boundary "given" needs ends=..., bool of shape [1, 7]'),
        (torch.ones(1, 6, dtype=torch.bool), "ends do not cover the sequence: they have 6 columns"),
        (torch.ones(1, 8, dtype=torch.bool), "ends reach past the sequence: they have 8 columns"),
        (torch.ones(1, 7), "dtype torch.float32; it must be bool"),
        (torch.ones(7, dtype=torch.bool), "ends has shape (7,)"),
    ],
)
def test_given_ends_that_do_not_fit(ends, message):
    model = build({"boundary": "given"})
    with pytest.raises(ValueError, match=re.escape(message)):
        stream(model, [[1, 2, 3]], max_new_tokens=4, ends=ends)
