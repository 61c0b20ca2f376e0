"""attamba.pictures: what is checked in is what the code draws, and what it draws is so."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from attamba import pictures
from attamba.pictures import PICTURES, POLICIES, TEXT

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"

Shape = tuple[str, list[float]]


def shapes(path: Path) -> list[Shape]:
    """Colour and corners of all that a picture shows but its letters, in order.

    Letters, names of clips and the places of legends differ a little from one release of
    matplotlib to another; cells are many points wide.
    """

    def walk(node: ElementTree.Element) -> Iterator[Shape]:
        for child in node:
            name = child.tag.rpartition("}")[2]
            if name in ("defs", "metadata") or child.get("id", "").startswith("text_"):
                continue
            if name == "path":
                colours = "; ".join(re.findall(r"(?:fill|stroke): [^;]+", child.get("style", "")))
                numbers = re.findall(r"-?\d+(?:\.\d+)?", child.get("d", ""))
                yield colours, [float(number) for number in numbers]
            yield from walk(child)

    return list(walk(ElementTree.parse(path).getroot()))


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_the_code_draws(name: str, tmp_path: Path) -> None:
    drawn, kept = shapes(pictures.draw(name, tmp_path)), shapes(IMAGES / f"{name}.svg")
    remedy = "draw them anew: python -m attamba.pictures"
    assert [colour for colour, _ in drawn] == [colour for colour, _ in kept], remedy
    for (_, ours), (_, theirs) in zip(drawn, kept):
        assert len(ours) == len(theirs), remedy
        np.testing.assert_allclose(ours, theirs, atol=1, err_msg=remedy)
    assert len(drawn) >= 5


def test_a_changed_picture_is_noticed(tmp_path: Path) -> None:
    path = pictures.draw("scopes", tmp_path)
    before = shapes(path)
    path.write_text(path.read_text().replace(pictures.PAST.lower(), "#123456", 1))
    assert shapes(path) != before


def test_a_picture_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = (pictures.draw("scopes", tmp_path / side) for side in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_pictures_are_small_and_shown() -> None:
    files = sorted(IMAGES.iterdir())
    assert [file.stem for file in files] == sorted(PICTURES)
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    for file in files:
        assert file.stat().st_size < 200_000, file
        assert f"(images/{file.name})" in pages, file


def test_ends_are_the_policies_written_out() -> None:
    ends = {p.title.partition(":")[0].split()[0]: pictures.policy_ends(p, 49) for p in POLICIES}
    t = np.arange(49)
    for name, offsets in (("uniform", [0, 0, 0, 0]), ("cyclic", [0, 2, 4, 6])):
        for row, offset in zip(ends[name], offsets, strict=True):
            assert (row == ((t % 8 == 7 - offset) | (t == 0))).all(), name
    assert (ends["head_cyclic"] == ends["cyclic"]).all()  # four heads, as four layers
    spaces = np.array([character == " " for character in TEXT])
    assert (ends["separator"][0] == (spaces | (t == 0))).all()
    assert ends["budget"].sum(1).max() < 8
    assert all((row != ends["cyclic"][i]).any() for i, row in enumerate(ends["jitter"]))


@pytest.mark.parametrize("n", [1, 4, 5, 6, 13, 29])
def test_what_a_cache_holds_is_the_rule_written_out(n: int) -> None:
    ring, past = pictures.held_positions(pictures.model_of(n_layers=1), 0, n)
    assert len(ring) == 5
    assert {s for s in ring if s is not None} == set(range(max(0, n - 5), n))
    assert all(s is None or s % 5 == slot for slot, s in enumerate(ring))
    assert past == [s for s in range(n - 5) if s == 0 or s % 8 == 7]


def test_states_depend_on_their_chunk_or_on_all() -> None:
    t, s = np.indices((24, 24))
    assert (pictures.dependence("sequence", 8, 24) == (s <= t)).all()
    assert (pictures.dependence("chunk", 8, 24) == ((s <= t) & (s // 8 == t // 8))).all()
