"""metrics.jsonl: one JSON object per line, of kind "train", "valid", "tasks" or "layers".

train: step, tokens, loss (nats per token of that step's batch; null if not finite), lr, grad_norm
       (before clipping; null if not finite), skipped (steps left out so far, see spikes),
       tokens_per_second (since the last line, validation and saving not counted), seconds (of
       training since step 0, over all its resumptions), and the figures of observers.Speed
valid: step, tokens, seconds, valid_loss (nats per token), valid_bits_per_byte (by the mean bytes
       per token of the validation data; null for a generated task)
tasks: step, tokens, seconds, and "<task>/<metric>" for each figure of eval.tasks (null: not finite)
layers: step, tokens, seconds, and the figures of layers.LayerStatistics by module

With eval.mode process or job "valid" and "tasks" stand in eval.jsonl instead.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from attamba.config import RunConfig, to_dict
from attamba.data.files import naming, write_aside
from attamba.train.sinks import Record, Sink, open_sinks

__all__ = [
    "MetricsLog",
    "Record",
    "Unwritten",
    "append_line",
    "read_lines",
    "read_metrics",
    "records_up_to",
    "rewrite",
]

MEND = "mend or delete that line"


def read_metrics(path: str | Path) -> list[Record]:
    """The lines of a metrics file, in order, as read_lines has them.

    Raises ValueError for a line that is not a JSON object with a step.
    """
    records = read_lines(path)
    for number, record in enumerate(records, 1):
        if "step" not in record:
            raise ValueError(f"{path}, line {number} is not a record with a step; {MEND}")
    return records


def read_lines(path: str | Path) -> list[Record]:
    """The JSON objects of a file that has one per line, in order.

    A last line without its newline was being written when the process was killed: it is left out.
    Raises ValueError for any other line that is not a JSON object.
    """
    records = []
    *lines, _ = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); {MEND}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object; {MEND}")
        records.append(record)
    return records


class MetricsLog:
    """Keeps the records of a run and writes them to each of metrics.sinks.

    step: the step that the run goes on from. Records of later steps, which a killed run wrote
        after its last checkpoint, are cut; at step 0 that is all of them.

    Raises MissingPackageError (an ImportError that names the extra) for a sink whose package is not
    installed.
    """

    def __init__(self, run_dir: Path, *, step: int, config: RunConfig | None = None) -> None:
        config = config or RunConfig()
        names: list[str] = list(config.metrics.sinks)
        if config.train.tensorboard and "tensorboard" not in names:
            names.append("tensorboard")
        self._sinks: list[Sink] = open_sinks(
            names, run_dir, step=step, project=config.metrics.project, config=to_dict(config)
        )
        self.records: list[Record] = []
        """All records of the run; without jsonl those of this call of train."""
        if "jsonl" in names:
            lines = JsonLines(run_dir / "metrics.jsonl", step)
            self.records = lines.records
            self._sinks.insert(0, lines)

    def write(self, record: Record) -> None:
        """Append one record."""
        self.records.append(record)
        for sink in self._sinks:
            sink.write(record)

    def show(self, record: Record) -> None:
        """A record that stands in another file, for the sinks that draw."""
        for sink in self._sinks:
            if not isinstance(sink, JsonLines):
                sink.write(record)

    def sync(self) -> None:
        """Bring all records to the disk, before a checkpoint that vouches for them."""
        for sink in self._sinks:
            sink.sync()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sink in self._sinks:
            # What could not be written is told already.
            with suppress(OSError) if error is not None else nullcontext():
                sink.close()


class JsonLines:
    """The file of records, cut to those up to `step`."""

    def __init__(self, path: Path, step: int) -> None:
        self.records = records_up_to(path, step)
        rewrite(path, self.records)
        self._path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close

    def write(self, record: Record) -> None:
        """A reader of the file sees the whole line at once."""
        with naming(self._path, "the last checkpoint"):
            self._file.write(_line(record))
            self._file.flush()

    def sync(self) -> None:
        with naming(self._path, "the last checkpoint"):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Unwritten:
    """In the place of a MetricsLog on ranks that write none."""

    records: ClassVar[list[Record]] = []

    def write(self, record: Record) -> None:
        """Nothing."""

    def show(self, record: Record) -> None:
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


def records_up_to(path: Path, step: int) -> list[Record]:
    """The records of a file up to this step; none at step 0, and where there is no file."""
    written = read_metrics(path) if step and path.exists() else []
    return [record for record in written if record["step"] <= step]


def rewrite(path: Path, records: list[Record]) -> None:
    """Put these records into a file, in the place of what it holds."""
    write_aside(path, "".join(map(_line, records)).encode())


def append_line(path: Path, record: Record) -> None:
    """Add a record to a file of them; it is on the disk then.

    A last line without its newline, which a killed process left, is cut off first: the record would
    be glued to it. No reader has taken it.
    """
    with open(path, "ab+") as file:
        file.seek(0)
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        file.write(_line(record).encode())
        file.flush()
        os.fsync(file.fileno())


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
