"""Data sets of the Hugging Face hub, streamed by the package datasets; and recipes that name them.

    hf:NAME[:CONFIG[:SPLIT[:FIELD]]]    hf:HuggingFaceFW/fineweb-edu:sample-10BT:train:text
    a recipe that comes along           fineweb-edu, dclm, slimpajama
    a recipe of your own                a .yaml file with the fields of HubSource

NAME is also a local folder that datasets.load_dataset reads, or, with `data_files` in a recipe, a
format such as json or parquet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attamba.config import ConfigError, did_you_mean, from_dict, read_tree

from .errors import DataError, MissingPackageError, RecordError
from .parts import Record
from .reader import checked

RECIPES = Path(__file__).with_name("recipes")
MOST_PARTS = 1024
"""Parts of a data set; one with more files has several in each part."""


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A data set, as a recipe describes it."""

    dataset: str
    """Its name on the hub, or a local folder."""
    config: str | None = None
    """Configuration; default: the only or the default one."""
    split: str = "train"
    text_key: str = "text"
    """The field that holds the text."""
    data_files: str | list[str] | None = None
    """Files of the data set alone, or patterns of them."""
    revision: str | None = None
    """Branch, tag or commit; default: the newest."""
    licence: str | None = None
    """For people; written into the manifest."""
    url: str | None = None
    """Where it is described; written into the manifest."""

    @property
    def name(self) -> str:
        """As hf:NAME:CONFIG:SPLIT, for messages and the manifest."""
        return f"hf:{self.dataset}:{self.config or ''}:{self.split}"

    @property
    def key(self) -> str:
        """Equal for equal sources."""
        return json.dumps(dataclasses.asdict(self))


def recipe_names() -> list[str]:
    """The recipes that come along."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse(path: str, text_key: str) -> HubSource | None:
    """The data set that `path` means; None for files. A file or folder of that name comes first.

    text_key: of hf:NAME without a field. Raises DataError for a recipe or a name that is wrong.
    """
    if path.startswith("hf:") and not path.startswith("hf://"):
        return _parse_name(path, text_key)
    if path in recipe_names() and not os.path.exists(path):
        return _read_recipe(RECIPES / f"{path}.yaml")
    if path.endswith((".yaml", ".yml")):
        return _read_recipe(Path(path))
    if "://" not in path and os.sep not in path and not os.path.exists(path):
        hint = did_you_mean(path, recipe_names())
        if hint:
            raise DataError(f"{path} is no file, folder or recipe{hint}")
    return None


def _parse_name(path: str, text_key: str) -> HubSource:
    words = path.removeprefix("hf:").split(":")
    if not words[0] or len(words) > 4:
        raise DataError(
            f"{path!r} names no data set; write hf:NAME[:CONFIG[:SPLIT[:FIELD]]], such as "
            f"hf:HuggingFaceFW/fineweb-edu:sample-10BT:train:text"
        )
    name, config, split, field = words + [""] * (4 - len(words))
    return HubSource(
        dataset=name, config=config or None, split=split or "train", text_key=field or text_key
    )


def _read_recipe(path: Path) -> HubSource:
    try:
        tree = read_tree(path)
        if "dataset" not in tree:
            raise ConfigError("dataset is not set; name a data set of the hub")
        return from_dict(HubSource, tree)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    except ConfigError as error:
        raise DataError(f"recipe {path}: {error}") from error


def divide(source: HubSource, *, source_index: int, root: int) -> list[HubPart]:
    """Parts of a data set: its files, or some consecutive ones together.

    Raises DataError where there is no such data set, configuration, split or field.
    """
    _opened.pop(source.key, None)
    stream, files = _open(source)
    n = min(stream.num_shards, MOST_PARTS)
    return [HubPart(source, files, i, n, source_index, root) for i in range(n)]


def about(source: HubSource) -> dict[str, Any]:
    """What the manifest says of a data set."""
    return {k: v for k, v in dataclasses.asdict(source).items() if v is not None}


@dataclass(frozen=True)
class HubPart:
    """Part `number` of `n` of a data set."""

    source: HubSource
    files: str
    """SHA-256 of the names and versions of its files, in hex."""
    number: int
    n: int
    source_index: int
    root: int

    @property
    def identity(self) -> Any:
        """The data set, the state of its files, the part, and the numbers that records carry."""
        return [
            *(about(self.source), self.files, self.number, self.n),
            *(self.source_index, self.root),
        ]

    def open(self, state: Any) -> HubReading:
        """Begin to read, or go on."""
        stream, files = _open(self.source)
        if files != self.files:
            raise DataError(
                f"{self.source.name} changed while it was read; start again, or set a revision"
            )
        stream = stream.shard(num_shards=self.n, index=self.number)
        if state is not None:
            stream.load_state_dict(state)
        return HubReading(self, stream)


class HubReading(Iterator[Record]):
    """Records of a data set's part."""

    def __init__(self, part: HubPart, stream: Any) -> None:
        self._part, self._stream, self._rows = part, stream, iter(stream)

    def __next__(self) -> Record:
        source, place = self._part.source, (self._part.source_index, self._part.root)
        row = self._next_row()
        try:
            if source.text_key not in row:
                raise RecordError(_no_field(source, list(row)))
            return Record(checked(row[source.text_key], f"{source.name}: a record's text"), *place)
        except RecordError as error:
            return Record("", *place, error)

    def _next_row(self) -> dict[str, Any]:
        try:
            return next(self._rows)
        except StopIteration:
            raise
        except Exception as error:  # of the network, the hub, a format: they have no common class
            raise DataError(
                f"{self._part.source.name}: reading failed ({type(error).__name__}: {error}); the "
                f"same command goes on from whole shards"
            ) from error

    def state(self) -> Any:
        """Where the stream is, as datasets tells it."""
        return self._stream.state_dict()


_opened: dict[str, tuple[Any, str]] = {}
"""Streams of this process: to find the files of a large data set takes a while."""


def _open(source: HubSource) -> tuple[Any, str]:
    """The stream of a split, and a fingerprint of the files behind it."""
    if source.key not in _opened:
        _opened[source.key] = _open_anew(source)
    return _opened[source.key]


def _open_anew(source: HubSource) -> tuple[Any, str]:
    datasets = _datasets()
    try:
        builder = datasets.load_dataset_builder(
            source.dataset,
            source.config,
            data_files={source.split: source.data_files} if source.data_files else None,
            revision=source.revision,
        )
        stream = builder.as_streaming_dataset(split=source.split)
    except ConnectionError as error:
        raise DataError(
            f"{source.name} cannot be reached ({error}); check the name and the network, or give "
            f"files: a folder with the data set's, as hf:FOLDER"
        ) from error
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source.name} cannot be opened: {error}; check name, configuration and split (and "
            f"log in, if the data set asks for it: hf auth login)"
        ) from error
    if stream.features is not None and source.text_key not in stream.features:
        raise DataError(_no_field(source, list(stream.features)))
    return stream, _fingerprint(builder, source.split)


def _fingerprint(builder: Any, split: str) -> str:
    files = (builder.config.data_files or {}).get(split)
    known = [list(map(str, files or [])), list(getattr(files, "origin_metadata", None) or [])]
    text = json.dumps([builder.hash, known], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _no_field(source: HubSource, fields: list[str]) -> str:
    return (
        f"{source.name} has no field {source.text_key!r} (fields: {', '.join(fields)}); name it "
        f"with --text-key, as the fourth part of hf:NAME:CONFIG:SPLIT:FIELD, or in the recipe"
    )


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "datasets is not installed; it comes with: pip install 'attamba[hub]'"
        ) from error
    return datasets
