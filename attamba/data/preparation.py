"""Text to a prepared folder, by as many workers as are asked for, going on where it was stopped.

What is under way lies in .NAME.<settings>.partial beside the folder NAME that is asked for, and is
renamed when it is whole. The bytes of the result do not depend on the number of workers, nor on how
often the work was stopped, by whatever.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError
from .files import hold, naming, sync, write_aside
from .inputs import Paths, is_url
from .parts import Inputs, find_inputs
from .reader import no_text
from .shards import FORMAT, MANIFEST, VERSION, TokenDataset, is_prepared, token_dtype
from .tokenizer import Tokenizer
from .workers import Progress, write_parts
from .writer import WHOLE, Job, Place, Written, file_entry

LOCK = ".lock"


def prepare(
    paths: Paths,
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    split_on: str | None = None,
    text_key: str = "text",
    shard_tokens: int = 100_000_000,
    max_tokens: int | None = None,
    skip_bad: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> TokenDataset:
    """Tokenize files, folders and data sets into the folder `out`.

    If it is stopped, the same call goes on: shards that are whole are kept, and no document is lost
    or doubled. Files that changed in between are read again.

    paths: as read_documents takes them; besides, data sets of the Hugging Face hub and recipes, as
        attamba.data.hub describes them: ``hf:NAME:CONFIG:SPLIT:FIELD``, ``fineweb-edu``.
    out: a new or empty folder, or a prepared one, which is replaced once the new one is whole.
    split_on, text_key: as read_documents takes them.
    shard_tokens: a shard is closed when it holds at least this many tokens.
    max_tokens: whole shards from the first on, until they hold at least this many. Default: all.
    skip_bad: pass over records that are no text (broken JSON, NUL, no such field) and count them
        as n_bad in the manifest, instead of raising.
    workers: parts of the text at a time; the result does not depend on it. With a tokenizer.json
        up to eight are threads of this process, and the tokenizer uses all cores; it does so with
        1 too. Else they are processes, and need a script that can be imported, with its calls
        under ``if __name__ == "__main__"``, as always where processes are spawned.
    progress: called now and then with (documents, tokens, bytes of text) done by this call.

    Raises DataError for what read_documents refuses, if `out` holds anything else, and where
    another process prepares the same; OSError where the disk is full.
    """
    for name, value in (("shard_tokens", shard_tokens), ("workers", workers)):
        if value < 1:
            raise DataError(f"{name}={value} must be at least 1")
    if max_tokens is not None and max_tokens < 1:
        raise DataError(f"max_tokens={max_tokens} must be at least 1")
    out = _target(out)
    inputs = find_inputs(paths, split_on=split_on, text_key=text_key)
    settings = [inputs.roots, tokenizer.meta(), split_on, text_key, shard_tokens, VERSION]
    with _partial(out, settings) as folder:
        job = Job(folder, tokenizer, shard_tokens, skip_bad, max_tokens, inputs.sources)
        written = write_parts(job, inputs.parts, workers, progress)
        _finish(job, inputs, _first(job, written))
        _replace(folder, out)
    for record in out.glob("part-*.json"):
        record.unlink()
    _remove_others(out)
    return TokenDataset.open(out)


def _target(out: str | Path) -> Path:
    """Refuse to write where something else is."""
    if is_url(out):
        raise DataError(f"{out} is a URL; prepare into a local folder and copy it there")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; name a folder to write into")
    if out.is_dir() and any(out.iterdir()) and not is_prepared(out):
        raise DataError(
            f"{out} is not empty and holds no prepared data, so it is not overwritten; name a new "
            f"folder"
        )
    target = out.resolve()  # a link stays: what it leads to is replaced
    if target == Path.cwd():
        raise DataError(f"{out} is the current folder, which cannot be replaced; name one in it")
    return target


@contextmanager
def _partial(out: Path, settings: Any) -> Iterator[Path]:
    """The folder of what is under way, for this process alone; gone again if nothing is in it."""
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = out.with_name(f".{out.name}.{name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / LOCK) as is_held:
        if not is_held:
            raise DataError(f"{out}: another process prepares it; wait for that, or stop it")
        # What a killed worker was writing, and the manifest of what was not renamed any more.
        for leftover in [*folder.glob(".*"), *folder.glob(MANIFEST)]:
            if leftover.name != LOCK:
                leftover.unlink()
        try:
            yield folder
        finally:
            if folder.is_dir() and not any(folder.glob("tokens-*")):
                shutil.rmtree(folder)


def _first(job: Job, written: list[Written]) -> list[Written]:
    """The parts, less what comes after the shard that fills max_tokens."""
    left = math.inf if job.max_tokens is None else job.max_tokens
    kept: list[Written] = []
    for part in written:
        shards = []
        for shard in part.shards:
            shards.append(shard)
            left -= shard["n_tokens"]
            if left <= 0:
                place = Place(**shard["place"])
                return [*kept, Written(part.identity, shards, place, is_whole=False)]
        kept.append(part)
    return kept


def _finish(job: Job, inputs: Inputs, written: list[Written]) -> None:
    """Add the tokenizer and the manifest, and remove what is in neither."""
    found = {root for part in written for root in part.place.roots}
    n_bad = sum(part.place.n_bad for part in written)
    if all(part.is_whole for part in written):
        for root, name in enumerate(inputs.roots):
            if root not in found:
                raise no_text(name, n_bad)
    with naming(job.folder / "tokenizer", WHOLE):
        job.tokenizer.save(job.folder / "tokenizer")
    manifest = _manifest(job, inputs, written)
    for path in job.folder.iterdir():
        is_record = path.match("part-*.json") or path.name == LOCK
        if path.is_file() and path.name not in manifest["files"] and not is_record:
            path.unlink()
    path = job.folder / MANIFEST
    with naming(path, WHOLE):
        write_aside(path, (json.dumps(manifest, indent=1) + "\n").encode())
        sync(path)


def _manifest(job: Job, inputs: Inputs, written: list[Written]) -> dict[str, Any]:
    shards = [shard for part in written for shard in part.shards]
    folder = job.folder / "tokenizer"
    files = {name: entry for shard in shards for name, entry in shard["files"].items()}
    files |= {f"tokenizer/{p.name}": file_entry(p.read_bytes()) for p in folder.iterdir()}
    totals = ("n_tokens", "n_documents", "n_bytes", "n_words")
    kept = ("tokens", "documents", "n_tokens", "n_documents")
    return {
        "format": FORMAT,
        "version": VERSION,
        "vocab_size": job.tokenizer.vocab_size,
        "dtype": token_dtype(job.tokenizer.vocab_size).str,
        "tokenizer": job.tokenizer.meta(),
        **{name: sum(shard[name] for shard in shards) for name in totals},
        "n_empty": sum(part.place.n_empty for part in written),
        "n_bad": sum(part.place.n_bad for part in written),
        "shards": [{name: shard[name] for name in kept} for shard in shards],
        "sources": inputs.sources,
        "data_sets": inputs.about,
        "files": dict(sorted(files.items())),
    }


def _remove_others(out: Path) -> None:
    """Remove what was begun with other settings, unless a process works on it, and old data."""
    for other in _beside(out, r"[0-9a-f]{12}\.partial"):
        with hold(other / LOCK) as is_held:
            if is_held:
                shutil.rmtree(other)
    for old in _beside(out, r"\d+\.old"):
        shutil.rmtree(old, ignore_errors=True)


def _beside(out: Path, ending: str) -> list[Path]:
    """What lies beside `out` under its name and such an ending, and not under another's."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.{ending}")
    return [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]


def _replace(new: Path, out: Path) -> None:
    """Put folder `new` in the place of `out`, less its lock."""
    (new / LOCK).unlink()
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
