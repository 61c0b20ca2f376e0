"""What the site says of configuration and commands, made from the code; and a look at each page.

A page holds one of MARKERS on a line of its own, which is replaced when the site is built. A page
that would ask the network for a script, a style, a font or a picture ends the build.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import os
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

from mkdocs.exceptions import PluginError

from attamba import config
from attamba.cli import build_parser
from attamba.ops.chunking import BOUNDARIES

EXTERNAL = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon))"
    r"[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>",
    re.IGNORECASE,
)
"""Tags that make a browser fetch something from elsewhere; a link to click on is none."""


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """mkdocs calls this with each page's source."""
    for marker, make in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def on_post_page(output: str, *, page: Any, **kwargs: Any) -> str:
    """mkdocs calls this with each page's HTML. Raises PluginError for what is fetched elsewhere."""
    found = EXTERNAL.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} would ask the network: {found[0]}")
    return output


# --------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------


def configuration() -> str:
    """Every key of a run's configuration: a table for each section, mixer and policy."""
    parts = ["## The run", table(config.RunConfig, "")]
    for field in dataclasses.fields(config.RunConfig):
        section = section_of(typing.get_type_hints(config.RunConfig)[field.name])
        if section is not None:
            parts += [f"## {field.name}", summary(section), table(section, f"{field.name}.")]
        if section is config.ModelConfig:
            for name, mixer in config.MIXERS.items():
                parts += [f"### mixer: {name}", summary(mixer), table(mixer, "mixer.")]
            parts += ["### Boundary policies", policies()]
    return "\n\n".join(parts)


def section_of(hint: Any) -> type | None:
    """The dataclass that a key of a run takes, alone or beside other values."""
    return next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)


def table(cls: type, prefix: str) -> str:
    """The fields of a config dataclass that are no sections themselves, as Markdown."""
    hints, told = typing.get_type_hints(cls), field_docs(cls)
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        cells = (
            f"`{prefix}{field.name}`",
            values(hints[field.name]),
            default(field),
            cell(told.get(field.name, "")),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field in the source of a dataclass."""
    (body,) = (
        n.body for n in ast.parse(inspect.getsource(cls)).body if isinstance(n, ast.ClassDef)
    )
    told = {}
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(node.target, ast.Name)
            told[node.target.id] = ast.literal_eval(following.value)
    return told


def values(hint: Any) -> str:
    """What a field takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        if set(config.MIXERS.values()) & set(arguments):
            return "a mixer, or a list"
        return " or ".join(dict.fromkeys(values(a) for a in arguments))
    if origin is list:
        return f"list: {values(arguments[0])}"
    names = {bool: "true, false", int: "whole number", float: "number", str: "text"}
    return names.get(hint, "null" if hint is type(None) else "dictionary")


def default(field: dataclasses.Field) -> str:
    """A field's default as YAML has it."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if dataclasses.is_dataclass(value):
        return f"`{value.type}`"
    if isinstance(value, bool) or value is None:
        return {True: "`true`", False: "`false`", None: "`null`"}[value]
    return f"`{value}`" if value != "" else ""


def policies() -> str:
    """Every boundary policy with its options."""
    rows = ["| boundary | ends of chunks | options |", "|---|---|---|"]
    for name, policy in BOUNDARIES.items():
        options = ", ".join(f"`{option}`" for option in policy.options)
        rows.append(f"| `{name}` | {cell(inspect.getdoc(policy) or '')} | {options} |")
    return "\n".join(rows)


def summary(cls: type) -> str:
    """The first paragraph of a class's docstring."""
    return (inspect.getdoc(cls) or "").split("\n\n")[0]


def cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    escaped = re.sub(r"([|*_])", r"\\\1", " ".join(text.split()))
    return escaped.replace("<", "&lt;")


# --------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------


def command_line() -> str:
    """What --help says of each command."""
    parts = []
    with mock.patch.dict(os.environ, COLUMNS="80", NO_COLOR="1"):
        for parser in leaves(build_parser()):
            parts.append(f"## {parser.prog}\n\n```text\n{parser.format_help().strip()}\n```")
    return "\n\n".join(parts)


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of commands that do something, in order."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for child in action.choices.values():
            yield from leaves(child)


MARKERS: dict[str, Callable[[], str]] = {
    "{{ configuration }}": configuration,
    "{{ command line }}": command_line,
}
