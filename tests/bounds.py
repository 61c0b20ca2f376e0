"""Triton's interpreter, with a look at every address: what memcheck does for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

RAW_POINTERS = {"attend_step_kernel"}
"""Kernels that read addresses from memory: those of a cache's pages. They are not looked at."""


class OutOfBounds(Exception):
    """A kernel reads or writes where none of its tensors lies."""


@contextmanager
def bounds_checked() -> Iterator[None]:
    """Interpreted kernels raise OutOfBounds for lanes that are live and outside of all arguments.

    A tensor's memory is its whole storage, as it is on a GPU without PyTorch's caching allocator.
    """
    from triton.runtime import interpreter

    builder: Any = type(interpreter.interpreter_builder)
    executor: Any = interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    originals = {name: getattr(builder, name) for name in names}
    prepare = executor._init_args_hst
    launch = _Launch()

    def prepared(self: Any, args: Any, options: Any) -> Any:
        found = prepare(self, args, options)
        launch.begin(self.fn.__name__, [*found[0], *found[1].values()])
        return found

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launch.check(pointers, mask, "reads")
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch.check(pointers, mask, "writes")
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch.check(pointers, mask, "changes")
        return originals["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    executor._init_args_hst = prepared
    for name, checked in zip(names, (load, store, atomic)):
        setattr(builder, name, checked)
    try:
        yield
    finally:
        executor._init_args_hst = prepare
        for name, original in originals.items():
            setattr(builder, name, original)


class _Launch:
    """The memory that one kernel was given."""

    def begin(self, name: str, arguments: list[Any]) -> None:
        self.name = name
        storages = {t.untyped_storage() for t in arguments if hasattr(t, "data_ptr")}
        spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
        self.begins, self.ends = (
            np.array([span[i] for span in spans], dtype=np.uint64) for i in (0, 1)
        )

    def check(self, pointers: Any, mask: Any, does: str) -> None:
        if self.name in RAW_POINTERS:
            return
        live = np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(pointers.data))
        at = np.asarray(pointers.data).astype(np.uint64)[live]
        if not at.size:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        span = np.searchsorted(self.begins, at, side="right").astype(np.int64) - 1
        outside = (span < 0) | (at + np.uint64(width) > self.ends[np.maximum(span, 0)])
        if outside.any():
            raise OutOfBounds(
                f"{self.name} {does} {outside.sum()} of {at.size} numbers outside its tensors"
            )
