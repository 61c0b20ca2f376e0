"""Trains and scores a run of a study, skipping what is done and going on with what is not.

A run has a folder, <out>/<scale>/<study>/<run>, with its checkpoints, scores/<name>.json for each
score that is there, and calls.jsonl: one line per call that worked on it. Its stages have folders
in it, stages/1 and so on. When all is there the result file is written, once and whole.
"""

from __future__ import annotations

import copy
import gc
import json
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from attamba.config import ConfigError, RunConfig, to_dict
from attamba.data import TokenDataset
from attamba.data.files import write_json
from attamba.models.accounting import n_parameters
from attamba.studies.costs import costs
from attamba.studies.data import check_texts, separator_ids
from attamba.studies.provenance import code_version, environment
from attamba.studies.recipe import Run
from attamba.studies.results import (
    Record,
    Result,
    Shelf,
    begins_elsewhere,
    differences,
    missing_scores,
    of_these_texts,
    read_result,
    result_path,
    saved_config,
    thinned,
    write_result,
)
from attamba.studies.scores import Subject, check_for_run, make_score, text_of
from attamba.studies.stages import check_stages, read_all, trainings
from attamba.train import CheckpointError, TrainingDiverged, TrainingInterrupted, load, train
from attamba.train.checkpoint import read_state
from attamba.train.interrupt import left_at_once
from attamba.train.metrics import append_line, read_lines
from attamba.train.runtime import resolve_device
from attamba.train.sources import open_sources
from attamba.train.storage import find_checkpoint, list_checkpoints, weights_digest

Status = Literal["done", "there", "stopped", "waiting", "failed"]


@dataclass(frozen=True)
class Place:
    """Where a study's files are, and how long it may take."""

    data: Path
    out: Path
    results: Path
    device: str | None = None
    """Overrides train.device. Default: the recipe's."""
    deadline: float | None = None
    """time.time() at which to be done."""
    reserve: float = 0.0
    """Seconds before the deadline at which training saves and stops, and none is begun."""

    def run_dir(self, run: Run) -> Path:
        return self.out / run.scale / run.study / run.name

    def left(self) -> float:
        """Seconds until the deadline; infinite without one."""
        return float("inf") if self.deadline is None else self.deadline - time.time()


@dataclass(frozen=True)
class Outcome:
    """What became of a run in this call."""

    run: Run
    status: Status
    text: str = ""

    @property
    def name(self) -> str:
        return self.run.name

    def __str__(self) -> str:
        told = f"{self.run.study}/{self.name}: {self.status}"
        return f"{told}: {self.text}" if self.text else told


def work_on(run: Run, place: Place) -> Outcome:
    """Train and score one run as far as the deadline allows, and write its result if it is done."""
    try:
        config = run.config(lambda tree: resolved(tree, run, place))
        there = _found(run, config, place)
        if there is not None:
            return Outcome(run, "there", "" if there.study == run.study else f"as {there.name}")
        if place.left() <= place.reserve:
            return Outcome(run, "waiting")
        check_for_run(run.scores, config, place.data, tiny=run.scale == "tiny")
        with left_at_once(place.run_dir(run)):  # while it is scored; training has its own way
            return _Worker(run, config, place).go()
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        return Outcome(run, "failed", str(error) or type(error).__name__)
    except RuntimeError as error:  # the device's memory, a kernel: other runs may do without
        traceback.print_exception(error)
        return Outcome(run, "failed", f"{type(error).__name__}: {error}".splitlines()[0])


def resolved(tree: dict[str, Any], run: Run, place: Place) -> dict[str, Any]:
    """The run's tree with its folders, device and separators filled in."""
    tree = copy.deepcopy(tree)
    data = tree.get("data", {})
    train_part = {**tree.get("train", {}), "progress": False}
    if place.device is not None:
        train_part["device"] = place.device
    if resolve_device(train_part.get("device", "auto"), "train.device").type != "cuda":
        train_part["cuda_graphs"] = False  # how passes are launched, not what is computed
    if data.get("generate") is None:
        check_texts(place.data, ("train", "valid"))
        data |= {"train": str(place.data / "train"), "valid": str(place.data / "valid")}
    tree = {**tree, "data": data, "train": train_part, "out": str(place.run_dir(run))}
    mixer = tree.get("model", {}).get("mixer")
    for part in mixer if isinstance(mixer, list) else [mixer]:
        boundary = (part or {}).get("boundary")
        if isinstance(boundary, dict) and isinstance(boundary.get("tokens"), str):
            tokenizer = TokenDataset.open(place.data / "train").tokenizer
            ids = separator_ids(tokenizer, boundary["tokens"])
            part["boundary"] = {**boundary, "tokens": ids}
    return tree


