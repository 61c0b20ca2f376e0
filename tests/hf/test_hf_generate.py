"""transformers' generate() over the decode cache gives the tokens that it gives without one."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import ATTAMBA, EVERY_KIND, MIXERS, VOCAB, build
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    TextIteratorStreamer,
    set_seed,
)
from transformers.generation import BaseStreamer

import attamba
from attamba.data import load_tokenizer
from attamba.hf import AttambaCache
from attamba.hf.tokenizer import save_for_transformers

NEW = 16


def prompt(rows=2, length=9):
    return torch.randint(1, VOCAB, (rows, length))  # 0 is for padding


def padded(lengths):
    """Prompts of these lengths, padded on the left, and their mask."""
    rows = [torch.randint(1, VOCAB, (length,)) for length in lengths]
    longest = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return rows, ids, mask.long()


def generate(model, ids, seed=0, **options):
    set_seed(seed)
    return model.generate(ids, **{"max_new_tokens": NEW, "pad_token_id": 0, **options})


def agree(model, ids, **options):
    """The tokens with the cache, which must be those without."""
    cached = generate(model, ids, **options)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    return cached


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", MIXERS)
def test_greedy(name, rows):
    decoder, model = build(MIXERS[name])
    ids = prompt(rows)
    assert torch.equal(agree(model, ids), attamba.generate(decoder, ids, max_new_tokens=NEW))


@pytest.mark.parametrize("name", MIXERS)
def test_left_padding(name):
    decoder, model = build(MIXERS[name])
    rows, ids, mask = padded([3, 9, 1])
    cached = agree(model, ids, attention_mask=mask)
    alone = attamba.generate(decoder, rows, max_new_tokens=NEW)
    for row, (got, want) in enumerate(zip(cached, alone)):
        assert torch.equal(got[-len(want) :], want), row


@pytest.mark.parametrize("name", EVERY_KIND)
def test_sampling_several(name):
    decoder, model = build(MIXERS[name])
    rows, ids, mask = padded([4, 9])
    options = {"attention_mask": mask, "do_sample": True, "num_return_sequences": 3}
    cached = agree(model, ids, top_k=0, **options)
    assert len({tuple(row.tolist()) for row in cached}) == 6
    # Both sample, each from random numbers of its own: of one candidate they draw the same.
    want = attamba.generate(decoder, rows, max_new_tokens=NEW, temperature=1.0, top_k=1)
    for i, row in enumerate(generate(model, ids, top_k=1, **options)):
        assert torch.equal(row[-len(want[i // 3]) :], want[i // 3])


@pytest.mark.parametrize("name", EVERY_KIND)
def test_beams(name):
    _, model = build(MIXERS[name])
    _, ids, mask = padded([4, 9])
    agree(model, ids, attention_mask=mask, num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("name", [*EVERY_KIND, "sliding"])
def test_chunked_prefill(name):
    decoder, model = build(MIXERS[name])
    rows, ids, mask = padded([20, 9])
    whole = generate(model, ids, attention_mask=mask, use_cache=False)
    for size in (1, 4, 50):
        got = generate(model, ids, attention_mask=mask, prefill_chunk_size=size)
        assert torch.equal(got, whole), size
        alone = attamba.generate(decoder, rows, max_new_tokens=NEW, prefill_chunk=size)
        for row, want in zip(got, alone):
            assert torch.equal(row[-len(want) :], want), size


@pytest.mark.parametrize("name", [kind for kind in EVERY_KIND if kind != "separator"])
def test_from_embeddings(name):
    _, model = build(MIXERS[name])
    _, ids, mask = padded([4, 9])
    options = {"attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": 0}
    options["inputs_embeds"] = model.get_input_embeddings()(ids)
    new = model.generate(**options)
    assert torch.equal(new, model.generate(**options, use_cache=False))
    assert torch.equal(new, generate(model, ids, attention_mask=mask)[:, ids.shape[1] :])


def test_boundaries_that_look_at_ids_need_them():
    _, model = build(MIXERS["separator"])
    embeds = model.get_input_embeddings()(prompt())
    with pytest.raises(ValueError, match="which inputs_embeds does not give"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_ended_rows(name):
    decoder, model = build(MIXERS[name])
    ids = prompt(4)
    eos = int(generate(model, ids)[0, ids.shape[1] + 3])
    cached = agree(model, ids, eos_token_id=eos, pad_token_id=eos)
    assert torch.equal(cached, attamba.generate(decoder, ids, max_new_tokens=NEW, eos_id=eos))


@pytest.mark.parametrize("name", EVERY_KIND)
def test_going_on_from_a_returned_cache(name):
    _, model = build(MIXERS[name])
    _, ids, mask = padded([5, 9])
    first = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, return_dict_in_generate=True
    )
    more = torch.cat([first.sequences, prompt(2, 3)], 1)
    mask = torch.cat([mask, torch.ones(2, more.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    fresh = generate(model, more, attention_mask=mask, use_cache=False)
    cache = first.past_key_values
    assert isinstance(cache, AttambaCache) and cache.seen == first.sequences.shape[1] - 1
    twin = copy.deepcopy(cache)
    whole = generate(model, more, attention_mask=mask, past_key_values=cache)
    assert torch.equal(whole, fresh)
    only_new = more[:, twin.seen :]
    tail = generate(model, only_new, attention_mask=mask, past_key_values=twin)
    assert torch.equal(tail, fresh[:, more.shape[1] - only_new.shape[1] :])


def test_a_prompt_kept_for_several_continuations():
    _, model = build()
    shared = prompt(1, 12)
    cache = AttambaCache()
    model(shared, past_key_values=cache)
    for _ in range(2):
        ids = torch.cat([shared, prompt(1, 4)], 1)
        got = generate(model, ids, past_key_values=copy.deepcopy(cache))
        assert torch.equal(got, generate(model, ids, use_cache=False))


def test_given_ends():
    decoder, model = build({**ATTAMBA, "boundary": "given"})
    ids = prompt()
    ends = torch.rand(2, ids.shape[1] + NEW) < 0.3
    want = attamba.generate(decoder, ids, max_new_tokens=NEW, ends=ends)
    assert torch.equal(agree(model, ids, ends=ends), want)
    assert torch.equal(generate(model, ids, ends=ends, prefill_chunk_size=4), want)


class Kept(BaseStreamer):
    """A streamer that keeps what it is given, and says when the end was."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("name", EVERY_KIND)
