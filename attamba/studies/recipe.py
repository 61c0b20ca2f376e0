"""Recipes: a base configuration, named variants that differ from it by a few keys, and scores.

A recipe is a YAML file, or the same tree as JSON for machines without pyyaml:

    name:      what the study is called; that of the file where nothing is said
    question:  what the study asks, in a sentence
    report:    the tables it belongs to: paper, main, ablations, memory
    base:      a configuration file, relative to the recipe (or the tree itself)
    set:       keys that all variants change: {train.steps: 3000}
    seeds:     [0, 1]
    variants:  {name: {key: value, ...}, ...}
    grid:      {P: {mixer.chunk_size: [4, 8]}, L: {mixer.leading_tokens: [1, 8]}}: variants P4-L1,
               P4-L8, P8-L1 and P8-L8 besides the named ones
    stages:    [{key: value, ...}, ...]: trainings that come before the run's own, by the keys that
               they change of it. Each begins with the weights of the one before it
    scores:    {name: {kind: text, ...}, ...}; see scores.py
    against:   the variant that the others are compared with, or {variant: what it is compared
               with}; where nothing is said the variant called transformer, if there is one
    paper:     {variant: name in studies/paper/numbers.json}
    tiny:      keys that --scale tiny changes besides TINY
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from attamba.config import ConfigError, RunConfig, apply_overrides, from_dict, read_tree, to_dict
from attamba.studies.scores import check_scores

Scale = Literal["tiny", "full"]
SCALES: tuple[str, ...] = get_args(Scale)
GROUPS = ("paper", "main", "ablations", "memory")
SUFFIXES = (".yaml", ".json")

KEYS = (
    *("question", "report", "base", "set", "seeds", "variants", "grid", "stages", "scores"),
    *("against", "paper", "tiny", "name"),
)
REFERENCE = "transformer"
"""What variants are compared with where a recipe does not say `against`."""
NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*")
"""What a variant may be called: its result is a file of that name."""

TINY: dict[str, Any] = {
    "model.vocab_size": 256,
    "model.ffn_dim": 64,
    "data.seq_len": 64,
    "data.batch_size": 2,
    "optim.warmup_steps": 2,
    "train.steps": 4,
    "train.accumulate": 1,
    "train.dtype": "float32",
    "train.compile": False,
    "train.cuda_graphs": False,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.eval_rows": 2,
    "train.save_every": 0,
    "train.device": "cpu",
}
"""What --scale tiny changes: everything that costs time; widths and mixers stay as they are."""
TINY_LAYERS = 2
"""Layers at tiny scale; a hybrid keeps one of each in its list."""


Resolve = Callable[[dict[str, Any]], dict[str, Any]]


STAGES = "stages "
"""How train.init_from begins in the configuration of a run that has stages: they follow."""


@dataclass(frozen=True)
class Run:
    """One training and its scores."""

    study: str
    variant: str
    seed: int
    scale: Scale
    tree: dict[str, Any]
    """The configuration before it is checked; separators may still be words."""
    scores: dict[str, dict[str, Any]]
    stages: tuple[dict[str, Any], ...] = ()
    """The configurations, likewise, of the trainings before it."""

    @property
    def name(self) -> str:
        return f"{self.variant}-s{self.seed}"

    def config(self, resolve: Resolve = dict) -> RunConfig:
        """The configuration. resolve: last changes to the tree (paths of data, separators).

        train.init_from tells its stages, where it has some. Raises ConfigError where it cannot be.
        """
        return _checked(resolve(self.tree))

    def stage_configs(self, resolve: Resolve = dict) -> list[RunConfig]:
        """Those of its stages, in their order. Raises ConfigError where one cannot be."""
        return [_checked(resolve(tree)) for tree in self.stages]


def _checked(tree: dict[str, Any]) -> RunConfig:
    config = from_dict(RunConfig, tree)
    config.validate()
    return config


@dataclass(frozen=True)
class Study:
    """A recipe, read."""

    name: str
    question: str
    groups: tuple[str, ...]
    base: dict[str, Any]
    common: dict[str, Any]
    """Keys that all variants change."""
    seeds: tuple[int, ...]
    variants: dict[str, dict[str, Any]]
    scores: dict[str, dict[str, Any]]
    against: dict[str, str] = field(default_factory=dict)
    """Which variant a variant is compared with; those that are compared with none are not there."""
    paper: dict[str, str] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)
    stages: tuple[dict[str, Any], ...] = ()
    """What each training before a run's own changes of it."""

    def runs(self, scale: Scale, only: str | None = None) -> list[Run]:
        """Runs in the order of the recipe, every variant's first seed before any second one.

        only: a pattern (as a shell's) of variants or runs.
        """
        seeds = self.seeds[:1] if scale == "tiny" else self.seeds
        runs = [self._run(v, seed, scale) for seed in seeds for v in self.variants]
        if only is None:
            return runs
        return [
            run for run in runs if any(fnmatch.fnmatch(n, only) for n in (run.variant, run.name))
        ]

    def _run(self, variant: str, seed: int, scale: Scale) -> Run:
        changes = {**self.common, **self.variants[variant], "train.seed": seed}
        tree = apply_overrides(self.base, changes)
        stages = tuple(self._scaled(apply_overrides(tree, stage), scale) for stage in self.stages)
        if stages:
            told = f"{STAGES}{json.dumps(self.stages, sort_keys=True)}"
            tree = apply_overrides(tree, {"train.init_from": told})
        return Run(self.name, variant, seed, scale, self._scaled(tree, scale), self.scores, stages)

    def _scaled(self, tree: dict[str, Any], scale: Scale) -> dict[str, Any]:
        if scale == "full":
            return tree
        mixer = tree.get("model", {}).get("mixer")
        layers = len(mixer) if isinstance(mixer, list) else TINY_LAYERS
        return apply_overrides(tree, {**TINY, "model.n_layers": layers, **self.tiny})

    def to_tree(self) -> dict[str, Any]:
        """The recipe as one tree without references to files, for load_study of JSON."""
        return {
            "name": self.name,
            "question": self.question,
            "report": list(self.groups),
            "base": self.base,
            "set": self.common,
            "seeds": list(self.seeds),
            "variants": self.variants,
            "stages": list(self.stages),
            "scores": self.scores,
            "against": self.against,
            "paper": self.paper,
            "tiny": self.tiny,
        }


