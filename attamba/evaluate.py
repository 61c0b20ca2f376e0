"""How well a model predicts documents: nats, perplexities, bits per byte, by position.

A document is read as [eos, t_1, ..., t_n]; t_1 to t_n are scored, each once. Shapes: B windows,
T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attamba.data.reader import Document
from attamba.data.shards import TokenDataset, TokenizedDocument
from attamba.models import Decoder
from attamba.models.registry import future_policy

if TYPE_CHECKING:
    from attamba.data.tokenizer import Tokenizer

Text = str | Document | TokenizedDocument

PIECE = 1024
"""Tokens per forward pass where a whole document goes through the cache."""
LOGITS = 1 << 24
"""Logits held at a time (64 MiB in float32)."""
FIRST_BUCKET = 16
"""Documents' first positions, counted together; each later bucket is twice as long."""


@dataclass(frozen=True)
class Bucket:
    """Tokens at positions [start, stop) of their documents, the first token being at 0."""

    start: int
    stop: int
    nats: float
    """Mean over the n tokens."""
    n: int


@dataclass(frozen=True)
class EvalResult:
    """A score, with what it was measured on and how."""

    nats_per_token: float
    perplexity: float
    """Per token: exp(nats_per_token)."""
    word_perplexity: float
    """exp(nats / words); words are those of the text, split at white space."""
    bits_per_byte: float
    """nats / ln 2 / UTF-8 bytes of the text."""
    n_tokens: int
    n_words: int
    n_bytes: int
    n_documents: int
    context: int | None
    """Inputs of a window, the document's separator included; None: the whole document."""
    stride: int | None
    """Tokens from a window's begin to the next; None with the whole document."""
    by_position: list[Bucket] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; what is not finite becomes None."""
        return finite(dataclasses.asdict(self))


@torch.inference_mode()
def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Iterable[Text],
    *,
    context: int | None = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Score documents.

    Args:
        model: its mode is restored. Scores are means over what it says in eval mode.
        tokenizer: the one that the model was trained with.
        documents: texts, or what TokenDataset.documents gives; empty ones are passed over.
        context: inputs of a window. A document that is longer is read in windows: the first
            tokens have what stands before them, later ones at least context - stride inputs.
            None: one context for the whole document, read through the decode cache.
        stride: tokens by which windows advance, 1 to context. Default: context // 2, at least 1.
        batch_size: windows per forward pass.
        max_documents, max_tokens: stop there. A document is cut at max_tokens, at a whole
            character, and its words and bytes are those of the part that is scored.
        progress: called now and then with the number of tokens scored so far.

    Raises:
        ValueError: an option out of its range, a vocabulary that does not fit, boundary
            "given", or no text.
    """
    stride = _check(model, tokenizer, context, stride, batch_size, max_documents, max_tokens)
    tally = _Tally(tokenizer, progress)
    chosen = tally.counted(take(documents, tokenizer, max_documents, max_tokens))
    was_training = model.training
    model.eval()
    try:
        for nats, position in _scores(model, tokenizer.eos_id, chosen, context, stride, batch_size):
            tally.add(nats, position)
    finally:
        model.train(was_training)
    return tally.result(context, stride)


# --------------------------------------------------------------------------------------------
# Windows
# --------------------------------------------------------------------------------------------


class _Window(NamedTuple):
    """Inputs of one window, the targets after them, and how many targets at its end to score."""

    inputs: np.ndarray
    targets: np.ndarray
    scored: int
    begin: int
    """Position in the document of the first target."""