def _found(run: Run, config: RunConfig, place: Place) -> Result | None:
    """The result of this very run, its own or another study's; None without one.

    Raises ConfigError for a result of its own name and another configuration, of other texts, or
    without some scores where the model that could be scored is gone.
    """
    path = result_path(place.results, run.study, run.name)
    data = open_sources(config, Path(config.out), fresh=False, say=lambda text: None).fingerprints
    texts = {
        name: digest
        for name, spec in run.scores.items()
        if (digest := text_of(make_score(spec, f"scores.{name}"), place.data))
    }
    if not path.exists():
        return Shelf(place.results).same(config, run.scale, run.scores, data, texts)
    result = read_result(path)
    if not of_these_texts(result, data, texts):
        raise ConfigError(
            f"{path} was trained, validated or scored on other texts than those in {place.data}; "
            f"delete it to run anew, or name another folder with --results"
        )
    given, began = _given_weights(config), result.run.get("init_weights")
    if None not in (given, began) and given != began:
        raise ConfigError(
            f"{path} began with other weights than are in {config.train.init_from} now; delete it "
            f"to run anew, or give the variant another name"
        )
    differing = differences(saved_config(result), config)
    if differing:
        raise ConfigError(
            f"{path} is of another configuration ({'; '.join(differing)}); delete it to run anew, "
            f"or give the variant another name"
        )
    missing = missing_scores(result, run.scores)
    if missing and not list_checkpoints(config.out):
        raise ConfigError(
            f"{path} has no score {', '.join(missing)}, and there is no checkpoint in {config.out} "
            f"to measure it on; delete the file to train anew, or give the study another name"
        )
    return None if missing else result


def _given_weights(config: RunConfig) -> str | None:
    """Fingerprint of the weights of train.init_from; None without them, and for a run's stages."""
    if not begins_elsewhere(config):
        return None
    try:
        return weights_digest(find_checkpoint(str(config.train.init_from)))
    except CheckpointError:  # gone; training says so where it needs them
        return None


class _OutOfTimeError(Exception):
    """The deadline passed between two stages, or while a score was measured."""


