"""Result files: one per run, JSON lines, written whole when the run is done.

{"kind": "run", study, variant, seed, scale, config, scores (as asked), data (fingerprints),
 init_weights (the fingerprint of those of train.init_from), code, parameters, ...}
                                             what was run
{"kind": "train", step, loss, ...}           thinned training records; `stage` in those of stages
                                             that came before the run's own training
{"kind": "valid", step, valid_loss, ...}     every validation
{"kind": "score", name, text, result}        one per score; the fingerprint of what was scored
{"kind": "end", tokens, seconds, ...}        what it took
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from attamba.config import ConfigError, RunConfig, from_dict, to_dict
from attamba.data.files import write_aside
from attamba.studies.recipe import STAGES, Run
from attamba.train.run_folder import dotted

Record = dict[str, Any]

FREE = frozenset(
    {
        *("out", "data.train", "data.valid", "data.tokenizer", "train.device", "train.progress"),
        *("train.keep", "train.log_every", "train.eval_every", "train.save_every"),
        *("train.tensorboard", "train.compile", "train.cuda_graphs", "eval.mode", "eval.device"),
    }
)
"""Keys in which a result and a recipe may differ: where files lie, and how, not what, is computed.
"""
WATCHING = ("metrics", "profile", "spikes")
"""Sections that look at training; studies leave them as they are, older result files have none."""


@dataclass(frozen=True)
class Result:
    """One result file, read."""

    path: Path
    run: Record
    train: list[Record] = field(default_factory=list)
    valid: list[Record] = field(default_factory=list)
    scores: dict[str, Record] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the texts that scores were measured on; older files have none."""
    end: Record = field(default_factory=dict)

    @property
    def study(self) -> str:
        """Whose result it is."""
        return self.path.parent.name

    @property
    def name(self) -> str:
        """Study and run."""
        return f"{self.study}/{self.path.stem}"

    @property
    def tokens_per_second(self) -> float | None:
        """The highest rate among the records of the run's own training; None without any.

        Of several runs on one device each waits for the others most of the time, but has the
        device for itself while they compile, save or score: so neither mean nor median.
        """
        own = (record["tokens_per_second"] for record in self.train if "stage" not in record)
        return max(own, default=None)


def result_path(root: Path, study: str, name: str) -> Path:
    """Where the result of a run is."""
    return root / study / f"{name}.jsonl"


def write_result(path: Path, records: Iterable[Record]) -> None:
    """Write a result file; at any moment it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_aside(path, lines.encode())


def read_result(path: Path) -> Result:
    """Read a result file. Raises ConfigError for one that is damaged."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        by_kind: dict[str, list[Record]] = {}
        for record in records:
            by_kind.setdefault(record["kind"], []).append(record)
        return Result(
            path=path,
            run=by_kind["run"][0],
            train=by_kind.get("train", []),
            valid=by_kind.get("valid", []),
            scores={record["name"]: record["result"] for record in by_kind.get("score", [])},
            texts={r["name"]: r["text"] for r in by_kind.get("score", []) if r.get("text")},
            end=by_kind["end"][0],
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{path} is no result file ({error!r}); delete it and run anew"
        ) from error


class Shelf:
    """All result files of a folder: a run that one study made need not be made by another."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, run: Run) -> Result | None:
        """The result of a run, its own or another study's of the same; None without one."""
        own = self._own(run)
        if own is not None:
            return None if _lacks(own, run) else own
        try:
            config = run.config()
        except ConfigError:  # without its texts it cannot be told what its separators are
            return None
        return self.same(config, run.scale, run.scores)

    def why_not(self, run: Run) -> str:
        """Why the result of the run's own name is not its result; empty where there is none."""
        own = self._own(run)
        return "" if own is None else _lacks(own, run)

    def _own(self, run: Run) -> Result | None:
        path = result_path(self.root, run.study, run.name)
        own = read_result(path) if path.exists() else None
        return own if own is not None and own.run["scale"] == run.scale else None

    def same(
        self,
        config: RunConfig,
        scale: str,
        scores: Record,
        data: Record | None = None,
        texts: dict[str, str] | None = None,
    ) -> Result | None:
        """A result, of whichever study, that computes this and has these scores, or diverged.

        data, texts: as of_these_texts has them, of which it must be. Default: any.
        """
        if begins_elsewhere(config):
            return None
        for result in self._by_identity.get(_identity(config), []):
            if (
                result.run["scale"] == scale
                and not missing_scores(result, scores)
                and (data is None or of_these_texts(result, data, texts or {}))
            ):
                return result
        return None

    @cached_property
    def _by_identity(self) -> dict[str, list[Result]]:
        found: dict[str, list[Result]] = {}
        for path in sorted(self.root.glob("*/*.jsonl")):
            try:
                result = read_result(path)
                identity = _identity(saved_config(result))
            except ConfigError:  # told where its own study is read
                continue
            found.setdefault(identity, []).append(result)
        return found


