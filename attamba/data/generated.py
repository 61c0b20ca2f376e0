"""Tasks that need memory, made row by row: a row is a pure function of (seed, its number).

`data.generate` names one, with its options: {"type": "recall", "pairs": 32}. Rows hold ids below
256, those of the byte tokenizer, and only the answers are scored.

Shapes: B rows, T tokens of a row, n pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from attamba.config import ConfigError, did_you_mean, from_dict

from .loader import UNSCORED, Batch

BLANK = 0
"""What stands where nothing does; also the byte tokenizer's separator."""


class Draws:
    """Random numbers of one row. Philox's raw ones, because numpy promises never to change them."""

    def __init__(self, seed: int, row: int) -> None:
        self._philox = np.random.Philox(key=np.array([seed, row], dtype=np.uint64))

    def uniform(self, n: int) -> np.ndarray:
        """float64 [n] in [0, 1)."""
        return (np.atleast_1d(self._philox.random_raw(n)) >> np.uint64(11)) * 2.0**-53

    def integers(self, n: int, stop: int) -> np.ndarray:
        """int64 [n] in [0, stop)."""
        return (self.uniform(n) * stop).astype(np.int64)

    def choose(self, n: int, weights: np.ndarray) -> np.ndarray:
        """n different indices of `weights`, likelier where that is larger, in random order.

        Exponential clocks: the first n of them to ring.
        """
        rings = -np.log1p(-self.uniform(len(weights))) / weights
        return np.argsort(rings, kind="stable")[:n]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Multi-query associative recall, as in Arora et al., 2023, "Zoology" (arXiv 2312.04927).

    A row is n pairs of a key and its value, then `gap` blanks, then slots of two tokens. Each
    key is asked for once, in a slot that is drawn by a power law (or uniformly), and its value is
    the scored target there. Everything else is blank, or noise.
    """

    type: Literal["recall"] = "recall"
    pairs: int = 32
    """n, keys of a row, all different."""
    n_keys: int = 64
    """Keys there are."""
    n_values: int = 64
    """Values there are."""
    gap: int = 0
    """Tokens between the pairs and the first slot."""
    power: float | None = 0.01
    """a of the law s^(a - 1) by which slot s, counted from 1, is asked in; null: uniform."""
    n_noise: int = 0
    """Noise symbols that stand where nothing does; 0: blanks."""

    def __post_init__(self) -> None:
        for name in ("pairs", "n_keys", "n_values"):
            _at_least(getattr(self, name), 1, name)
        for name in ("gap", "n_noise"):
            _at_least(getattr(self, name), 0, name)
        if self.pairs > self.n_keys:
            raise ConfigError(
                f"data.generate.pairs={self.pairs} needs as many keys; n_keys={self.n_keys}"
            )
        if self.power is not None and not self.power > 0:
            raise ConfigError(f"data.generate.power={self.power} must be above 0, or null")
        if self.vocab_size > 256:
            raise ConfigError(
                f"data.generate: n_keys + n_values + n_noise = {self.vocab_size - 1} must be at "
                f"most 255"
            )

    @property
    def vocab_size(self) -> int:
        return 1 + self.n_keys + self.n_values + self.n_noise

    def row(self, seq_len: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 [T] each. Raises ConfigError where T is too short."""
        n, begin = self.pairs, 2 * self.pairs + self.gap
        slots = (seq_len - begin) // 2
        if slots < n:
            raise ConfigError(
                f"data.seq_len={seq_len} is too short for {n} pairs, a gap of {self.gap} and as "
                f"many questions; it must be at least {begin + 2 * n}"
            )
        keys = 1 + draws.choose(n, np.ones(self.n_keys))
        values = 1 + self.n_keys + draws.integers(n, self.n_values)
        law: np.ndarray = np.ones(slots)
        if self.power is not None:
            law = np.arange(1, slots + 1) ** (self.power - 1.0)
        asked = begin + 2 * draws.choose(n, law)
        inputs = np.full(seq_len, BLANK, dtype=np.int64)
        if self.n_noise:
            inputs = 1 + self.n_keys + self.n_values + draws.integers(seq_len, self.n_noise)
        inputs[0 : 2 * n : 2], inputs[1 : 2 * n : 2] = keys, values
        inputs[asked] = keys
        targets = np.full(seq_len, UNSCORED, dtype=np.int64)
        targets[asked] = values
        return inputs, targets


