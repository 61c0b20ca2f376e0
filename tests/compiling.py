"""Kernels as they are compiled for a GPU, on a machine that has none: nothing is run.

As a program: reads cases from stdin, as a JSON list, and prints what it compiled, see Compiled, as
another. It is a process of its own because Triton's interpreter cannot be left once it is on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict

CAPABILITY, PROCESSORS, SHARED_MEMORY = 90, 132, 232_448


class Compiled(TypedDict):
    """One kernel: the case it is of, its name, warps, bytes of shared memory, constants, whether
    its machine code was read, and what is wrong with it."""

    case: str
    name: str
    warps: int
    shared: int
    constants: dict[str, Any]
    read: bool
    unwritten: list[str]


def compiled(cases: list[dict[str, Any]]) -> list[Compiled]:
    """The kernels that the cases launch, forward, backward and in a decode step, each once.

    A case has a name and a dtype, and either `mixer` and `dim`, of a model, and `whole`: packed
    documents and decoding as well; or `scan`, the sizes of x and B: {heads, groups, state_dim,
    width}.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        child = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(cases),
            capture_output=True,
            text=True,
            env={**environment, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"},
        )
    if child.returncode:
        raise RuntimeError(child.stderr[-4000:])
    return json.loads(child.stdout)


def main() -> None:
    """What compiled() starts."""
    found: list[Compiled] = []
    begun: list[str] = []
    with _recorded(begun, found):
        for case in json.load(sys.stdin):
            begun.append(case["name"])
            with _without_products():
                _scan(case) if "scan" in case else _model(case)
    json.dump(found, sys.stdout)


@contextmanager
def _recorded(begun: list[str], found: list[Compiled]) -> Iterator[None]:
    """Launches compile and go no further; what they compile is added to `found`.

    begun: names of cases, the last of which is under way.
    """
    import triton.compiler
    from sass import disassembled, unwritten_registers
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", CAPABILITY, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    compile_one, run = triton.compiler.compile, JITFunction.run

    def record(src: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        kernel = compile_one(src, target=target, options=options, **more)
        unwritten: list[str] = []
        read = "wgmma" in kernel.asm["ptx"]  # elsewhere no operand of a product is an address
        if read:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(kernel.asm["cubin"])
                unwritten = unwritten_registers(disassembled(Path(file.name)))
        constants = {src.fn.arg_names[key[0]]: value for key, value in src.constants.items()}
        one: Compiled = {
            "case": begun[-1],
            "name": src.fn.__name__,
            "warps": kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
            "constants": {k: v for k, v in constants.items() if isinstance(v, (int, str))},
            "read": read,
            "unwritten": unwritten,
        }
        found.append(one)
        return kernel

    triton.compiler.compile = record
    JITFunction.run = _only_compiled(run)
    try:
        yield
    finally:
        triton.compiler.compile, JITFunction.run = compile_one, run


def _only_compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    return launch


def _without_products() -> Any:
    """Matrix products of PyTorch's own are zeros: in bfloat16 a CPU may take seconds for one."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class WithoutProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.aten.mm.default:
                a, b = args
                return a.new_zeros(a.shape[0], b.shape[1])
            return func(*args, **(kwargs or {}))

    return WithoutProducts()


def _model(case: dict[str, Any]) -> None:
    import torch

    from attamba.config import ModelConfig, from_dict
    from attamba.models import build_model

    tree = {"vocab_size": 256, "dim": case["dim"], "n_layers": 1, "mixer": case["mixer"]}
    model = build_model(from_dict(ModelConfig, tree)).to(getattr(torch, case["dtype"]))
    ids = torch.zeros(2, 256, dtype=torch.long)
    model(ids).float().sum().backward()
    if not case["whole"]:
        return
    model(ids, doc_ids=torch.zeros_like(ids)).float().sum().backward()
    with torch.inference_mode():
        cache = model.new_cache(2)
        model(ids, cache=cache)
        model(ids[:, :1], cache=cache)


def _scan(case: dict[str, Any]) -> None:
    import torch

    from attamba.ops import chunk_scan

    heads, groups, state_dim, width = (
        case["scan"][key] for key in ("heads", "groups", "state_dim", "width")
    )
    dtype = getattr(torch, case["dtype"])
    x = torch.zeros(2, 256, heads, width, dtype=dtype, requires_grad=True)
    B, C = (torch.zeros(2, 256, groups, state_dim, dtype=dtype) for _ in "BC")
    dt, A = torch.zeros(2, 256, heads), torch.zeros(heads)
    starts = torch.zeros(256, dtype=torch.bool)
    y = chunk_scan(x, dt, A, B.requires_grad_(), C, starts, backend="triton")
    assert isinstance(y, torch.Tensor)
    y.float().sum().backward()


if __name__ == "__main__":
    import importlib

    from attamba.ops import backends

    backends.why_not_triton = lambda device, dtype: None
    for path in ("attamba.ops.compress.triton", "attamba.ops.compress.scan.triton"):
        vars(importlib.import_module(path))["processors_of"] = lambda device: PROCESSORS
    for path in ("attamba.ops.chunk_scan", "attamba.ops.chunk_scan.triton"):
        vars(importlib.import_module(path))["shared_memory"] = lambda device: SHARED_MEMORY
    main()