def test_streamed_tokens(name):
    decoder, model = build(MIXERS[name])
    ids, streamer, other = prompt(1), Kept(), Kept()
    generate(model, ids, streamer=streamer)
    generate(model, ids, streamer=other, use_cache=False)
    assert streamer.tokens == attamba.generate(decoder, ids, max_new_tokens=NEW)[0].tolist()
    assert streamer.ended and streamer.tokens == other.tokens


def test_text_streamer(tmp_path):
    own = load_tokenizer("bytes")
    save_for_transformers(own, tmp_path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    _, model = build(vocab_size=256)
    inputs = tokenizer("streams of text", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = generate(model, **inputs | {"ids": inputs.pop("input_ids")}, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, -NEW:])


def test_training_on_what_was_generated():
    """generate() runs in inference mode, and nothing of it stays in the model or its tokens."""
    _, model = build(MIXERS["hybrid"])
    for options in ({}, {"num_beams": 2}, {"return_dict_in_generate": True}):
        out = generate(model, prompt(), **options)
        tokens = out.sequences if options.get("return_dict_in_generate") else out
        assert not tokens.is_inference()
        tokens += 0
        model(tokens, labels=tokens).loss.backward()
    kept = list(out.past_key_values.decode.tensors())
    assert kept and not any(tensor.is_inference() for tensor in kept)


# --------------------------------------------------------------------------------------------
# What cannot work
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded", "offloaded_static"])
def test_caches_of_other_kinds(kind):
    _, model = build()
    with pytest.raises(ValueError, match=f"cache_implementation='{kind}' cannot hold chunks"):
        generate(model, prompt(), cache_implementation=kind)


def test_paged_cache():
    _, model = build()
    with pytest.raises(ValueError, match="paged cache of every token"):
        generate(model, prompt(), cache_implementation="paged")


def test_another_models_cache():
    _, model = build()
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        generate(model, prompt(), past_key_values=DynamicCache())


def test_assisted_decoding():
    _, model = build()
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, prompt(1), assistant_model=build()[1])
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, prompt(1), prompt_lookup_num_tokens=3)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    with pytest.raises(ValueError, match="generate without an assistant"):
        generate(llama, prompt(1), assistant_model=model)


def test_right_padding():
    _, model = build()
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with pytest.raises(ValueError, match="pad prompts on the left"):
        generate(model, prompt(), attention_mask=mask)


def test_a_cache_does_not_go_back():
    _, model = build()
    cache = model(prompt()).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match="cannot drop tokens"):
        cache.crop(1)
    with pytest.raises(ValueError, match="without an assistant"):
        cache.activate_past_recording()
    with pytest.raises(ValueError, match="another model's keys"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_rows_of_a_cache():
    _, model = build()
    ids = prompt(3)
    cache = model(ids).past_key_values
    assert (cache.batch_size, cache.get_seq_length(), len(cache)) == (3, 9, 2)
    assert cache.get_mask_sizes(2, 0) == (11, 0) and cache.get_max_length() == -1
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    order = torch.tensor([2, 2, 0, 0])
    step = torch.randint(VOCAB, (4, 1))
    want = model(torch.cat([ids[order], step], 1)).logits[:, -1]
    got = model(step, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert "10 tokens" in repr(cache)
    cache.reset()
    assert (cache.batch_size, cache.seen) == (-1, 0)
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_a_cache_that_has_seen_all_that_is_given_is_refused():
    _, model = build(ATTAMBA)
    ids = prompt(1)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has seen 9 tokens and input_ids has 9; give those that"):
        model.generate(ids, past_key_values=cache, max_new_tokens=3)
