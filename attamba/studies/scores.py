"""What a run is scored by: text, a dial of settings, passages read twice, recall, a pass key.

A recipe names scores and their options: {books: {kind: text, data: valid, context: 1024}}. Each
gives plain numbers for a result file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attamba.config import ConfigError, did_you_mean, from_dict
from attamba.mixers import at_least

if TYPE_CHECKING:
    from attamba.config import RunConfig
    from attamba.data import TokenizedDocument, Tokenizer
    from attamba.models import Decoder

TINY_CONTEXT, TINY_TOKENS, TINY_ROWS = 64, 256, 4
UNTOLD = 8
"""First tokens of a passage that is read again: they tell that it is."""


@dataclass(frozen=True)
class Subject:
    """A trained model, and where the texts are."""

    model: Decoder
    tokenizer: Tokenizer
    config: RunConfig
    data: Path
    """Holds a prepared folder for each text that scores name."""
    progress: Callable[[int], None] | None = None
    """Called now and then while a text is scored; what it raises ends that."""


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """Perplexity per token and word, bits per byte, loss by position; see attamba.evaluate."""

    kind: Literal["text"] = "text"
    data: str = "valid"
    """A prepared folder in the study's data: valid, wikitext2, train."""
    context: int | None = 1024
    """Inputs of a window; null: the whole document, through the decode cache."""
    stride: int | None = None
    """Tokens between windows. Default: context / 2."""
    max_tokens: int | None = None
    """Scored at most. Default: all."""
    document_tokens: int | None = None
    """Documents are cut at this length. Default: not at all."""
    batch_size: int = 32
    """Windows at a time."""
    set: dict[str, Any] = field(default_factory=dict)
    """Config keys changed at test time: {mixer.chunk_size: 4}."""

    def at_tiny_scale(self) -> TextScore:
        context = None if self.context is None else TINY_CONTEXT
        stride = None if self.stride is None else TINY_CONTEXT // 2
        return replace(
            self,
            context=context,
            stride=stride,
            max_tokens=TINY_TOKENS,
            document_tokens=TINY_TOKENS,
        )

    def tokens(self, data: Path) -> int:
        """About how many tokens the model reads."""
        from attamba.data import TokenDataset

        size = TokenDataset.open(data / self.data).n_tokens
        overlap: float = 1
        if self.context is not None:
            overlap = self.context / (self.stride or max(1, self.context // 2))
        return int(min(size, self.max_tokens or size) * overlap)

    def measure(self, subject: Subject) -> dict[str, Any]:
        from attamba.dial import redial
        from attamba.evaluate import evaluate

        model = redial(subject.model, self.set) if self.set else subject.model
        result = evaluate(
            model,
            subject.tokenizer,
            _documents(subject, self.data, self.document_tokens),
            context=self.context,
            stride=self.stride,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            progress=subject.progress,
        )
        return result.to_dict()


@dataclass(frozen=True, kw_only=True)
class DialScore:
    """One checkpoint at several values of a mixer's field, with the bytes of a real cache; see
    dial.py. Nothing for a model whose mixers lack it.
    """

    kind: Literal["dial"] = "dial"
    data: str = "valid"
    """As for text."""
    key: str = "mixer.chunk_size"
    """The config key that is turned."""
    values: list[int | str | dict[str, Any] | None] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32, 64]
    )
    """Its values."""
    context: int = 1024
    """Inputs of a window."""
    max_tokens: int | None = 200_000
    """Scored at most, for each value."""
    batch_size: int = 32
    """Windows at a time."""

    def at_tiny_scale(self) -> DialScore:
        return replace(self, context=TINY_CONTEXT, max_tokens=TINY_TOKENS)

    def tokens(self, data: Path) -> int:
        return TextScore(data=self.data, max_tokens=self.max_tokens).tokens(data) * len(self.values)

    def measure(self, subject: Subject) -> dict[str, Any]:
        from attamba.dial import sweep

        name = self.key.rpartition(".")[2]
        if not any(hasattr(mixer, name) for mixer in subject.model.config.layer_mixers()):
            return {"key": self.key, "rows": []}
        rows = sweep(
            subject.model,
            subject.tokenizer,
            _documents(subject, self.data, None),
            self.key,
            self.values,
            context=self.context,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
        )
        return {"field": self.key, "rows": [row.to_dict() for row in rows]}


