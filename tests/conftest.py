"""Small tensors run faster on one thread, and results then do not depend on the machine's cores.

Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before triton is
imported.
"""

import os
import signal

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


MINUTES = (
    "test_parallel_stops.py",
    "test_compiled_kernels.py",
    "test_examples.py",
    "test_shared_parallel.py",
    "test_meshes.py",
    "test_tasks.py",
)
"""Files that take a minute or two each, so that none of them is the last to begin."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in MINUTES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