def chosen_runs(studies: Sequence[Study], scale: Scale, only: str | None) -> list[Run]:
    """The studies' runs, one study after the other. Raises ConfigError if `only` leaves none."""
    runs = [run for study in studies for run in study.runs(scale, only)]
    if not runs:
        names = ", ".join(study.name for study in studies)
        variants = dict.fromkeys(variant for study in studies for variant in study.variants)
        raise ConfigError(
            f"--only={only} names no run of {names}; variants are: {', '.join(variants)}"
        )
    return runs


def find_recipes(folder: Path) -> dict[str, Path]:
    """The recipes of a folder by name. Raises ConfigError where there are none."""
    found = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES)
    if not found:
        raise ConfigError(
            f"--recipes={folder} holds no recipe; go to the folder of the project, or name another"
        )
    return {path.stem: path for path in found}


def find_study(name: str, folder: Path) -> Study:
    """The study `name` of a folder, or that of a recipe file. Raises ConfigError."""
    path = Path(name)
    if path.suffix in SUFFIXES and path.is_file():
        return load_study(path)
    recipes = find_recipes(folder)
    if name not in recipes:
        nearest = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are: {', '.join(recipes)}"
        raise ConfigError(f"{name!r} is no study in {folder} ({hint}); name one, or a recipe file")
    return load_study(recipes[name])


