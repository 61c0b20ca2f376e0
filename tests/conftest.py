"""Small tensors run faster on one thread, and results then do not depend on the machine's cores.

Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before triton is
imported.
"""

import importlib.util
import os
import signal
from typing import Any

import pytest
import torch


def _patch_language_once() -> None:
    """The interpreter patches triton.language for a kernel, and for each function that the kernel
    calls, whenever it calls it: a third of the time. Here, once in a kernel for each module.
    """
    from triton.runtime import interpreter

    call, patch = interpreter.InterpretedFunction.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def begin(kernel: Any) -> Any:
        patched.clear()
        patched.add(id(kernel.__globals__))
        return patch(kernel)

    def within(function: Any) -> None:
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)

    def call_within(self: Any, *args: Any, **kwargs: Any) -> Any:
        interpreter._patch_lang = within
        try:
            return call(self, *args, **kwargs)
        finally:
            interpreter._patch_lang = begin

    interpreter.InterpretedFunction.__call__ = call_within
    interpreter._patch_lang = begin


# As in the Makefile, for whoever starts pytest without it: tests start many processes, and each
# would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        _patch_language_once()

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = (
    "test_examples.py",
    "test_parallel_stops.py",
    "test_compiled_kernels.py",
    "test_meshes.py",
    "test_shared_parallel.py",
    "test_compress_triton.py",
    "test_compress_scan_triton.py",
    "test_tasks.py",
    "test_chunk_attention_triton.py",
    "test_launch_agent.py",
    "test_launch.py",
    "test_float8.py",
    "test_parallel_checkpoints.py",
    "test_layer_statistics.py",
    "test_hf_generate.py",
    "test_engine.py",
)
"""Files that take long, the longest first, so that none of them is the last to begin."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
