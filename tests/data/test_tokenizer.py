import io
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attamba.data import DataError, StreamDecoder, load_tokenizer, train_bpe
from attamba.data import pieces as pieces_module

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "dog",
    "naïve",
    "Käfer",
    "你好",
    "🎉👩\u200d👩\u200d👧",
    "{x:",
    "1}",
]


def corpus(n=3000, seed=0):
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice("     \n") for _ in range(n))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with every kind of tokenizer: bpe.json and sp.model, trained on the same text."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "corpus.txt").write_text(corpus())
    train_bpe(folder / "corpus.txt", 400, folder / "bpe.json")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus().splitlines()),
        model_writer=model,
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "sp.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module", params=["bytes", "bpe.json", "sp.model"])
def tokenizer(request, folder):
    return load_tokenizer(request.param if request.param == "bytes" else folder / request.param)


# SentencePiece writes spaces as U+2581, and so reads that character as a space.
TEXT = st.text(st.characters(exclude_characters="\0\u2581", exclude_categories=["Cs"]), max_size=80)
LIKELY = st.lists(
    st.sampled_from([*WORDS, " ", "  ", "\n", "\ufffd", "<|endoftext|>", "</s>"])
).map("".join)


@settings(deadline=None)
@given(text=TEXT | LIKELY)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(deadline=None)
@given(text=TEXT | LIKELY, data=st.data())
def test_stream_decoder_of_text(tokenizer, text, data):
    ids = tokenizer.encode(text)
    for place in data.draw(st.lists(st.integers(0, len(ids)), max_size=2)):
        ids.insert(place, tokenizer.eos_id)
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids] + [decoder.flush()]
    assert "".join(parts) == tokenizer.decode(ids)
    assert decoder.flush() == ""


