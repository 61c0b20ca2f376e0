"""Tokenizers: bytes, Hugging Face ``tokenizer.json``, SentencePiece ``.model``.

Every tokenizer has one separator, ``eos_id``, which stands before each document and for no text:
encode never yields it, whatever the text says, and decode gives nothing for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .errors import DataError, require
from .files import write_aside
from .inputs import Paths
from .pieces import batched, cut
from .reader import read_documents

META = "tokenizer_meta.json"
SEPARATOR = "<|endoftext|>"
SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
"""Special tokens of a tokenizer.json that can separate documents, the first found is taken."""

_CONTEXT = 16
"""Ids that a StreamDecoder decodes a new id after, at least."""


class Tokenizer(ABC):
    """Text to ids and back."""

    kind: ClassVar[str]
    """bytes, hf or sentencepiece."""
    filename: ClassVar[str | None]
    """The file that save writes beside tokenizer_meta.json."""
    frees_threads: ClassVar[bool] = False
    """Do other threads run while it encodes?"""

    def __init__(self, content: bytes, vocab_size: int, eos_id: int) -> None:
        self.vocab_size = vocab_size
        """V; every id is below it."""
        self.eos_id = eos_id
        """The separator put before each document."""
        self.fingerprint = hashlib.sha256(self.kind.encode() + b"\n" + content).hexdigest()
        """SHA-256 of the tokenizer's content, in hex; equal for equal tokenizers."""
        self._content = content

    def __reduce__(self) -> tuple[Any, ...]:
        # By its file: what the library's own pickle keeps of its settings is its affair.
        return type(self), (self._content,) if self.filename else ()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token."""
        return self.encode_batch([text])[0].tolist()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 or uint8 [n_tokens]; on all cores where the tokenizer can."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens left out and broken UTF-8 as U+FFFD.

        Raises DataError for an id outside [0, vocab_size).
        """
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise DataError(
                f"token id {wrong} is not in this tokenizer's vocabulary of {self.vocab_size}; "
                f"decode with the tokenizer that made the ids"
            )
        return self._decode([i for i in ids if i != self.eos_id])

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def meta(self) -> dict[str, Any]:
        """What tokenizer_meta.json holds."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "fingerprint": self.fingerprint,
        }

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's file, unchanged, and tokenizer_meta.json into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.filename:
            write_aside(folder / self.filename, self._content)
        write_aside(folder / META, (json.dumps(self.meta(), indent=2) + "\n").encode())


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids. The separator is 0, NUL, which no text holds."""

    kind = "bytes"
    filename = None

    def __init__(self) -> None:
        super().__init__(b"", vocab_size=256, eos_id=0)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(self._bytes(text), dtype=np.uint8) for text in texts]

    def _bytes(self, text: str) -> bytes:
        data = text.encode()
        if b"\0" in data:
            raise DataError(
                f"the text holds NUL (at byte {data.index(0)}), which separates documents; "
                f"remove it"
            )
        return data

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class HFTokenizer(Tokenizer):
    """A Hugging Face ``tokenizer.json``; `content` is the file, `name` is for messages."""

    kind = "hf"
    filename = "tokenizer.json"
    frees_threads = True

    def __init__(self, content: bytes, name: str = "tokenizer.json") -> None:
        try:
            self._tokenizer = require("tokenizers").Tokenizer.from_str(content.decode())
        except ImportError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise DataError(
                f"{name} is not a Hugging Face tokenizer.json ({error}); give the file that "
                f"tokenizers' save() writes"
            ) from error
        # What the file asks of a batch for inference would cut or pad documents here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that spells a special token is text: it must not become one.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        eos = next((special[name] for name in SEPARATORS if name in special), None)
        if eos is None:
            raise DataError(
                f"{name} has no special token to separate documents (looked for: "
                f"{', '.join(SEPARATORS)}); add one with "
                f"tokenizers.Tokenizer.add_special_tokens([{SEPARATOR!r}]) and save it again"
            )
        size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(content, vocab_size=size, eos_id=eos)
        self._cuttable = _cuttable(json.loads(content))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces: list[str] = []
        ends: list[int] = []
        for text in texts:
            pieces.extend(cut(text) if self._cuttable else [text])
            ends.append(len(pieces))
        ids = [array for batch in _batched(pieces) for array in self._encode(batch)]
        starts = [0, *ends[:-1]]
        return [np.concatenate(ids[start:end]) for start, end in zip(starts, ends)]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model``; `content` is the file, `name` is for messages.

    Whether text survives a round trip unchanged is the model's affair (its normalisation).
    """

    kind = "sentencepiece"
    filename = "tokenizer.model"

    def __init__(self, content: bytes, name: str = "tokenizer.model") -> None:
        package = require("sentencepiece")
        try:
            self._processor = package.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(
                f"{name} is not a SentencePiece model ({error}); give the .model file that "
                f"training wrote"
            ) from error
        eos = self._processor.eos_id()
        if eos < 0:
            raise DataError(
                f"{name} has no end-of-sentence piece to separate documents; train it with "
                f"eos_id >= 0"
            )
        super().__init__(content, vocab_size=self._processor.vocab_size(), eos_id=eos)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self._processor.encode(list(texts), num_threads=os.cpu_count() or 1)
        return [np.array(one, dtype=np.int32) for one in ids]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids) if ids else ""


_FILES: dict[str, type[HFTokenizer] | type[SentencePieceTokenizer]] = {
    ".json": HFTokenizer,
    ".model": SentencePieceTokenizer,
}


class StreamDecoder:
    """Text of ids that come one at a time.

    The texts that push and flush return concatenate to decode(all ids). A character whose bytes
    are spread over several tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # characters of decode(self._ids) already returned

    def push(self, token_id: int) -> str:
        """Take one id; return the text that it completes, often none."""
        if token_id == self._tokenizer.eos_id:
            return ""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids)
        # An unfinished character is up to 3 bytes, which decode to as many U+FFFD or to fewer.
        held = min(3, len(text) - len(text.rstrip("\ufffd")))
        new = self._give(text, len(text) - held)
        if len(self._ids) > 2 * _CONTEXT:
            self._forget(text)
        return new

    def flush(self) -> str:
        """Return what was held back; the next push begins a new text."""
        text = self._tokenizer.decode(self._ids)
        new = self._give(text, len(text))
        self._ids, self._given = [], 0
        return new

    def _give(self, text: str, end: int) -> str:
        new = text[self._given : end]
        self._given = max(self._given, end)
        return new

    def _forget(self, text: str) -> None:
        """Drop the ids before the last _CONTEXT, where those decode alone as they do here.

        Some ids stay, because decoding treats a text's first word apart (a leading space goes).
        """
        tail = self._tokenizer.decode(self._ids[-_CONTEXT:])
        given = self._given - (len(text) - len(tail))
        if tail and given >= 0 and text.endswith(tail):
            self._ids, self._given = self._ids[-_CONTEXT:], given


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a tokenizer.

    spec: ``"bytes"``, a Hugging Face ``*.json``, a SentencePiece ``*.model``, or a folder in which
        Tokenizer.save wrote.

    Raises DataError if there is no such thing, if it cannot be read, or if a file in the folder
    was altered after save.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        return _load_folder(path)
    if path.suffix not in _FILES:
        raise DataError(
            f"tokenizer={str(spec)!r} is none; give bytes, a Hugging Face tokenizer.json, a "
            f"SentencePiece .model, or a folder that a tokenizer was saved in"
        )
    return _FILES[path.suffix](_content(path), str(path))


