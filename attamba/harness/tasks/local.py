"""Text on disk as the harness's documents.

Where a task's text is: what the harness was told (--metadata TASK=PATH, or TASK=PATH in
`attamba eval --tasks`), else the environment's ATTAMBA_<TASK>, e.g. ATTAMBA_WIKITEXT2_LOCAL.
"""

from __future__ import annotations

import os
import re
from typing import Any

from datasets import Dataset
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

import attamba.harness  # noqa: F401 - `lm_eval` knows the model, once it has read such a task
from attamba.data import DataError, read_documents

__all__ = ["books", "process_results", "wikitext_articles", "wikitext_detokenizer"]

_TITLE = r"^\s*= (?!=).*(?<!=) =\s*$"
""" = Title = begins an article,  = = Section = = does not."""


def wikitext_articles(**metadata: Any) -> dict[str, Dataset]:
    """WikiText's raw file as one page per article, as the harness's own task has them.

    Returns {"test": rows with a "page"}. Raises DataError for text that is missing or has no title.
    """
    path = _path("wikitext2_local", metadata)
    pages = []
    for document in read_documents(path, split_on=_TITLE):
        # Copies made under Windows have its line ends, for which the detokenizer has no rules.
        text = document.text.replace("\r\n", "\n")
        page = re.sub(r"\A(\s*\n)+", "", text).removesuffix("\n")
        if not re.match(_TITLE, page.partition("\n")[0]):
            raise DataError(
                f"task 'wikitext2_local': {path} does not begin with an article's title "
                f"( = Title = ); give WikiText's raw test file"
            )
        pages.append(page)
    return {"test": Dataset.from_dict({"page": pages})}


def books(**metadata: Any) -> dict[str, Dataset]:
    """Documents of any files that `attamba data prepare` reads, as {"test": rows with a "text"}.

    Raises DataError for text that is missing.
    """
    path = _path("books_bpb", metadata)
    return {"test": Dataset.from_dict({"text": [d.text for d in read_documents(path)]})}


def _path(task: str, metadata: dict[str, Any]) -> str:
    variable = f"ATTAMBA_{task.upper()}"
    path = metadata.get(task) or os.environ.get(variable)
    if not path:
        raise DataError(
            f"task {task!r} reads local text, and no path was given; say {task}=PATH "
            f"(attamba-lm-eval: --metadata {task}=PATH) or set {variable}"
        )
    return str(path)