class _Worker:
    """One run in this process."""

    def __init__(self, run: Run, config: RunConfig, place: Place) -> None:
        self.run, self.config, self.place = run, config, place
        self.device = resolve_device(config.train.device, "train.device")
        self.folder = Path(config.out)
        self.trainings = trainings(run, config, lambda tree: resolved(tree, run, place))
        """The configurations to be trained one after the other, the run's own last."""
        self.under_way = 0
        """Which of them is trained, or was last."""
        self.began = time.time()
        self.worked = False
        """Did this call get something done? Then it may stop where time is short."""

    def go(self) -> Outcome:
        self._clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            step = self._train()
        except TrainingInterrupted:
            self._note_call()
            if self.place.left() > self.place.reserve:
                raise
            return Outcome(self.run, "stopped", f"at {self._step()}")
        except _OutOfTimeError:
            self._note_call()
            return Outcome(self.run, "stopped", f"at {self._step()}")
        except TrainingDiverged as error:
            self._note_call()
            self._write({}, diverged=str(error))
            return Outcome(self.run, "done", f"diverged at step {error.step}{self._stage()}")
        if self.worked:
            self._note_call()
        scores = self._scores()
        if scores is None:
            return Outcome(self.run, "stopped", f"trained for {step} steps, scores are missing")
        self._write(scores)
        return Outcome(self.run, "done")

    def _clear(self) -> None:
        """Nothing of the run before may count: its memory, and what was compiled for it.

        torch compiles a module's code a few times at most, whichever models it was for.
        """
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _train(self) -> int:
        def on_log(record: Record) -> None:
            self.worked = True

        def should_stop() -> bool:
            return self.place.left() <= self.place.reserve

        check_stages(self.trainings)
        while True:
            config = self.trainings[self.under_way]
            result = train(config, on_log=on_log, should_stop=should_stop)
            if result.interruption is not None:
                raise result.interruption
            if config is self.trainings[-1]:
                return result.step
            if self.worked and should_stop():
                raise _OutOfTimeError
            self.under_way += 1
            self._clear()

    def _step(self) -> str:
        config = self.trainings[self.under_way]
        begun = list_checkpoints(config.out)
        step = read_state(find_checkpoint(config.out))["step"] if begun else 0
        return f"step {step} of {config.train.steps}{self._stage()}"

    def _stage(self) -> str:
        """Of how many stages which one is under way, for messages; empty where there are none."""
        if len(self.trainings) == 1:
            return ""
        return f", stage {self.under_way + 1} of {len(self.trainings)}"

    def _note_call(self) -> None:
        """What this call used; a run may take several calls, on several machines."""
        call: Record = {
            **environment(self.device),
            "seconds": round(time.time() - self.began, 1),
            "code": code_version(),
        }
        if self.device.type == "cuda":
            call["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        append_line(self.folder / "calls.jsonl", call)

    def _scores(self) -> dict[str, Record] | None:
        """Every score's text and result, from its file where it is there; None where the time does
        not suffice."""
        found: dict[str, Record] = {}
        subject = None
        for name, spec in self.run.scores.items():
            path = self.folder / "scores" / f"{name}.json"
            saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            score = make_score(spec, f"scores.{name}")
            text = text_of(score, self.place.data)
            if saved.get("spec") != spec or saved.get("text", text) != text:
                if self.run.scale == "tiny":
                    score = score.at_tiny_scale()
                if (
                    self.worked
                    and self._estimate(score.tokens(self.place.data)) > self.place.left()
                ):
                    return None
                subject = subject or self._subject()
                try:
                    saved = {"spec": spec, "text": text, "result": score.measure(subject)}
                except _OutOfTimeError:
                    return None
                _check_finite(saved["result"], name, self.folder)
                write_json(path, saved)
                self.worked = True
            found[name] = {"text": saved.get("text"), "result": saved["result"]}
        return found

    def _estimate(self, tokens: int) -> float:
        """Seconds that a score of so many tokens may take: as if it were training."""
        records = [r for r in self._metrics()[-1] if r["kind"] == "train"]
        return tokens / records[-1]["tokens_per_second"]

    def _subject(self) -> Subject:
        model, tokenizer = load(self.folder, device=self.device)
        return Subject(model, tokenizer, self.config, self.place.data, self._in_time)

    def _in_time(self, _: int) -> None:
        # The estimate may have been too low: long contexts cost more than training's rows.
        if self.worked and self.place.left() <= 0:
            raise _OutOfTimeError

    def _metrics(self) -> list[list[Record]]:
        """Of each training up to the one under way."""
        return read_all(self.trainings, self.under_way + 1)

    def _write(self, scores: dict[str, Record], **end: Any) -> None:
        metrics = self._metrics()
        training = [[r for r in part if r["kind"] == "train"] for part in metrics]
        last = next((part[-1] for part in reversed(training) if part), None)
        path = self.folder / "calls.jsonl"
        calls = read_lines(path) if path.exists() else []
        records: list[Record] = [
            {
                "kind": "run",
                "study": self.run.study,
                "variant": self.run.variant,
                "seed": self.run.seed,
                "scale": self.run.scale,
                "config": _portable(to_dict(self.config)),
                "scores": self.run.scores,
                "data": self._fingerprints(),
                "init_weights": self._init_weights(),
                "parameters": n_parameters(self.config.model),
                "costs": costs(self.config, self._tokens()),
            },
            *(r for part in training for r in thinned(part)),
            *(r for part in metrics for r in part if r["kind"] == "valid"),
            *({"kind": "score", "name": name, **score} for name, score in scores.items()),
            {
                "kind": "end",
                "steps": last["step"] if last else 0,
                "tokens": last["tokens"] if last else 0,
                "seconds": round(last["seconds"], 3) if last else 0.0,
                "peak_memory_bytes": max((c.get("peak_memory_bytes", 0) for c in calls), default=0)
                or None,
                "calls": calls,
                **end,
            },
        ]
        write_result(result_path(self.place.results, self.run.study, self.run.name), records)

    def _fingerprints(self) -> dict[str, str | None]:
        """Of what it was trained on; none for a run that diverged before its first checkpoint."""
        for config in reversed(self.trainings):
            # What a task makes for a stage is not what it makes for rows of another length.
            of_the_run = config is self.trainings[-1] or config.data.generate is None
            if of_the_run and list_checkpoints(config.out):
                return read_state(find_checkpoint(config.out))["data"]
        return {}

    def _init_weights(self) -> str | None:
        """Fingerprint of the weights that it began with; None without any but its stages'."""
        if not begins_elsewhere(self.config) or not list_checkpoints(self.folder):
            return None
        return read_state(find_checkpoint(self.folder))["init_weights"]

    def _tokens(self) -> torch.Tensor | None:
        """Some real text, int64 [1, n], for policies that look at it; None for a made task."""
        if self.config.data.generate is not None:
            return None
        dataset = TokenDataset.open(self.place.data / "valid")
        return torch.from_numpy(dataset.tokens(0, min(dataset.n_tokens, 1 << 16)))[None]


def _check_finite(result: Record, score: str, folder: Path) -> None:
    """Raise ConfigError for figures that are no numbers, as weights give that are none."""
    try:
        json.dumps(result, allow_nan=False)
    except ValueError as error:
        raise ConfigError(
            f"scores.{score} of the model in {folder} is infinite or not a number; delete the "
            f"folder and train it otherwise, at a lower optim.lr for one"
        ) from error


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without where files lay on one machine."""
    data = {**config["data"]}
    for key in ("train", "valid"):
        if isinstance(data[key], str) and data[key]:
            data[key] = Path(data[key]).name
    return {**config, "out": Path(config["out"]).name, "data": data}
