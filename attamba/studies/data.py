"""The texts of studies: prepared folders train, valid and wikitext2 in one folder.

At full scale `attamba study prepare` makes them from files that it is given; at tiny scale they
are a few files of Python's own standard library, byte by byte.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba.config import ConfigError

if TYPE_CHECKING:
    from attamba.data import Document, Tokenizer

Say = Callable[[str], None]

TEXTS = ("train", "valid", "wikitext2")
DATA = Path("data/study")
"""Where studies look for their texts."""
WIKITEXT_TITLES = r"^ = [^=].* = $"
"""Lines at which the articles of WikiText begin."""
TINY_FILES = {"train": 24, "valid": 3, "wikitext2": 3}
TINY_BYTES = 40_000
"""Longest file of tiny texts."""


def prepare_texts(
    out: Path,
    train: str,
    valid: str,
    wikitext: str | None,
    *,
    vocab_size: int,
    tokenizer_share: int = 3,
    documents: int | None = None,
    say: Say = print,
) -> None:
    """A BPE of vocab_size, trained on one document in `tokenizer_share`, and the texts by it.

    documents: of the training text, the first so many. Whole folders that are there are kept: the
    same command goes on where it was stopped.
    """
    from attamba.data import is_prepared, load_tokenizer, prepare, read_documents, train_bpe

    folder = out / "tokenizer"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as name:
            part = Path(name) / "part.jsonl"
            chosen = itertools.islice(read_documents(train), documents)
            _write_jsonl(part, itertools.islice(chosen, None, None, tokenizer_share))
            tokenizer = train_bpe(part, vocab_size, folder)
        say(f"{folder}: a BPE of {tokenizer.vocab_size:,} tokens")
    tokenizer = load_tokenizer(str(folder))
    for text, paths, split_on in (
        ("valid", valid, None),
        ("wikitext2", wikitext, WIKITEXT_TITLES),
        ("train", train, None),
    ):
        if paths is None or is_prepared(out / text):
            continue
        if text == "train" and documents is not None:
            dataset = _prepare_some(train, documents, out / text, tokenizer)
        else:
            dataset = prepare(paths, out / text, tokenizer, split_on=split_on)
        say(f"{out / text}: {dataset.n_documents:,} documents, {dataset.n_tokens:,} tokens")


def _prepare_some(paths: str, documents: int, out: Path, tokenizer: Tokenizer) -> Any:
    from attamba.data import prepare, read_documents

    with tempfile.TemporaryDirectory() as name:
        part = Path(name) / "train.jsonl"
        _write_jsonl(part, itertools.islice(read_documents(paths), documents))
        return prepare(part, out, tokenizer)


def _write_jsonl(path: Path, documents: Iterable[Document]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text}) + "\n")


def tiny_texts(out: Path) -> Path:
    """Make the tiny texts below `out`, if they are not there, and return their folder."""
    from attamba.data import is_prepared, load_tokenizer, prepare
    from attamba.demo.corpus import stdlib_files

    missing = [text for text in TEXTS if not is_prepared(out / text)]
    if missing:
        files = [path for path in stdlib_files()[0] if path.stat().st_size < TINY_BYTES]
        rest = iter(files)
        shares = {text: list(itertools.islice(rest, n)) for text, n in TINY_FILES.items()}
        for text in missing:
            prepare([str(path) for path in shares[text]], out / text, load_tokenizer("bytes"))
    return out


def check_texts(folder: Path, texts: Iterable[str]) -> None:
    """Raise ConfigError for a text that is not in `folder`."""
    from attamba.data import is_prepared

    for text in texts:
        if not is_prepared(folder / text):
            raise ConfigError(
                f"--data={folder} holds no prepared folder {text!r}; make one with "
                f"attamba study prepare, or name another folder"
            )


def separator_ids(tokenizer: Tokenizer, kind: str) -> list[int]:
    """Ids at which text may be cut: those of "punctuation" (nothing else but space around it), or
    of "words" (a space, alone or before a word, or a line's end).

    Raises ConfigError for another kind, and where the tokenizer has none.
    """
    import string

    def is_punctuation(text: str) -> bool:
        return "\n" in text or (bool(text.strip()) and set(text.strip()) <= set(string.punctuation))

    def is_word(text: str) -> bool:
        return text[:1].isspace()

    kinds = {"punctuation": is_punctuation, "words": is_word}
    if kind not in kinds:
        raise ConfigError(
            f"boundary.tokens={kind!r} must be a list of ids, or one of: {', '.join(kinds)}"
        )
    chosen = [i for i in range(tokenizer.vocab_size) if kinds[kind](tokenizer.decode([i]))]
    if not chosen:
        raise ConfigError(f"boundary.tokens={kind}: the tokenizer has no such token")
    return chosen