@dataclass(frozen=True, kw_only=True)
class CopyScore:
    """Loss on passages that are read twice, by the tokens in between; see memory.copying."""

    kind: Literal["copy"] = "copy"
    data: str = "valid"
    """As for text."""
    passage: int = 64
    """Tokens of a passage, of which the first UNTOLD are not scored."""
    gaps: list[int] = field(default_factory=lambda: [64, 192, 448, 896])
    """Tokens of the text between the two readings; rows have as many and two passages."""
    rows: int = 512
    """Rows of each gap."""
    batch_size: int = 32
    """Rows at a time."""

    def at_tiny_scale(self) -> CopyScore:
        return replace(self, passage=12, gaps=[4, 16], rows=TINY_ROWS)

    def tokens(self, data: Path) -> int:
        return sum(2 * self.passage + gap for gap in self.gaps) * self.rows

    def measure(self, subject: Subject) -> dict[str, Any]:
        from attamba.studies.memory import copying

        return copying(subject.model, list(_documents(subject, self.data, None)), self)


@dataclass(frozen=True, kw_only=True)
class RecallScore:
    """Share of values recalled, by the distance to the pair, at several gaps and P."""

    kind: Literal["recall"] = "recall"
    rows: int = 256
    """Rows of each setting; no training row is among them."""
    gaps: list[int] = field(default_factory=lambda: [0])
    """Blanks between pairs and questions; rows grow by as many tokens."""
    chunk_sizes: list[int] | None = None
    """P at test time. Default: the model's own alone."""
    batch_size: int = 64
    """Rows at a time."""

    def at_tiny_scale(self) -> RecallScore:
        return replace(self, rows=TINY_ROWS, gaps=self.gaps[:2])

    def tokens(self, data: Path) -> int:
        return sum(256 + gap for gap in self.gaps) * self.rows * len(self.chunk_sizes or [1])

    def measure(self, subject: Subject) -> dict[str, Any]:
        from attamba.studies.memory import recall

        return recall(subject.model, subject.config, self)


@dataclass(frozen=True, kw_only=True)
class PasskeyScore:
    """Share of pass keys and of their digits found, by length and by where the key stood."""

    kind: Literal["passkey"] = "passkey"
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16_384, 65_536])
    """T of the rows, in bytes."""
    rows: int = 32
    """Rows of each length; no training row is among them."""
    batch_size: int = 1
    """Rows at a time."""

    def at_tiny_scale(self) -> PasskeyScore:
        return replace(self, rows=TINY_ROWS, lengths=[128, 1100])

    def tokens(self, data: Path) -> int:
        return sum(self.lengths) * self.rows

    def measure(self, subject: Subject) -> dict[str, Any]:
        from attamba.studies.memory import passkey

        return passkey(subject.model, subject.config, self)


Score = TextScore | DialScore | CopyScore | RecallScore | PasskeyScore
KINDS: dict[str, type[Score]] = {
    "text": TextScore,
    "dial": DialScore,
    "copy": CopyScore,
    "recall": RecallScore,
    "passkey": PasskeyScore,
}


def make_score(spec: dict[str, Any], where: str) -> Score:
    """The score that a recipe describes. Raises ConfigError naming what is wrong."""
    kind = spec.get("kind")
    if kind not in KINDS:
        there = ", ".join(KINDS)
        raise ConfigError(
            f"{where}.kind={kind!r} is no kind of score (there are: {there})"
            f"{did_you_mean(kind, KINDS)}"
        )
    score = from_dict(KINDS[kind], spec, where)
    for name in ("context", "stride", "rows", "batch_size", "max_tokens", "document_tokens"):
        value = getattr(score, name, None)
        if value is not None:
            at_least(value, 1, f"{where}.{name}")
    if isinstance(score, CopyScore):
        at_least(
            score.passage, UNTOLD + 1, f"{where}.passage", f"; the first {UNTOLD} do not count"
        )
    return score


def text_of(score: Score, data: Path) -> str | None:
    """The fingerprint of the text that it is measured on; None for a task that makes its own.

    Raises ConfigError where `data` has no such text.
    """
    from attamba.data import TokenDataset
    from attamba.studies.data import check_texts
    from attamba.train.sources import fingerprint

    name = getattr(score, "data", None)
    if name is None:
        return None
    check_texts(data, (name,))
    return fingerprint(TokenDataset.open(data / name))


def check_scores(specs: Any) -> None:
    """Raise ConfigError for scores that cannot be."""
    if not isinstance(specs, dict):
        raise ConfigError(f"scores={specs!r} must be names and what each stands for")
    for name, spec in specs.items():
        if not isinstance(spec, dict):
            raise ConfigError(f"scores.{name}={spec!r} must be keys and values, kind among them")
        make_score(spec, f"scores.{name}")


def _documents(
    subject: Subject, name: str, document_tokens: int | None
) -> Iterator[TokenizedDocument]:
    from attamba.data import TokenDataset
    from attamba.evaluate import take

    documents = TokenDataset.open(subject.data / name).documents()
    if document_tokens is None:
        yield from documents
        return
    for document in documents:
        yield from take([document], subject.tokenizer, max_tokens=document_tokens)
