"""What `attamba train` leaves with where training fails."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, NoReturn

import pytest

from attamba.cli import main
from attamba.exit_status import FAILED, MISTAKE

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SMALL = ["model.dim=32", "model.n_layers=2", "data.seq_len=32", "data.batch_size=2"]


@pytest.mark.parametrize(("rate", "status"), [("3e-4", FAILED), ("1e9", MISTAKE)])
def test_what_fails_while_training_is_no_mistake_unless_it_would_fail_again(
    rate: str,
    status: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full disk, and losses that are not finite."""

    def full(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device", "weights")

    monkeypatch.setattr("attamba.train.run.save_checkpoint", full)
    (tmp_path / "text.txt").write_text(" ".join(f"word{i} and others" for i in range(300)))
    paths = [f"data.train={tmp_path}/text.txt", f"out={tmp_path}/run"]
    train = ["train.steps=40", "train.device=cpu", "optim.warmup_steps=0", f"optim.lr={rate}"]
    assert main(["train", str(TINY), *SMALL, *paths, *train]) == status
    told = capsys.readouterr().err
    assert ("weights: No space left on device" in told) == (status == FAILED)
