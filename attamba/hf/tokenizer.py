"""A checkpoint's tokenizer as transformers' AutoTokenizer reads it, with the same ids.

The separator is put before each text, as in training, and stands for the end of generation and for
padding too. Text that spells a special token is text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from attamba.data import DataError, Tokenizer
from attamba.data.tokenizer import SEPARATOR, SentencePieceTokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Plain text, for tools that insist on one: nothing here was trained to chat. The separator is not
put before it, since no text may spell it."""

PROBES = (
    'The quick brown fox, 1234567 times: it\'s "done".',
    "  two  spaces\tand\n\nlines ",
    "naïve café — 你好, мир! 🙂",
    "def f(x):\n    return x ** 2  # <|endoftext|> </s>",
    "x",
)
"""Texts that both tokenizers must read alike."""


def save_for_transformers(tokenizer: Tokenizer, saved: Path, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`.

    saved: where the tokenizer's own save() wrote.

    Raises DataError for a SentencePiece model that they cannot reproduce id by id.
    """
    backend = _backend(tokenizer, saved)
    separator = backend.id_to_token(tokenizer.eos_id)
    _begin_with(backend, separator)
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": separator,
        "eos_token": separator,
        "pad_token": separator,
        "split_special_tokens": True,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    check_same_ids(tokenizer, folder)


def check_same_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """Raises DataError unless transformers' tokenizer in `folder` gives the same ids."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in PROBES:
        want = [tokenizer.eos_id, *tokenizer.encode(text)]
        got = theirs(text)["input_ids"]
        if got != want:
            raise DataError(
                f"the {tokenizer.kind} tokenizer gives {want[:12]}... for {text!r}, its copy for "
                f"transformers {got[:12]}...; train a byte-level BPE (attamba data tokenizer) to "
                f"use the model there"
            )


def _backend(tokenizer: Tokenizer, saved: Path) -> Any:
    """The tokenizer as a tokenizers.Tokenizer."""
    from tokenizers import Tokenizer as Backend

    if tokenizer.filename is None:
        return _bytes_as_bpe()
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece((saved / tokenizer.filename).read_bytes())
    return Backend.from_file(str(saved / tokenizer.filename))


def _begin_with(backend: Any, separator: str) -> None:
    """Put the separator before each text that is encoded with special tokens."""
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(
        single=f"{separator}:0 $A:0",
        pair=f"{separator}:0 $A:0 {separator}:1 $B:1",
        special_tokens=[(separator, backend.token_to_id(separator))],
    )


def _bytes_as_bpe() -> Any:
    """A BPE without merges: every byte is a token, and its id is its value. 0 separates."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocabulary = {SEPARATOR: 0} | {_visible(byte): byte for byte in range(1, 256)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    return backend


def _visible(byte: int) -> str:
    """The character that stands for a byte in byte-level vocabularies (as in GPT-2).

    Printable characters of Latin-1 stand for themselves, the others follow U+0100 in order.
    """
    hidden = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    return chr(0x100 + hidden.index(byte)) if byte in hidden else chr(byte)


def _sentencepiece(content: bytes) -> Any:
    """A SentencePiece model of kind Unigram or BPE; check_same_ids tells whether it is the same."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    messages: Any = sentencepiece_model_pb2  # its classes are made at run time
    proto = messages.ModelProto.FromString(content)
    train, norm = proto.trainer_spec, proto.normalizer_spec
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)
    unknown_piece = proto.pieces[unknown].piece
    control = [piece.piece for piece in proto.pieces if piece.type == piece.CONTROL]
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    model: Any
    if train.model_type == train.UNIGRAM:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=train.byte_fallback)
    else:
        model = models.BPE(
            vocab={piece: i for i, (piece, _) in enumerate(pieces)},
            merges=_merges([piece for piece in pieces if piece[0] not in control]),
            unk_token=unknown_piece,
            fuse_unk=True,
            byte_fallback=train.byte_fallback,
        )
    backend = Backend(model)
    steps: list[Any] = []
    if norm.precompiled_charsmap:
        steps.append(normalizers.Precompiled(norm.precompiled_charsmap))
    if norm.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if norm.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", "▁"))
    backend.normalizer = normalizers.Sequence(steps)
    joined: list[Any] = [decoders.Replace(unknown_piece, " ⁇ "), decoders.Replace("▁", " ")]
    joined += [decoders.ByteFallback(), decoders.Fuse()]
    if norm.add_dummy_prefix:
        joined.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(joined)
    # Text that spells a control piece is text: it is cut before the piece's last character.
    cuts = [Regex(f"{re.escape(piece[:-1])}(?={re.escape(piece[-1])})") for piece in control]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "merged_with_previous") for pattern in cuts]
    )
    backend.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in control])
    return backend


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the best-scored piece first."""
    rank = {piece: -score for piece, score in pieces}
    found = [
        (rank[piece], piece[:cut], piece[cut:])
        for piece, _ in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in rank and piece[cut:] in rank
    ]
    return [(left, right) for _, left, right in sorted(found, key=lambda item: item[0])]