def load_study(path: Path) -> Study:
    """Read a recipe. Raises ConfigError for what it cannot mean, naming the file."""
    tree = read_tree(path)
    try:
        return _study(path, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _study(path: Path, tree: dict[str, Any]) -> Study:
    for key in tree:
        if key not in KEYS:
            nearest = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(KEYS)}"
            raise ConfigError(f"unknown key {key!r}; {hint}")
    groups = tuple(tree.get("report", ()))
    if not groups or not set(groups) <= set(GROUPS):
        raise ConfigError(f"report={list(groups)} must name some of: {', '.join(GROUPS)}")
    seeds = tuple(tree.get("seeds", (0,)))
    if not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise ConfigError(f"seeds={list(seeds)} must be whole numbers, at least 0 and one of them")
    variants = {**_named(tree.get("variants") or {}), **_product(tree.get("grid") or {})}
    if not variants:
        raise ConfigError("there are no variants; name some, or give a grid")
    scores = tree.get("scores") or {}
    check_scores(scores)
    paper = tree.get("paper") or {}
    strangers = sorted(set(paper) - set(variants))
    if strangers:
        raise ConfigError(f"paper names {strangers[0]!r}, which is not a variant")
    base, common = _base(path, tree.get("base", {})), tree.get("set") or {}
    return Study(
        name=tree.get("name", path.stem),
        question=str(tree.get("question", "")).strip(),
        groups=groups,
        base=base,
        common=common,
        seeds=seeds,
        variants=variants,
        scores=scores,
        against=_references(tree.get("against"), variants),
        paper=paper,
        tiny=tree.get("tiny") or {},
        stages=_stages(tree.get("stages") or [], base, common, variants),
    )


def _stages(
    asked: Any, base: dict[str, Any], common: dict[str, Any], variants: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], ...]:
    """What `stages` says. Raises ConfigError for what is no list of changes."""
    if not isinstance(asked, list) or not all(isinstance(stage, dict) for stage in asked):
        raise ConfigError(f"stages={asked!r} must be a list of keys and values, a stage to each")
    places = [("base", base), ("set", common), *variants.items()]
    places += [(f"stage {number}", stage) for number, stage in enumerate(asked, 1)]
    for place, changes in places if asked else ():
        if (apply_overrides({}, changes).get("train") or {}).get("init_from") is not None:
            raise ConfigError(
                f"{place} sets train.init_from, and with `stages` each training begins with the "
                f"one before; leave it out"
            )
    return tuple(asked)


def _references(asked: str | dict[str, str] | None, variants: dict[str, Any]) -> dict[str, str]:
    """What `against` says, variant by variant. Raises ConfigError for what names no variant."""
    if asked is None:
        asked = REFERENCE if REFERENCE in variants else {}
    if isinstance(asked, str):
        asked = {variant: asked for variant in variants if variant != asked}
    if not isinstance(asked, dict):
        raise ConfigError(f"against={asked!r} must be a variant, or variants and their references")
    for name in (*asked.keys(), *asked.values()):
        if not isinstance(name, str) or name not in variants:
            raise ConfigError(f"against names {name!r}, which is not a variant")
    for variant, reference in asked.items():
        if variant == reference:
            raise ConfigError(f"against.{variant} is that variant itself; name another, or none")
    return asked


def _base(path: Path, base: str | dict[str, Any]) -> dict[str, Any]:
    """All fields of the base configuration."""
    tree = read_tree(path.parent / base) if isinstance(base, str) else base
    config = from_dict(RunConfig, tree)
    config.validate()
    return to_dict(config)


def _named(variants: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for name, changes in variants.items():
        if not NAME.fullmatch(str(name)):
            raise ConfigError(
                f"variant {name!r}: a name is letters, digits and . _ + = -, for it names a file"
            )
        if changes is not None and not isinstance(changes, dict):
            raise ConfigError(f"variant {name}: {changes!r} must be keys and values")
    return {str(name): dict(changes or {}) for name, changes in variants.items()}


def _product(grid: dict[str, dict[str, list[Any]]]) -> dict[str, dict[str, Any]]:
    """Every combination of the grid's values."""
    if not grid:
        return {}
    axes = []
    for letter, axis in grid.items():
        if not isinstance(axis, dict) or len(axis) != 1:
            raise ConfigError(f"grid.{letter} must be one key and its values")
        ((key, values),) = axis.items()
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{letter}.{key}={values!r} must be a list of values")
        axes.append([(f"{letter}{value}", key, value) for value in values])
    return {
        "-".join(name for name, _, _ in point): {key: value for _, key, value in point}
        for point in itertools.product(*axes)
    }


def save_json(study: Study, path: Path) -> None:
    """Write a recipe as JSON, its base included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(study.to_tree(), indent=1) + "\n", encoding="utf-8")
