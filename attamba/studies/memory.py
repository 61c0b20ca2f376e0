"""How much a model remembers: passages read again, pairs by distance, a pass key by place.

Shapes: B rows, T tokens, d model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from attamba.config import ConfigError
from attamba.data.generated import GeneratedRows, Passkey, Recall, at_gap, make_task
from attamba.data.loader import UNSCORED, Batch
from attamba.dial import redial
from attamba.evaluate import PIECE
from attamba.studies.scores import UNTOLD

if TYPE_CHECKING:
    from attamba.config import RunConfig
    from attamba.data import TokenizedDocument
    from attamba.models import Decoder
    from attamba.studies.scores import CopyScore, PasskeyScore, RecallScore

TaskT = TypeVar("TaskT", Recall, Passkey)
Progress = Callable[[int], None] | None
"""Called after each batch with the number of tokens that a score has scored so far."""

WHOLE = 4096
"""Rows up to this length go through the model at once, longer ones through its cache."""
DEPTHS = 5
"""Parts of a row by which a pass key's place is told."""


def copying(
    model: Decoder,
    documents: Sequence[TokenizedDocument],
    score: CopyScore,
    progress: Progress = None,
) -> dict[str, Any]:
    """Nats per token of passages, read first and read again after a gap: what follows in the text.

    What a model has of the text at hand, and what of its training, differs in these two: a model
    that copies reads the passage again at next to nothing, one that cannot look back that far at
    what it cost the first time.

    Rows are the same for every model. Raises ConfigError where no document is long enough.
    """
    device, settings, add = model.embed.weight.device, [], _adding(progress)
    for gap in score.gaps:
        rows = _read_twice(documents, score, gap)
        first, again = (
            np.arange(UNTOLD, score.passage) + begin for begin in (0, score.passage + gap)
        )
        nats = []
        for begin in range(0, score.rows, score.batch_size):
            ids = torch.from_numpy(rows[begin : begin + score.batch_size]).to(device)
            nats.append(_nats_at(model, ids, np.concatenate([first, again])))
            add(nats[-1].size)
        both = np.concatenate(nats).mean(0)
        settings.append(
            {
                "gap": gap,
                "n": score.rows * len(first),
                "first": float(both[: len(first)].mean()),
                "again": float(both[len(first) :].mean()),
            }
        )
    return {"settings": settings}


def _read_twice(documents: Sequence[TokenizedDocument], score: CopyScore, gap: int) -> np.ndarray:
    """A passage, the `gap` tokens after it, the passage; int64 [rows, 2 * passage + gap]."""
    size = score.passage + gap
    texts = [document.tokens for document in documents if len(document.tokens) >= size]
    if not texts:
        raise ConfigError(
            f"a copy score with passages of {score.passage} tokens and gap {gap} needs a document "
            f"of {size} tokens, and there is none; give longer texts or smaller gaps"
        )
    draw = np.random.default_rng([score.passage, gap])
    rows = []
    for _ in range(score.rows):
        text = texts[draw.integers(len(texts))]
        start = draw.integers(len(text) - size + 1)
        part = text[start : start + size]
        rows.append(np.concatenate([part, part[: score.passage]]))
    return np.stack(rows)


@torch.inference_mode()
def _nats_at(model: Decoder, ids: torch.Tensor, places: np.ndarray) -> np.ndarray:
    """Nats of the tokens at these places (not the first) of every row, float32 [B, places]."""
    before = torch.zeros_like(ids, dtype=torch.bool)
    before[:, places - 1] = True
    logits = model.head(_hidden(model, ids, before)).float()
    nats = F.cross_entropy(logits, ids[:, places].flatten(), reduction="none")
    return nats.view(len(ids), -1).cpu().numpy()


def task_of(config: RunConfig, kind: type[TaskT], score: str) -> TaskT:
    """The task that a run is trained on. Raises ConfigError, naming the score, for another kind."""
    spec = config.data.generate
    task = make_task(spec) if spec else None
    if not isinstance(task, kind):
        raise ConfigError(
            f"{score} needs a run on data.generate={{type: {kind.type}}}, and this one has "
            f"data.generate={spec}; train on that task, or leave the score out"
        )
    return task


def recall(
    model: Decoder, config: RunConfig, score: RecallScore, progress: Progress = None
) -> dict[str, Any]:
    """Accuracy at each gap and P, where the model has one; chance is 1 / n_values."""
    task = task_of(config, Recall, "a recall score")
    settings, add = [], _adding(progress)
    has_chunks = any(hasattr(mixer, "chunk_size") for mixer in config.model.layer_mixers())
    sizes: list[int] | list[None] = (has_chunks and score.chunk_sizes) or [None]
    for size in sizes:
        dialled = model if size is None else redial(model, {"mixer.chunk_size": size})
        for gap in score.gaps:
            there = dataclasses.replace(score, gaps=[gap])
            settings.append({"chunk_size": size, **_recall_at(dialled, config, task, there, add)})
    return {"chance": 1 / task.n_values, "settings": settings}


