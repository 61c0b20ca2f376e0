import bz2
import gzip
import json
import lzma
import re
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attamba.data import DataError, Document, read_documents
from attamba.data.reader import _split

TEXT = "Grüße, 世界 🎉\r\nsecond line\n"


def texts(paths, **options):
    return [document.text for document in read_documents(paths, **options)]


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


COMPRESS = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "A.TXT", "wiki.test.raw"])
def test_text_is_read_byte_for_byte(tmp_path, name):
    (tmp_path / name).write_bytes(TEXT.encode())
    assert texts(tmp_path / name) == [TEXT]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("split_on", [None, "^second"])
def test_compressed_text(tmp_path, suffix, split_on):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT.encode()))
    assert "".join(texts(path, split_on=split_on)) == TEXT


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_jsonl(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    data = jsonl({"text": TEXT, "n": 1}, {"text": ""}, {"text": "two"}).encode() + b"\n"
    path.write_bytes(COMPRESS[suffix](data) if suffix else data)
    documents = read_documents(str(path))
    assert list(documents) == [Document(TEXT, str(path)), Document("two", str(path))]
    assert documents.n_empty == 1


def test_zstd_of_several_frames_is_read_to_the_end(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(zstd(part * 50_000) for part in (b"one ", b"two ", b"three ")))
    assert texts(path) == ["one " * 50_000 + "two " * 50_000 + "three " * 50_000]


def write_parquet(path, columns):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path, row_group_size=3)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"row {i} 🎉" for i in range(200)]
    write_parquet(path, {"id": list(range(200)), "body": rows})
    assert texts(path, text_key="body") == rows