WORDS = (
    *("the grass is green", "the sky is blue", "the sun is yellow", "here we go"),
    *("there and back again", "rain fell all day", "a ship came in", "nobody was at home"),
)
"""What the key is hidden in."""


@dataclass(frozen=True, kw_only=True)
class Passkey:
    """Find a number that was hidden in T bytes of talk (Mohtashami and Jaggi, arXiv 2305.16300).

    The number's place is uniform over the row; the row ends with the question and the answer,
    whose digits are scored.
    """

    type: Literal["passkey"] = "passkey"
    digits: int = 5
    """Digits of the number."""

    def __post_init__(self) -> None:
        _at_least(self.digits, 1, "digits")

    @property
    def vocab_size(self) -> int:
        return 256

    def row(self, seq_len: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 [T] each. Raises ConfigError where T is too short."""
        number = bytes(48 + draws.integers(self.digits, 10).astype(np.uint8))
        needle = b" The pass key is " + number + b". Remember it."
        question = b" What is the pass key? The pass key is " + number
        room = seq_len + 1 - 1 - len(needle) - len(question)  # one more token than inputs; eos
        if room < 1:
            raise ConfigError(
                f"data.seq_len={seq_len} is too short for the pass key and its question; it must "
                f"be at least {seq_len + 1 - room}"
            )
        talk = _talk(room, draws)
        place = int(draws.integers(1, room + 1)[0])
        text = bytes([BLANK]) + talk[:place] + needle + talk[place:] + question
        ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        targets = np.full(seq_len, UNSCORED, dtype=np.int64)
        targets[-self.digits :] = ids[-self.digits :]
        return ids[:-1], targets


def _talk(length: int, draws: Draws) -> bytes:
    """`length` bytes of sentences in random order."""
    sentences = [f" {words.capitalize()}.".encode() for words in WORDS]
    n = length // min(map(len, sentences)) + 1
    return b"".join(sentences[i] for i in draws.integers(n, len(sentences)))[:length]


Task = Recall | Passkey
TASKS: dict[str, type[Recall] | type[Passkey]] = {"recall": Recall, "passkey": Passkey}


def make_task(spec: dict[str, Any]) -> Task:
    """The task that data.generate describes. Raises ConfigError naming what is wrong."""
    name = spec.get("type")
    if not isinstance(name, str) or name not in TASKS:
        there = ", ".join(TASKS)
        raise ConfigError(
            f"data.generate.type={name!r} is not a task (there are: {there})"
            f"{did_you_mean(name, TASKS)}"
        )
    return from_dict(TASKS[name], spec, "data.generate")


def at_gap(task: Recall, gap: int) -> Recall:
    """The same task with another distance between pairs and questions."""
    return dataclasses.replace(task, gap=gap)


class GeneratedRows:
    """Endless rows of a task, and as many others for validation.

    task: makes the rows. seq_len: T. batch_size: B, rows of a step. seed: at least 0.
    held_out: rows that no step of training sees.
    """

    def __init__(
        self, task: Task, seq_len: int, batch_size: int, seed: int, *, held_out: bool = False
    ) -> None:
        self.task, self.seq_len, self.batch_size, self.seed = task, seq_len, batch_size, seed
        self.n_windows = 1 << 32
        self._first = self.n_windows if held_out else 0

    def batch(self, step: int) -> Batch:
        """The rows of a training step."""
        return self.rows(range(step * self.batch_size, (step + 1) * self.batch_size))

    def rows(self, windows: Sequence[int]) -> Batch:
        """The given rows; inputs, targets and doc_ids are int64 [len(windows), T]."""
        made = [
            self.task.row(self.seq_len, Draws(self.seed, self._first + window))
            for window in windows
        ]
        inputs, targets = (np.stack(arrays) for arrays in zip(*made))
        return Batch(inputs, targets, np.zeros_like(inputs))


def _at_least(value: int, least: int, name: str) -> None:
    if value < least:
        raise ConfigError(f"data.generate.{name}={value} must be at least {least}")