def _scores(
    model: Decoder,
    eos_id: int,
    documents: Iterable[TokenizedDocument],
    context: int | None,
    stride: int | None,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(nats float64 [n], positions int64 [n]) of groups of tokens, in any order."""
    if context is None:
        for document in documents:
            yield from _through_cache(model, with_separator(document, eos_id))
        return
    assert stride is not None
    windows = (
        window
        for document in documents
        for window in _windows(with_separator(document, eos_id), context, stride)
    )
    # Windows of like lengths go together; a buffer bounds how many wait.
    while buffer := list(islice(windows, 16 * batch_size)):
        buffer.sort(key=lambda w: len(w.inputs))
        for i in range(0, len(buffer), batch_size):
            yield _forward(model, buffer[i : i + batch_size])


def _windows(ids: np.ndarray, context: int, stride: int) -> Iterator[_Window]:
    """Windows over ids [n + 1] that score each of the n targets once.

    The last one is moved back until it is full, which gives its tokens more context, not less.
    """
    n, done, begin = len(ids) - 1, 0, 0
    while done < n:
        begin = max(0, min(begin, n - context))
        end = min(begin + context, n)
        yield _Window(ids[begin:end], ids[begin + 1 : end + 1], end - done, begin)
        begin, done = begin + stride, end


def _forward(model: Decoder, windows: list[_Window]) -> tuple[Tensor, Tensor]:
    """Score windows. Shorter ones are filled up at the right, where nothing looks."""
    longest = max(len(w.inputs) for w in windows)
    inputs = np.zeros((len(windows), longest), dtype=np.int64)
    targets = np.zeros_like(inputs)
    scored = np.zeros(inputs.shape, dtype=bool)
    positions = np.zeros_like(inputs)
    for row, window in enumerate(windows):
        length = len(window.inputs)
        inputs[row, :length] = window.inputs
        targets[row, :length] = window.targets
        scored[row, length - window.scored : length] = True
        positions[row] = window.begin + np.arange(longest)
    device = model.embed.weight.device
    doc_ids = filling(model, [len(w.inputs) for w in windows], longest)
    hidden = model(torch.from_numpy(inputs).to(device), doc_ids=doc_ids, return_hidden=True)
    keep = torch.from_numpy(scored)
    wanted = torch.from_numpy(targets)[keep].to(device)
    return _nats(model, hidden[keep.to(device)], wanted), torch.from_numpy(positions)[keep]


def filling(model: Decoder, lengths: list[int], longest: int) -> Tensor | None:
    """doc_ids [B, longest] of rows that are filled up at the right, or None where nothing looks.

    Causal models need none. A boundary policy that looks at later tokens must be told that they
    are another document.
    """
    if future_policy(model.config) is None:
        return None
    own = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return own.long().to(model.embed.weight.device)


def _through_cache(model: Decoder, ids: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Score ids [n + 1] as one context, a piece at a time."""
    tokens = torch.from_numpy(ids).to(model.embed.weight.device)
    cache = model.new_cache(batch_size=1)
    n = len(ids) - 1
    for begin in range(0, n, PIECE):
        end = min(begin + PIECE, n)
        hidden = model(tokens[None, begin:end], cache=cache, return_hidden=True)
        yield _nats(model, hidden[0], tokens[begin + 1 : end + 1]), torch.arange(begin, end)


def _nats(model: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log p of targets [n] after hidden states [n, d], float64 on the CPU."""
    # Few logits at a time: those of all tokens would outweigh the model.
    rows = max(1, LOGITS // model.config.vocab_size)
    parts = [
        F.cross_entropy(model.head(h).float(), t, reduction="none")
        for h, t in zip(hidden.split(rows), targets.split(rows))
    ]
    return torch.cat(parts).double().cpu()


# --------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------


def held_out_documents(
    dataset: TokenDataset, tokenizer: Tokenizer, start: float
) -> Iterator[TokenizedDocument]:
    """Documents of the last part of a dataset, from the fraction `start` of its tokens on.

    Where the part begins inside a document, the rest of that document comes first, as one of its
    own and from a whole character on. start is meant as for attamba.data.Batches.
    """
    cut = int(start * dataset.n_tokens)
    at = 0
    for document in dataset.documents():
        begin, at = at, at + len(document.tokens) + 1
        if begin >= cut:
            yield document
        elif at > cut:
            rest = document.tokens[cut - begin - 1 :]
            torn = next((i for i in range(4) if _begins_whole(rest[i:], tokenizer)), 0)
            if torn < len(rest):
                yield _with_counts(rest[torn:], tokenizer, document.source)


def take(
    documents: Iterable[Text],
    tokenizer: Tokenizer,
    max_documents: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[TokenizedDocument]:
    """The documents that evaluate scores, tokenized, within the limits that it describes."""
    return islice(_limited(_tokenized(documents, tokenizer), max_tokens, tokenizer), max_documents)


def _tokenized(documents: Iterable[Text], tokenizer: Tokenizer) -> Iterator[TokenizedDocument]:
    for document in documents:
        if isinstance(document, TokenizedDocument):
            tokenized = document
        else:
            text, source = (
                (document, "") if isinstance(document, str) else (document.text, document.source)
            )
            tokenized = TokenizedDocument(
                tokens=np.asarray(tokenizer.encode(text), dtype=np.int64),
                n_bytes=len(text.encode()),
                n_words=len(text.split()),
                source=source,
            )
        if len(tokenized.tokens):
            yield tokenized


def _limited(
    documents: Iterable[TokenizedDocument], max_tokens: int | None, tokenizer: Tokenizer
) -> Iterator[TokenizedDocument]:
    """Documents up to max_tokens in all, the last one cut."""
    left = max_tokens
    for document in documents:
        if left is not None and len(document.tokens) > left:
            cut = _cut(document, left, tokenizer)
            if len(cut.tokens):
                yield cut
            return
        yield document
        if left is not None:
            left -= len(document.tokens)
            if not left:
                return


def _cut(document: TokenizedDocument, length: int, tokenizer: Tokenizer) -> TokenizedDocument:
    """The first `length` tokens, or up to three fewer where a character would be torn apart."""
    for shorter in range(length, max(length - 4, -1), -1):
        if not tokenizer.decode(document.tokens[max(0, shorter - 8) : shorter]).endswith("\ufffd"):
            length = shorter
            break
    return _with_counts(document.tokens[:length], tokenizer, document.source)


def _with_counts(tokens: np.ndarray, tokenizer: Tokenizer, source: str) -> TokenizedDocument:
    """A part of a document, with its own words and bytes."""
    text = tokenizer.decode(tokens)
    return TokenizedDocument(tokens, len(text.encode()), len(text.split()), source)


def _begins_whole(tokens: np.ndarray, tokenizer: Tokenizer) -> bool:
    return not tokenizer.decode(tokens[:8]).startswith("\ufffd")


def with_separator(document: TokenizedDocument, eos_id: int) -> np.ndarray:
    """What the model reads: int64 [1 + n_tokens]."""
    return np.concatenate([[eos_id], document.tokens]).astype(np.int64)


# --------------------------------------------------------------------------------------------
# Sums
# --------------------------------------------------------------------------------------------


class _Tally:
    """Sums over documents and positions."""

    def __init__(self, tokenizer: Tokenizer, progress: Callable[[int], None] | None) -> None:
        self.n_words = self.n_bytes = self.n_documents = self.n_tokens = 0
        self.progress = progress
        # Bucket 0 is [0, FIRST_BUCKET), bucket i doubles the length of all before it.
        self.edges = FIRST_BUCKET * 2 ** np.arange(40, dtype=np.int64)
        self.nats = np.zeros(len(self.edges) + 1)
        self.counts = np.zeros(len(self.edges) + 1, dtype=np.int64)

    def counted(self, documents: Iterable[TokenizedDocument]) -> Iterator[TokenizedDocument]:
        """Pass documents on, counting what is asked for."""
        for document in documents:
            self.n_documents += 1
            self.n_words += document.n_words
            self.n_bytes += document.n_bytes
            yield document

    def add(self, nats: Tensor, positions: Tensor) -> None:
        bucket = np.searchsorted(self.edges, positions.numpy(), side="right")
        self.nats += np.bincount(bucket, weights=nats.numpy(), minlength=len(self.nats))
        self.counts += np.bincount(bucket, minlength=len(self.counts))
        self.n_tokens += len(nats)
        if self.progress is not None:
            self.progress(self.n_tokens)

    def result(self, context: int | None, stride: int | None) -> EvalResult:
        if not self.n_tokens:
            raise ValueError("documents hold no text: there is nothing to score")
        total = float(self.nats.sum())
        edges = [0, *self.edges.tolist()]
        buckets = [
            Bucket(edges[i], edges[i + 1], float(self.nats[i] / n), n)
            for i, n in enumerate(self.counts.tolist())
            if n
        ]
        return EvalResult(
            nats_per_token=total / self.n_tokens,
            perplexity=_exp(total / self.n_tokens),
            word_perplexity=_exp(total / self.n_words) if self.n_words else math.inf,
            bits_per_byte=total / math.log(2) / self.n_bytes if self.n_bytes else math.inf,
            n_tokens=self.n_tokens,
            n_words=self.n_words,
            n_bytes=self.n_bytes,
            n_documents=self.n_documents,
            context=context,
            stride=stride,
            by_position=buckets,
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def finite(value: Any) -> Any:
    """Nested dictionaries and lists with None for each number that is not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check(
    model: Decoder,
    tokenizer: Tokenizer,
    context: int | None,
    stride: int | None,
    batch_size: int,
    max_documents: int | None,
    max_tokens: int | None,
) -> int | None:
    """Raise ValueError for what cannot be; return the stride, None with the whole document."""
    limits = {"max_documents": max_documents, "max_tokens": max_tokens, "context": context}
    for name, value in {**limits, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model knows "
            f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
        )
    if context is None:
        if stride is not None:
            raise ValueError(f"stride={stride} needs a context; without one nothing slides")
        return None
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride={stride} must be from 1 to context={context}")
    return stride