def row_length(config: RunConfig, task: Recall, gap: int) -> int:
    """Tokens of a row at another gap than training's, with as much room for questions."""
    return config.data.seq_len + gap - task.gap


def _recall_at(
    model: Decoder, config: RunConfig, task: Recall, score: RecallScore, add: Callable[[int], None]
) -> dict[str, Any]:
    (gap,) = score.gaps
    seq_len = row_length(config, task, gap)
    rows = GeneratedRows(at_gap(task, gap), seq_len, score.batch_size, config.train.seed)
    hits, distances = [], []
    for batch in _held_out(rows, score.rows):
        right, scored = _right(model, batch)
        hits.append(right[scored])
        add(int(scored.sum()))
        distances.append(_distances(batch, task.pairs)[scored])
    hit, distance = np.concatenate(hits), np.concatenate(distances)
    return {
        "gap": gap,
        "seq_len": seq_len,
        "n": len(hit),
        "accuracy": float(hit.mean()),
        "by_distance": _by_distance(hit, distance),
    }


def _distances(batch: Batch, pairs: int) -> np.ndarray:
    """Tokens from each position back to the pair whose key stands there, int64 [B, T]."""
    keys = batch.inputs[:, 0 : 2 * pairs : 2]
    place = (batch.inputs[:, :, None] == keys[:, None]).argmax(-1)
    return np.arange(batch.inputs.shape[1]) - (2 * place + 1)


def _by_distance(hit: np.ndarray, distance: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy in buckets [start, 2 start) of distance."""
    bucket = np.floor(np.log2(np.maximum(distance, 1))).astype(int)
    return [
        {
            "start": 2 ** int(b),
            "stop": 2 ** (int(b) + 1),
            "n": int((bucket == b).sum()),
            "accuracy": float(hit[bucket == b].mean()),
        }
        for b in np.unique(bucket)
    ]


def passkey(
    model: Decoder, config: RunConfig, score: PasskeyScore, progress: Progress = None
) -> dict[str, Any]:
    """At each length the share of keys found (all digits, each after the right ones before it),
    the share of digits, and the share of keys by where they stood: in the first fifth of the row,
    and so on.
    """
    task = task_of(config, Passkey, "a passkey score")
    settings, add = [], _adding(progress)
    for length in score.lengths:
        rows = GeneratedRows(task, length, score.batch_size, config.train.seed)
        hits, depth = [], []
        for batch in _held_out(rows, score.rows):
            right, scored = _right(model, batch)
            hits.append(right[scored].reshape(-1, task.digits))
            depth += [_depth(row) for row in batch.inputs]
            add(int(scored.sum()))
        hit = np.concatenate(hits)
        whole = np.all(hit, axis=1)
        part = np.minimum((np.array(depth) * DEPTHS).astype(int), DEPTHS - 1)
        settings.append(
            {
                "length": length,
                "n": len(hit),
                "accuracy": float(whole.mean()),
                "digits": float(hit.mean()),
                "by_depth": [
                    {"depth": int(p), "n": int((part == p).sum()), "accuracy": float(w)}
                    for p in np.unique(part)
                    for w in [whole[part == p].mean()]
                ],
            }
        )
    return {"chance": 0.1**task.digits, "settings": settings}


def _depth(row: np.ndarray) -> float:
    """Where the key of one row's ids stands, from 0 (the first byte) to 1 (the last)."""
    text = bytes(row.astype(np.uint8))
    return text.index(b" The pass key is ") / len(text)


def _adding(progress: Progress) -> Callable[[int], None]:
    """What is called with the tokens of each batch, to tell progress of all so far."""
    done = 0

    def add(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done)

    return add


def _held_out(rows: GeneratedRows, n: int) -> Iterator[Batch]:
    """n rows that neither training nor validation sees, a batch at a time."""
    first = rows.n_windows // 2  # training counts from 0, validation takes other numbers
    for begin in range(0, n, rows.batch_size):
        yield rows.rows(range(first + begin, first + min(begin + rows.batch_size, n)))


@torch.inference_mode()
def _right(model: Decoder, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Is the likeliest token the target, and does the target count? bool [B, T] each."""
    device = model.embed.weight.device
    ids = torch.from_numpy(batch.inputs).to(device)
    scored = batch.targets != UNSCORED
    hidden = _hidden(model, ids, torch.from_numpy(scored).to(device))
    guess = model.head(hidden).argmax(-1).cpu().numpy()
    right = np.zeros_like(scored)
    right[scored] = guess == batch.targets[scored]
    return right, scored


def _hidden(model: Decoder, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Final states [n, d] at the n wanted positions, in order of rows and then of positions."""
    if ids.shape[1] <= WHOLE:
        return model(ids, return_hidden=True)[wanted]
    cache = model.new_cache(batch_size=ids.shape[0])
    pieces = [
        model(part, cache=cache, return_hidden=True)  # each call goes on from the one before
        for part in ids.split(PIECE, 1)
    ]
    return torch.cat(pieces, 1)[wanted]
