"""Any decoder in EleutherAI's lm-evaluation-harness, unpatched, and tasks on local text.

Importing this package registers the model "attamba" with the harness. It needs the extra
`attamba[eval]`, and raises MissingPackageError (an ImportError) without it.
"""

from __future__ import annotations

import importlib.util

from attamba.data import MissingPackageError

if importlib.util.find_spec("lm_eval") is None:
    raise MissingPackageError(
        "lm_eval is not installed; it comes with: pip install 'attamba[eval]'"
    )

from attamba.harness.adapter import AttambaLM
from attamba.harness.run import LOCAL_TASKS, Tasks, figures, load_tasks, run_tasks, table

__all__ = ["LOCAL_TASKS", "AttambaLM", "Tasks", "figures", "load_tasks", "run_tasks", "table"]