@settings(deadline=None)
@given(data=st.data())
def test_stream_decoder_of_random_ids(tokenizer, data):
    """What an untrained model says: broken UTF-8 included."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=100))
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids] + [decoder.flush()]
    assert "".join(parts) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "text", [corpus(400, seed=1), "\n" * 300 + "x", "你好🎉" * 100, " a" * 200]
)
def test_stream_decoder_of_long_text(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) + decoder.flush() == text
    assert len(decoder._ids) <= 40  # memory and time per token stay bounded


def test_stream_decoder_never_gives_half_a_character(tokenizer):
    text = "a👩‍👩‍👧 b🎉"
    decoder, said = StreamDecoder(tokenizer), ""
    for i in tokenizer.encode(text):
        said += decoder.push(i)
        assert text.startswith(said)
    assert said == text


def test_stream_decoder_keeps_the_space_after_a_prompt(tokenizer):
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("the quick brown")
    said = [decoder.push(i) for i in ids]
    assert "".join(said) == "the quick brown"
    n = len(tokenizer.encode("the quick"))
    assert ids[:n] == tokenizer.encode("the quick")
    assert "".join(said[n:]) == " brown"


def test_encode_batch_is_encode(tokenizer):
    texts = ["", "fox", corpus(50), "dog"]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert all(np.issubdtype(ids.dtype, np.integer) for ids in batch)


def test_a_long_text_is_tokenized_in_pieces_without_a_change(folder, monkeypatch):
    tokenizer = load_tokenizer(folder / "bpe.json")
    text = corpus(4000, seed=2) + "\n\n  x\n" * 30 + "a.\nb"
    whole = tokenizer._tokenizer.encode(text).ids
    monkeypatch.setattr(pieces_module, "PIECE", 50)
    monkeypatch.setattr(pieces_module, "BATCH", 500)
    parts = list(pieces_module.cut(text))
    assert len(parts) > 50 and "".join(parts) == text
    assert tokenizer.encode(text) == whole


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert again.meta() == tokenizer.meta()
    assert again.encode("quick 🎉 fox") == tokenizer.encode("quick 🎉 fox")
    assert not [path for path in (tmp_path / "t").iterdir() if path.name.startswith(".")]


def test_fingerprints_differ(folder):
    specs = ["bytes", folder / "bpe.json", folder / "sp.model"]
    prints = {load_tokenizer(spec).fingerprint for spec in specs}
    assert len(prints) == 3
    assert all(len(fingerprint) == 64 for fingerprint in prints)


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.kind) == (256, 0, "bytes")
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3]) == "\ufffd"
    with pytest.raises(DataError, match=r"the text holds NUL \(at byte 1\)"):
        tokenizer.encode("a\0")


def test_ids_out_of_range(tokenizer):
    for wrong in (tokenizer.vocab_size, -1):
        with pytest.raises(DataError, match=f"token id {wrong} is not in this tokenizer's vocab"):
            tokenizer.decode([1, wrong])


def test_text_that_spells_the_separator_stays_text(folder):
    tokenizer = load_tokenizer(folder / "bpe.json")
    assert tokenizer.encode("<|endoftext|>") != [tokenizer.eos_id]
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_inference_settings_of_a_tokenizer_json_do_not_touch_documents(folder, tmp_path):
    config = json.loads((folder / "bpe.json").read_text())
    raw = tokenizers.Tokenizer.from_str(json.dumps(config))
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    raw.save(str(tmp_path / "t.json"))
    text = corpus(30)
    expected = load_tokenizer(folder / "bpe.json").encode(text)
    assert load_tokenizer(tmp_path / "t.json").encode(text) == expected


# train_bpe


def test_train_bpe(folder, tmp_path):
    tokenizer = train_bpe(folder / "corpus.txt", 300, tmp_path / "t")
    assert (tokenizer.vocab_size, tokenizer.kind, tokenizer.eos_id) == (300, "hf", 0)
    assert load_tokenizer(tmp_path / "t").fingerprint == tokenizer.fingerprint
    text = corpus(100)
    assert len(tokenizer.encode(text)) < 0.8 * len(text.encode())
    again = train_bpe(folder / "corpus.txt", 300, tmp_path / "t.json")
    assert again.fingerprint == tokenizer.fingerprint


def test_train_bpe_on_little_text_gives_fewer_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("ab ab")
    tokenizer = train_bpe(tmp_path / "a.txt", 5000, tmp_path / "t.json")
    assert 257 <= tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode("🎉")) == "🎉"


def test_train_bpe_refuses(tmp_path):
    with pytest.raises(DataError, match="vocab_size=256 must be at least 257"):
        train_bpe("a.txt", 256, tmp_path / "t.json")
    with pytest.raises(DataError, match=r"no\.txt does not exist"):
        train_bpe(tmp_path / "no.txt", 300, tmp_path / "t.json")
    (tmp_path / "a.txt").write_text("ab ab")
    with pytest.raises(DataError, match=r"a\.txt is a file; name a folder or a \.json file"):
        train_bpe(tmp_path / "a.txt", 300, tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbroken\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON"):
        train_bpe(tmp_path / "a.jsonl", 300, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


# Bad tokenizers


def test_unknown_spec():
    with pytest.raises(DataError, match="tokenizer='gpt2' is none; give bytes"):
        load_tokenizer("gpt2")


@pytest.mark.parametrize("name", ["t.json", "t.model"])
def test_missing_or_broken_file(tmp_path, name):
    with pytest.raises(DataError, match=f"{name} does not exist"):
        load_tokenizer(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff{}")
    with pytest.raises(DataError, match=f"{name} is not a "):
        load_tokenizer(tmp_path / name)


def test_no_separator(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"no special token to separate.*add_special_tokens"):
        load_tokenizer(tmp_path / "t.json")


def test_sentencepiece_without_eos(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(500).splitlines()),
        model_prefix=str(tmp_path / "t"),
        vocab_size=100,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(DataError, match="no end-of-sentence piece"):
        load_tokenizer(tmp_path / "t.model")


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer_meta\.json"):
        load_tokenizer(tmp_path)


def test_altered_folder(folder, tmp_path):
    load_tokenizer(folder / "bpe.json").save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = file.read_text()
    file.write_text(content.replace("<|endoftext|>", "</s>"))
    with pytest.raises(DataError, match="altered after it was saved"):
        load_tokenizer(tmp_path)
    file.write_text(content)
    meta = json.loads((tmp_path / "tokenizer_meta.json").read_text())
    (tmp_path / "tokenizer_meta.json").write_text(json.dumps({**meta, "eos_id": 5}))
    with pytest.raises(DataError, match="altered after it was saved"):
        load_tokenizer(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "magic"}'])
def test_damaged_meta(tmp_path, content):
    (tmp_path / "tokenizer_meta.json").write_text(content)
    with pytest.raises(DataError, match="save the tokenizer again"):
        load_tokenizer(tmp_path)
