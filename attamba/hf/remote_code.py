"""The model's code as flat files that transformers loads with trust_remote_code.

They are the package's own sources: one file per module, `attamba.ops.chunking` becomes
`attamba_ops_chunking.py`, and imports inside the package become relative. Triton kernels stay out
(transformers would refuse to load the files where triton is not installed): such a copy runs the
torch backend everywhere.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

ROOT = "attamba.hf.modeling"
LEFT_OUT = "triton"
"""Last part of the names of modules that are not copied."""

CLASSES = {
    "AutoConfig": "AttambaConfig",
    "AutoModel": "AttambaModel",
    "AutoModelForCausalLM": "AttambaForCausalLM",
}
"""All are looked up in ROOT: transformers copies what a file needs beside it, once per file, and
the classes of two copies would not know each other."""

APPENDED = {
    ROOT: """

AttambaConfig.__module__ = __name__  # save_pretrained writes where a class was found
""",
    "attamba.ops.backends": '''

def why_not_triton(device: torch.device) -> str | None:  # type: ignore[no-redef]
    """This copy of the model leaves the kernels out."""
    return "this copy of the model leaves the kernels out (pip install attamba has them)"
''',
}
"""What differs from the sources, at the end of a file."""


def write_remote_code(folder: Path) -> dict[str, str]:
    """Write the files and return the auto_map for config.json."""
    todo, done = [ROOT], set[str]()
    while todo:
        module = todo.pop()
        if module in done:
            continue
        done.add(module)
        text, needed = _flattened(module)
        todo += needed
        (folder / f"{_flat(module)}.py").write_text(text, encoding="utf-8")
    return {auto: f"{_flat(ROOT)}.{name}" for auto, name in CLASSES.items()}


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _flattened(module: str) -> tuple[str, list[str]]:
    """A module's source with relative imports, and the modules that it imports."""
    source = _source(module)
    lines = source.splitlines(keepends=True)
    needed = []
    for node in sorted(_own_imports(module, source), key=lambda n: n.lineno, reverse=True):
        assert node.end_lineno is not None
        replacement, modules = _rewritten(module, node)
        needed += modules
        lines[node.lineno - 1 : node.end_lineno] = [replacement]
    text = "".join(lines)
    return text + APPENDED.get(module, ""), needed


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _own_imports(module: str, source: str) -> list[ast.ImportFrom]:
    """The statements that import from the package, wherever they stand."""
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        and (node.level or (node.module or "").split(".")[0] == "attamba")
    ]


def _rewritten(module: str, node: ast.ImportFrom) -> tuple[str, list[str]]:
    """The statement in place of an import, and the modules that it needs."""
    package = module if _is_package(module) else module.rpartition(".")[0]
    base = node.module or ""
    if node.level:
        base = importlib.util.resolve_name("." * node.level + base, package)
    indent = " " * node.col_offset
    if base.endswith(f".{LEFT_OUT}"):
        return f'{indent}raise ImportError("the kernels are not in this copy of the model")\n', []
    if _is_package(base) and not {alias.name for alias in node.names} <= _bound(base):
        # transformers copies the files that it finds behind `from .name import`, and no others.
        raise NotImplementedError(f"{module}: import what is used from the submodule of {base}")
    names = ", ".join(ast.unparse(alias) for alias in node.names)
    return f"{indent}from .{_flat(base)} import {names}\n", [base]


def _bound(package: str) -> set[str]:
    """Names that a package's __init__ defines or imports."""
    names = set()
    for node in ast.parse(_source(package)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None
