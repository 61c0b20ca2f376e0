"""A corpus of several kinds of files, and parts that are small enough to divide it."""

import json
import random

import pytest

from attamba.data import parts

WORDS = ["the", "a", "cat", "dog", "tree", "river", "sees", "under", "red", "Grüße", "世界"]


def document(draw):
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 60)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Several kinds of files, one of them larger than a part (parts of 8 kB); 500 documents."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for name, n in (("a.jsonl", 300), ("c.jsonl", 60)):
        lines = [json.dumps({"text": document(draw)}) for _ in range(n)]
        lines[5:5] = ["", json.dumps({"text": " "})]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": [document(draw) for _ in range(100)]})
    parquet.write_table(table, folder / "b.parquet", row_group_size=7, compression="none")
    for i in range(40):
        (folder / f"d{i}.txt").write_text(document(draw), encoding="utf-8")
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "LEAST", 8000)
