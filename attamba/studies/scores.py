"""What a run is scored by: text, a dial of settings, passages read twice, recall, a pass key.

A recipe names scores and their options: {books: {kind: text, data: valid, context: 1024}}. Each
gives plain numbers for a result file, and can tell before training whether a run can have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attamba.config import ConfigError, did_you_mean, from_dict
from attamba.mixers import at_least

if TYPE_CHECKING:
    from attamba.config import ModelConfig, RunConfig
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
    """Called after each batch with the tokens that a score has scored so far; what it raises ends
    that score."""


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

    def check(self, config: RunConfig, data: Path, where: str) -> None:
        """Raise ConfigError where a run of this configuration cannot be scored so; cheap.

        data: as for Subject. where: the score's key.
        """
        model = _dialled(config, self.set, f"{where}.set={self.set}") if self.set else config.model
        if self.context is None:
            _check_decodes(model, f"{where}.context=null: whole documents are read through")

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

    def check(self, config: RunConfig, data: Path, where: str) -> None:
        """As for text."""
        if not self._concerns(config.model):
            return
        named = f"{where}.values={self.values}"
        for value in self.values:
            model = _dialled(config, {self.key: value}, named)
            _check_decodes(model, f"{named}: each is told with the bytes of")

    def _concerns(self, model: ModelConfig) -> bool:
        """Has a mixer what is turned?"""
        name = self.key.rpartition(".")[2]
        return any(hasattr(mixer, name) for mixer in model.layer_mixers())

    def measure(self, subject: Subject) -> dict[str, Any]:
        from attamba.dial import sweep

        if not self._concerns(subject.model.config):
            return {"field": self.key, "rows": []}
        rows = sweep(
            subject.model,
            subject.tokenizer,
            _documents(subject, self.data, None),
            self.key,
            self.values,
            context=self.context,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            progress=subject.progress,
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

    def check(self, config: RunConfig, data: Path, where: str) -> None:
        """As for text: is a document long enough for a row?"""
        import numpy as np

        from attamba.data import TokenDataset

        dataset = TokenDataset.open(data / self.data)
        longest = int(np.diff(dataset.starts, append=dataset.n_tokens).max(initial=1)) - 1
        named = f"{where}.gaps={self.gaps}"
        for gap in self.gaps:
            size = self.passage + gap
            if size > longest:
                raise ConfigError(
                    f"{named}: {gap} and {where}.passage={self.passage} need a document of {size} "
                    f"tokens, and the longest of {data / self.data} has {longest}; give smaller "
                    f"gaps or longer texts"
                )
            _check_row_decodes(config.model, size + self.passage, named)

    def measure(self, subject: Subject) -> dict[str, Any]:
        from attamba.studies.memory import copying

        documents = list(_documents(subject, self.data, None))
        return copying(subject.model, documents, self, subject.progress)


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

    def check(self, config: RunConfig, data: Path, where: str) -> None:
        """As for text: has the run the task, and room for its questions?"""
        from attamba.data.generated import Draws, Recall
        from attamba.studies.memory import row_length, task_of

        task = task_of(config, Recall, f"{where}.kind=recall")
        # Rows at any gap have as much room as training's, whose length the error names.
        task.row(config.data.seq_len, Draws(0, 0))
        for gap in self.gaps:
            length = row_length(config, task, gap)
            _check_row_decodes(config.model, length, f"{where}.gaps={self.gaps}")

    def measure(self, subject: Subject) -> dict[str, Any]:
        from attamba.studies.memory import recall

        return recall(subject.model, subject.config, self, subject.progress)


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

    def check(self, config: RunConfig, data: Path, where: str) -> None:
        """As for text: has the run the task, and can rows of these lengths be made?"""
        from attamba.data.generated import Draws, Passkey
        from attamba.studies.memory import task_of

        task = task_of(config, Passkey, f"{where}.kind=passkey")
        named = f"{where}.lengths={self.lengths}"
        for length in self.lengths:
            try:
                task.row(length, Draws(0, 0))
            except ConfigError as error:  # which names the length of training's rows
                text = str(error).replace(f"data.seq_len={length}", str(length))
                raise ConfigError(f"{named}: {text}") from error
            _check_row_decodes(config.model, length, named)

    def measure(self, subject: Subject) -> dict[str, Any]:
        from attamba.studies.memory import passkey

        return passkey(subject.model, subject.config, self, subject.progress)


Score = TextScore | DialScore | CopyScore | RecallScore | PasskeyScore
KINDS: dict[str, type[Score]] = {
    "text": TextScore,
    "dial": DialScore,
    "copy": CopyScore,
    "recall": RecallScore,
    "passkey": PasskeyScore,
}
LISTS = {"lengths": 1, "gaps": 0, "chunk_sizes": 1}
"""Fields that hold several numbers, and the least that each may be."""


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
    for name in (*LISTS, "values"):
        if getattr(score, name, None) == []:
            raise ConfigError(
                f"{where}.{name}=[] measures nothing; name some, or leave {name} out for its "
                f"default"
            )
    for name, least in LISTS.items():
        for i, value in enumerate(getattr(score, name, None) or []):
            at_least(value, least, f"{where}.{name}.{i}")
    if isinstance(score, TextScore):
        _check_stride(score, where)
    if isinstance(score, CopyScore):
        at_least(
            score.passage, UNTOLD + 1, f"{where}.passage", f"; the first {UNTOLD} do not count"
        )
    return score


def _check_stride(score: TextScore, where: str) -> None:
    if score.stride is None:
        return
    if score.context is None:
        raise ConfigError(
            f"{where}.stride={score.stride} has no effect with {where}.context=null, the whole "
            f"document; leave it out"
        )
    if score.stride > score.context:
        raise ConfigError(
            f"{where}.stride={score.stride} must be at most {where}.context={score.context}"
        )


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


def check_for_run(
    specs: dict[str, dict[str, Any]], config: RunConfig, data: Path, *, tiny: bool = False
) -> None:
    """Raise ConfigError for scores that a run of this configuration cannot have; nothing is trained
    for it.

    data: as for Subject. tiny: are they measured at tiny scale?
    """
    for name, spec in specs.items():
        score = make_score(spec, f"scores.{name}")
        score = score.at_tiny_scale() if tiny else score
        score.check(config, data, f"scores.{name}")


def _dialled(config: RunConfig, overrides: dict[str, Any], named: str) -> ModelConfig:
    """The model as a score sets it. Raises ConfigError where its weights could not be used so."""
    import torch

    from attamba.dial import redial
    from attamba.models import build_model

    try:
        with torch.device("meta"):
            return redial(build_model(config.model), overrides).config
    except ValueError as error:
        raise ConfigError(f"{named}: {error}") from error


def _check_row_decodes(model: ModelConfig, length: int, named: str) -> None:
    """Raise ConfigError for a row that is too long for a model without a decode cache."""
    from attamba.studies.memory import WHOLE

    if length > WHOLE:
        _check_decodes(model, f"{named}: rows of more than {WHOLE} tokens are read through")


def _check_decodes(model: ModelConfig, needed: str) -> None:
    """Raise ConfigError for a model that has no decode cache. needed: what for, for the message."""
    from attamba.models.registry import future_policy
    from attamba.ops.chunking import cannot_decode

    policy = future_policy(model)
    if policy is not None:
        raise ConfigError(f"{needed} a decode cache, and {cannot_decode(policy)}")


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