def _load_folder(folder: Path) -> Tokenizer:
    file = folder / META
    if not file.is_file():
        raise DataError(
            f"{folder} holds no {META}, so no tokenizer was saved there; name the tokenizer.json "
            f"or .model file itself"
        )
    try:
        meta = json.loads(file.read_bytes())
        kind = meta["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error!r}); save the tokenizer again") from error
    tokenizer: Tokenizer
    if kind == ByteTokenizer.kind:
        tokenizer = ByteTokenizer()
    else:
        classes = {cls.kind: cls for cls in _FILES.values()}
        if kind not in classes:
            raise DataError(f"{file}: kind {kind!r} is unknown; save the tokenizer again")
        path = folder / classes[kind].filename
        tokenizer = classes[kind](_content(path), str(path))
    if tokenizer.meta() != meta:
        raise DataError(
            f"{folder}: the tokenizer was altered after it was saved (fingerprint "
            f"{tokenizer.fingerprint[:12]}, {META} says {str(meta.get('fingerprint'))[:12]}); "
            f"restore the file, or save the tokenizer again and prepare the data anew"
        )
    return tokenizer


def train_bpe(
    paths: Paths,
    vocab_size: int,
    out: str | Path,
    *,
    split_on: str | None = None,
    text_key: str = "text",
) -> Tokenizer:
    """Train a lossless byte-level BPE and write it.

    paths, split_on, text_key: as read_documents takes them.
    vocab_size: tokens, the 256 bytes and the separator <|endoftext|> (id 0) included; at least
        257. A text with too few different words yields fewer: see the result's vocab_size.
    out: a ``.json`` file, or a folder, in which tokenizer.json and tokenizer_meta.json are put.

    Raises DataError for what read_documents refuses, and a vocab_size or out that cannot be.
    """
    if vocab_size < 257:
        raise DataError(
            f"vocab_size={vocab_size} must be at least 257: the 256 bytes and {SEPARATOR}"
        )
    out = Path(out)
    if out.is_file() and out.suffix != ".json":
        raise DataError(f"out={out} is a file; name a folder or a .json file to write")
    package = require("tokenizers")
    byte_level = package.pre_tokenizers.ByteLevel
    bpe = package.Tokenizer(package.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    documents = read_documents(paths, split_on=split_on, text_key=text_key)
    pieces = (piece for document in documents for piece in cut(document.text))
    bpe.train_from_iterator(_batched(pieces), trainer=trainer)
    tokenizer = HFTokenizer(bpe.to_str(pretty=True).encode())
    if out.suffix == ".json":
        out.parent.mkdir(parents=True, exist_ok=True)
        write_aside(out, tokenizer._content)
    else:
        tokenizer.save(out)
    return tokenizer


def _cuttable(config: dict[str, Any]) -> bool:
    """May a text be cut before it is tokenized? Where a piece's beginning is not treated apart."""
    pre = config.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    return (
        config.get("normalizer") is None
        and {step.get("type") for step in steps} <= {"ByteLevel", "Split", "Digits"}
        and bool(levels)
        and not any(step.get("add_prefix_space") for step in levels)
        and any(step.get("type") == "Split" or step.get("use_regex") for step in steps)
    )


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    return batched((len(text), text) for text in texts)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"tokenizer file {path} does not exist; check the path") from error
