"""metrics.jsonl: one JSON object per line, of kind "train", "valid" or "tasks".

train: step, tokens, loss (nats per token of that step's batch), lr, grad_norm (before clipping),
       tokens_per_second (since the last line, validation and saving not counted), seconds (of
       training since step 0, over all its resumptions)
valid: step, tokens, seconds, valid_loss (nats per token), valid_bits_per_byte (by the mean bytes
       per token of the validation data; null for a generated task)
tasks: step, tokens, seconds, and "<task>/<metric>" for each figure of eval.tasks (null: not finite)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from attamba.data import MissingPackageError
from attamba.data.files import write_aside

Record = dict[str, Any]

_NOT_PLOTTED = ("kind", "step")


def read_metrics(path: str | Path) -> list[Record]:
    """The lines of a metrics file, in order.

    A last line without its newline was being written when the run was killed: it is left out.
    Raises ValueError for any other line that is not a JSON object.
    """
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}, line {number} is not a record with a step")
        records.append(record)
    return records


class MetricsLog:
    """Appends records to <run_dir>/metrics.jsonl and, if asked, to TensorBoard's event files.

    step: the step that the run goes on from. Records of later steps, which a killed run wrote
        after its last checkpoint, are cut; at step 0 that is all of them.
    tensorboard: write <run_dir>/tensorboard too. Raises MissingPackageError (an ImportError that
        names the extra) where tensorboard is not installed.
    """

    def __init__(self, run_dir: Path, *, step: int, tensorboard: bool = False) -> None:
        self._events = _event_writer(run_dir / "tensorboard", step) if tensorboard else None
        path = run_dir / "metrics.jsonl"
        written = read_metrics(path) if step and path.exists() else []
        self.records = [record for record in written if record["step"] <= step]
        """All records of the run."""
        write_aside(path, "".join(map(_line, self.records)).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__

    def write(self, record: Record) -> None:
        """Append one record; a reader of the file sees the whole line at once."""
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()
        if self._events is not None:
            for key, value in record.items():
                if key not in _NOT_PLOTTED and value is not None:
                    self._events.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def sync(self) -> None:
        """Bring all records to the disk, before a checkpoint that vouches for them."""
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


class Unwritten:
    """In the place of a MetricsLog on ranks that write none."""

    records: ClassVar[list[Record]] = []

    def write(self, record: Record) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def __enter__(self) -> Unwritten:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing."""


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackageError(
            "train.tensorboard=true needs tensorboard, which is not installed; it comes with: "
            "pip install 'attamba[train]'"
        ) from error
    # Events of later steps, written by a run that was killed, are hidden from the plots.
    return SummaryWriter(str(folder), purge_step=step + 1)