def begins_elsewhere(config: RunConfig) -> bool:
    """Does it begin with weights of which its recipe knows a place alone, where others may be?"""
    init = config.train.init_from
    return init is not None and not init.startswith(STAGES)


def missing_scores(result: Result, scores: Record) -> list[str]:
    """Names of the scores that it was not asked for, or otherwise; none where it diverged."""
    if "diverged" in result.end:
        return []
    asked = result.run["scores"]
    return [name for name, spec in scores.items() if asked.get(name) != spec]


def of_these_texts(result: Result, data: Record, texts: dict[str, str]) -> bool:
    """Is it of the texts with these fingerprints, as far as it noted any?

    data: of what was trained and validated on. texts: of what each score was measured on.
    """
    scored = all(texts.get(name, text) == text for name, text in result.texts.items())
    return scored and (not result.run["data"] or result.run["data"] == data)


def _lacks(own: Result, run: Run) -> str:
    """Why a result of this name is not the run's; empty where it is."""
    saved = saved_config(own)
    try:
        config = run.config(lambda tree: _with_separators_of(saved, tree))
    except ConfigError as error:
        return f"cannot be ({error})"
    if differences(saved, config):
        return "of another configuration"
    missing = missing_scores(own, run.scores)
    return f"without {', '.join(missing)}" if missing else ""


def _with_separators_of(saved: RunConfig, tree: Record) -> Record:
    """The tree with the saved ids of separators, of which the recipe has the words."""
    tree = copy.deepcopy(tree)
    mixer, there = tree.get("model", {}).get("mixer"), saved.model.mixer
    parts = mixer if isinstance(mixer, list) else [mixer]
    for part, found in zip(parts, there if isinstance(there, list) else [there]):
        boundary, ids = (part or {}).get("boundary"), getattr(found, "boundary", None)
        if isinstance(boundary, dict) and isinstance(ids, dict) and "tokens" in boundary:
            part["boundary"] = {**boundary, "tokens": ids.get("tokens")}
    return tree


def saved_config(result: Result) -> RunConfig:
    """What was run; fields that came later get their defaults, or what was done before (BEFORE)."""
    config = result.run["config"]
    model = {**config["model"], "mixer": _as_done(config["model"]["mixer"])}
    return from_dict(RunConfig, {**config, "model": model})


BEFORE = {"ssm_init": 1.0}
"""Fields of the attamba mixer whose default is not what was done before they came."""


def _as_done(mixer: Any) -> Any:
    """A mixer, or a list of them, with the fields of BEFORE that it lacks."""
    if isinstance(mixer, list):
        return [_as_done(layer) for layer in mixer]
    return {**BEFORE, **mixer} if mixer["type"] == "attamba" else mixer


def _identity(config: RunConfig) -> str:
    """The same text for configurations between which there are no differences."""
    fixed = {key: value for key, value in dotted(to_dict(config)).items() if not _free(key)}
    return json.dumps(fixed, sort_keys=True)


def differences(there: RunConfig, here: RunConfig) -> list[str]:
    """Keys of two configurations that disagree on what is computed, as text."""
    a, b = dotted(to_dict(there)), dotted(to_dict(here))
    return [
        f"{key}: {a.get(key)!r} there, {b.get(key)!r} here"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not _free(key)
    ]


def _free(key: str) -> bool:
    # `backend` stands in a mixer or in each of a list of mixers.
    watching = key.partition(".")[0] in WATCHING
    return key in FREE or watching or key.endswith(".backend")


def thinned(records: list[Record], most: int = 100) -> list[Record]:
    """At most `most` training records, each standing for those since the one before.

    Losses are means over them, rates are total tokens over total time; the last step is there.
    """
    if not records:
        return []
    size = -(-len(records) // most)
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    return [_merged(group) for group in groups]


def _merged(group: list[Record]) -> Record:
    last, n = group[-1], len(group)
    return {
        **({"stage": last["stage"]} if "stage" in last else {}),
        "kind": "train",
        "step": last["step"],
        "tokens": last["tokens"],
        "loss": _mean(group, "loss"),
        "grad_norm": _mean(group, "grad_norm"),
        "lr": last["lr"],
        "tokens_per_second": round(n / sum(1 / r["tokens_per_second"] for r in group), 1),
        "seconds": round(last["seconds"], 3),
    }


def _mean(group: list[Record], key: str) -> float | None:
    """Over the steps where it was finite; None where it never was."""
    known = [r[key] for r in group if r[key] is not None]
    return round(sum(known) / len(known), 6) if known else None
