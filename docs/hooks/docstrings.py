"""The package's docstrings as Markdown: arguments in running text become lists.

Docstrings here tell short arguments in paragraphs of lines "name: what it is". Markdown would run
those lines together.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ITEM = re.compile(r"(?P<names>[a-zA-Z]\w*(?:=\w+)?(?:, [a-zA-Z]\w*)*):\s+(?P<text>\S.*)")
WORDS = re.compile(r"(?:Shapes|Options?|Raises|Returns|Default|Note)\b")
"""Words that begin a sentence, where ITEM takes them for names."""
AFTER = re.compile(r"(?<=[.)]) (?=(?:Raises|Returns) )")
"""Where the last item of a list ends and what is said of the whole begins."""


class Tidy(griffe.Extension):
    """Rewrites the docstring of every object that is documented."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """griffe calls this for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = tidy(obj.docstring.value)


def tidy(text: str) -> str:
    """A docstring with its lists as lists, and < shown as it is; indented code is left alone."""
    out: list[str] = []
    for paragraph in re.split(r"\n[^\S\n]*\n", text):
        if paragraph.startswith(" ") and out and out[-1].lstrip().startswith("- `"):
            out.append(textwrap.indent(paragraph, "    "))  # code that belongs to the last item
        else:
            out.append(_paragraph(paragraph))
    return "\n\n".join(out)


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if lines[0].startswith(" ") or re.match(r"[A-Z]\w+:$", lines[0]):
        return text  # code, or a section like "Args:"
    if not _is_item(lines[0]):
        return _shown(text)
    items: list[str] = []
    for line in lines:
        match = ITEM.match(line) if _is_item(line) else None
        if match:
            names = ", ".join(f"`{name}`" for name in match["names"].split(", "))
            items.append(f"- {names}: {_shown(match['text'])}")
        else:
            items[-1] += " " + _shown(line.strip())
    items[-1:] = AFTER.split(items[-1], maxsplit=1)
    told = items.pop() if not items[-1].startswith("- ") else ""
    return "\n".join(items) + f"\n\n{told}".rstrip()


def _is_item(line: str) -> bool:
    return bool(ITEM.match(line)) and not WORDS.match(line)


def _shown(text: str) -> str:
    """HTML's < escaped outside of backticks."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)
