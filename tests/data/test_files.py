"""Files that are written aside and renamed."""

import hashlib
from pathlib import Path

import pytest

from attamba.data.files import sha256, write_aside


def test_the_old_content_stays_where_the_new_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_aside(path, b"old")
    write_aside(path, b"older")

    def full(self: Path, content: bytes) -> None:
        self.open("wb").write(content[:1])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", full)
        write_aside(path, b"new")
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 3, (1 << 20) + 1])
def test_sha256(tmp_path, size):
    (tmp_path / "a").write_bytes(b"x" * size)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"x" * size).hexdigest()