def test_folder_is_recursive_sorted_and_leaves_out_what_is_not_text(tmp_path):
    hidden = (".hidden.txt", ".git/x.txt", "a/.h/y.txt")
    for name in ("b.txt", "a/z.md", "a/b/c.py", *hidden, "p.png", "p.raw"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a/__init__.py").write_text("")
    (tmp_path / "a/blank.txt").write_text(" \n")
    documents = read_documents(tmp_path)
    assert [(d.text, d.source) for d in documents] == [
        (name, f"{tmp_path}/{name}") for name in ("a/b/c.py", "a/z.md", "b.txt")
    ]
    assert documents.n_empty == 2


def test_sources_follow_the_path_as_given(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert next(read_documents("corpus/")).source == "corpus/a.txt"
    assert next(read_documents("corpus/a.txt")).source == "corpus/a.txt"


def test_paths_are_read_in_the_order_given(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts([tmp_path / "b.txt", str(tmp_path / "a.txt")]) == ["b", "a"]


def test_names_with_signs_that_mean_something_to_fsspec(tmp_path):
    for name in ("a::b.txt", "c*[1].txt", "d e%20.txt"):
        (tmp_path / name).write_text(name)
        assert texts(tmp_path / name) == [name]


def test_urls_go_to_fsspec():
    fs = pytest.importorskip("fsspec").filesystem("memory")
    fs.pipe({"/corpus/a.txt": b"a", "/corpus/sub/b.txt.gz": gzip.compress(b"b")})
    try:
        assert texts("memory://corpus") == ["a", "b"]
    finally:
        fs.rm("/corpus", recursive=True)


def test_documents_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl({"text": "good"}) + "broken\n")
    documents = read_documents(path)
    assert next(documents).text == "good"
    with pytest.raises(DataError):
        next(documents)


# split_on


def test_split_on_cuts_before_matching_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" \n = One = \ntext\n = = Part = = \n = Two = \r\nmore")
    assert texts(path, split_on=r"^ = [^=].* = $") == [
        " \n = One = \ntext\n = = Part = = \n",
        " = Two = \r\nmore",
    ]


def test_text_before_the_first_match_is_a_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("preface\n# A\na\n# B\nb\n")
    assert texts(path, split_on="^# ") == ["preface\n", "# A\na\n", "# B\nb\n"]


@given(st.text(alphabet="#a \n\r", max_size=60))
def test_split_documents_are_the_file(text):
    lines = [(0, line.encode()) for line in text.splitlines(keepends=True)]
    file = SimpleNamespace(name="a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attamba.data.reader._raw_lines", lambda file: iter(lines))
        parts = list(_split(file, re.compile("^#")))
    assert "".join(parts) == text
    assert all(part.lstrip().startswith("#") for part in parts[1:])
    assert all(part.strip() for part in parts[:-1])


# Bad input


def fails(paths, *fragments, **options):
    with pytest.raises(DataError) as error:
        texts(paths, **options)
    for fragment in fragments:
        assert fragment in str(error.value), str(error.value)
    assert isinstance(error.value, ValueError)


def test_missing_path(tmp_path):
    fails(tmp_path / "no.txt", f"{tmp_path}/no.txt does not exist", "check the path")


def test_no_path():
    fails([], "no path given")
    fails("", "no path given")


def test_path_given_twice(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    fails([tmp_path / "a.txt"] * 2, "a.txt is given twice")


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.zip", "a.pdf.gz", "a.parquet.gz"])
def test_unknown_suffix(tmp_path, name):
    (tmp_path / name).write_text("text")
    fails(tmp_path / name, f"{name} is not a kind of file that is read", ".jsonl", ".parquet")


def test_folder_without_readable_files(tmp_path):
    fails(tmp_path, f"{tmp_path} holds no file of a kind that is read; there are: .txt")


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    fails(tmp_path / name, f"{name} is empty or blank", "with text in it")


def test_folder_of_empty_files(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    fails(tmp_path, f"{tmp_path} is empty or blank")


@pytest.mark.parametrize("split_on", [None, "^x"])
def test_not_utf8(tmp_path, split_on):
    (tmp_path / "a.txt").write_bytes(b"ok\ngr" + "üße".encode("latin-1"))
    fails(tmp_path / "a.txt", "a.txt: not UTF-8 at byte 5 (0xfc)", "convert it", split_on=split_on)


def test_not_utf8_inside_a_folder_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    fails(tmp_path, "b.txt: not UTF-8 at byte 0")


@pytest.mark.parametrize("split_on", [None, "^x"])
def test_binary(tmp_path, split_on):
    (tmp_path / "a.txt").write_bytes(b"abc\n\0\xff")
    fails(tmp_path / "a.txt", "a.txt: byte 4 is NUL", "binary", split_on=split_on)


def test_utf16(tmp_path):
    (tmp_path / "a.txt").write_bytes("hello".encode("utf-16-le"))
    fails(tmp_path / "a.txt", "byte 1 is NUL", "UTF-16", "converted to UTF-8")


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{'text': 1}", "a.jsonl:2: broken JSON"),
        ('{"text": "a"', "broken JSON (Expecting ',' delimiter: column 13 (char 12)); each line"),
        ('{"text": ' + "[" * 100_000, "broken JSON (maximum recursion depth exceeded"),
        ("[1]", "a.jsonl:2: not a JSON object"),
        ('{"body": "x"}', "a.jsonl:2: no key 'text' (keys: 'body'); set text_key"),
        ('{"text": null}', "a.jsonl:2: 'text' is NoneType, not text"),
        ('{"text": "a\\u0000"}', "a.jsonl:2: 'text' holds NUL"),
        ('{"text": "a\\ud800"}', "a.jsonl:2: 'text' holds half a surrogate pair at character 1"),
    ],
)
def test_bad_json_line(tmp_path, line, fragment):
    (tmp_path / "a.jsonl").write_text(jsonl({"text": "good"}) + line + "\n")
    fails(tmp_path / "a.jsonl", fragment)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "not"])
def test_damaged_compressed_file(tmp_path, suffix, damage):
    data = COMPRESS[suffix](bytes(range(32, 127)) * 3000)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"plain text, not packed")
    fails(path, f"{path} is cut off or damaged", "compress it again")


def test_zstd_cut_between_reads(tmp_path):
    path = tmp_path / "a.txt.zst"
    data = zstd(b"".join(b"%d " % (i * i) for i in range(200_000)))
    path.write_bytes(data[:-1])
    fails(path, "is cut off or damaged (the last zstd frame has no end)")


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"body": ["a", None], "n": [1, 2]})
    fails(path, "a.parquet: no column 'text' (columns: 'body', 'n'); set text_key")
    fails(path, "row 1: 'body' is NoneType, not text", text_key="body")
    fails(path, "row 0: 'n' is int, not text", text_key="n")
    path.write_bytes(path.read_bytes()[:-20])
    fails(path, f"{path} is cut off or no parquet file")


def test_bad_split_on(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    fails(tmp_path / "a.txt", "split_on='(' is not a regular expression", split_on="(")


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    for name in ("fsspec", "fsspec.implementations.local"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r"fsspec is not installed.*pip install 'attamba\[train\]'"
    ):
        texts(tmp_path / "a.txt")
