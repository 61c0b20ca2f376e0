"""Configurations as they are written: YAML, JSON and key=value, into dataclasses and back.

What a field means is known by attamba.config; here its type is, and what mixers there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from attamba.mixers import MIXERS, ConfigError, Mixer

T = TypeVar("T")


def read_tree(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, or of a .json one, for which pyyaml is not needed.

    Raises ConfigError for what is neither; FileNotFoundError for a missing file.
    """
    if Path(path).is_dir():
        raise ConfigError(
            f"{path} is a folder; give a configuration's file, such as configs/tiny.yaml, or that "
            f"of a run: RUN/config.json"
        )
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".json":
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
    else:
        yaml = _yaml()
        try:
            tree = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            named = Path(path).suffix in (".yaml", ".yml")
            hint = "" if named else f"; a text is named by data.train={path}"
            raise ConfigError(f"{path} is not valid YAML: {reason}{hint}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(tree).__name__}")
    return tree


def _yaml() -> types.ModuleType:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ImportError(
            "pyyaml is not installed; it comes with: pip install 'attamba[train]'"
        ) from error
    return yaml


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """["a.b=1", "c=[x]"] -> {"a.b": 1, "c": ["x"]}; values are read as YAML.

    Raises ConfigError for an argument without "=".
    """
    if not arguments:
        return {}
    yaml = _yaml()
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            is_path = Path(argument).exists()
            more = "; give one file or folder alone, then keys that differ" if is_path else ""
            raise ConfigError(f"{argument!r} is not of the form key=value{more}")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: cannot read {text!r}: {error}") from error
        if isinstance(value, str):  # YAML 1.1 takes 1e-3 for a string
            with contextlib.suppress(ValueError):
                value = float(value) if any(c.isdigit() for c in value) else value
        overrides[key] = value
    return overrides


def from_dict(cls: type[T], tree: dict[str, Any], where: str = "") -> T:
    """Build a config dataclass from nested dictionaries.

    Raises ConfigError for an unknown key (naming the nearest) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in tree.items():
        if key not in fields:
            section = _section_of(key, hints)
            if section is not None:
                raise ConfigError(f"unknown key {key!r}; did you mean '{section}.{key}'?")
            unknown_key(f"{where}.{key}" if where else str(key), list(fields))
        values[key] = _coerce(hints[key], value, f"{where}.{key}" if where else key)
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dictionaries, lists and scalars; from_dict reads it back."""
    return dataclasses.asdict(config)


def parse_mixer(value: Any, where: str) -> Mixer:
    """The mixer that a dictionary with a "type" describes; one that is made already itself.

    where: the key, for messages. Raises ConfigError for what is neither.
    """
    if isinstance(value, typing.get_args(Mixer)):
        return typing.cast(Mixer, value)
    if not isinstance(value, dict):
        raise ConfigError(
            f'{where}={value!r} must be a dictionary with a "type", e.g. {{"type": "attamba"}}'
        )
    name = value.get("type", "attamba")
    if not isinstance(name, str) or name not in MIXERS:
        there = ", ".join(MIXERS)
        raise ConfigError(
            f"{where}.type={name!r} is not a mixer (there are: {there}){did_you_mean(name, MIXERS)}"
        )
    _check_of_one_type(value, name, where)
    return from_dict(MIXERS[name], value, where)


def _check_of_one_type(value: dict[str, Any], name: str, where: str) -> None:
    """Raise ConfigError for keys of other mixers, which stay behind where only the type is set."""
    known = _field_names({"type": name})
    others = {key for other in MIXERS for key in _field_names({"type": other})}
    for key in value:
        if key not in known and key in others:
            raise ConfigError(
                f"{where}.{key} is not a key of type={name}, which has: {', '.join(known)}; where "
                f"the type is changed, give the mixer whole: '{where}={{type: {name}}}'"
            )


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` asks, or a ConfigError."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(hint, value, where)
    if origin is Literal:
        return _choice(hint, value, where)
    if origin is list and isinstance(value, (list, tuple)):
        return [_coerce(typing.get_args(hint)[0], v, f"{where}.{i}") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if isinstance(value, dict):
            return from_dict(hint, value, where)  # type: ignore[arg-type]
    try:
        return _scalar(hint, value)
    except ValueError:
        raise ConfigError(f"{where}={value!r} must be {_describe(hint)}") from None


def _coerce_union(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if any(option in MIXERS.values() for option in options):
        if isinstance(value, list):
            return [parse_mixer(v, f"{where}.{i}") for i, v in enumerate(value)]
        return parse_mixer(value, where)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return _coerce(option, value, where)
    for option in options:
        try:
            return _coerce(option, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where}={value!r} must be {_describe(hint)}")


def _choice(hint: Any, value: Any, where: str) -> Any:
    if value in typing.get_args(hint):
        return value
    choices = [str(choice) for choice in typing.get_args(hint)]
    raise ConfigError(
        f"{where}={value!r} must be one of: {', '.join(choices)}{did_you_mean(value, choices)}"
    )


def _scalar(hint: Any, value: Any) -> Any:
    """Null, truth, number or text. Raises ValueError where it is none of that type."""
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        value = float(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    if hint is int and is_number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if hint in (bool, str, type(None)) and isinstance(value, hint):
        return value
    raise ValueError(value)


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(o) for o in typing.get_args(hint))
    if origin is list:
        return f"a list, [a, b, ...], each {_describe(typing.get_args(hint)[0])}"
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
    }
    if hint in names:
        return names[hint]
    return "a dictionary" if origin is dict or dataclasses.is_dataclass(hint) else str(hint)


def set_key(tree: Any, path: list[str], value: Any, key: str) -> None:
    """Set tree[path] = value, making dictionaries on the way."""
    head, *rest = path
    if isinstance(tree, list):
        if head.isdigit():
            if int(head) >= len(tree):
                raise ConfigError(f"{key}: the list has {len(tree)} entries, counted from 0")
            if rest:
                set_key(tree[int(head)], rest, value, key)
            else:
                tree[int(head)] = value
            return
        if not all(isinstance(entry, dict) for entry in tree):
            raise ConfigError(f"{key}: {tree} is a list of values, which has no keys; set it whole")
        takers = [t for t in tree if _takes(t, head)]
        if not takers:
            unknown_key(key, sorted({n for t in tree for n in _field_names(t)}))
        for taker in takers:
            set_key(taker, path, value, key)
        return
    if not rest:
        tree[head] = value
        return
    child = tree.get(head)
    if isinstance(child, str) and head == "boundary":
        child = {"type": child}
    if not isinstance(child, (dict, list)):
        child = {}
    tree[head] = child
    set_key(child, rest, value, key)


def _field_names(mixer: dict[str, Any]) -> list[str]:
    name = mixer.get("type", "attamba")
    cls = MIXERS.get(name) if isinstance(name, str) else None
    return [f.name for f in dataclasses.fields(cls)] if cls else []


def _takes(mixer: Any, name: str) -> bool:
    return isinstance(mixer, dict) and name in _field_names(mixer)


def _section_of(key: str, hints: dict[str, Any]) -> str | None:
    """The section among these fields that has such a key: `train` for `steps`."""
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint) and key in {f.name for f in dataclasses.fields(hint)}:
            return name
    in_mixers = any(_takes({"type": name}, key) for name in MIXERS)
    return "mixer" if in_mixers and "model" in hints else None


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def unknown_key(key: str, known: Sequence[str]) -> typing.NoReturn:
    """Raise ConfigError for a key that does not exist, naming the nearest one or all there are."""
    nearest = difflib.get_close_matches(key.rsplit(".", 1)[-1], known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known)}"
    raise ConfigError(f"unknown key {key!r}{hint}")
