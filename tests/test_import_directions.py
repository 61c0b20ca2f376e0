"""Imports: no arrow runs back, and nothing is needed that is not used."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import attamba

PACKAGE = Path(attamba.__file__).parent

# A part may import parts of an earlier line, and of its own.
LAYERS = [
    {"exit_status", "config", "mixers", "monitoring", "parsing", "data", "ops"},
    {"modules"},
    {"models"},
    {
        *("train", "generation", "sampling", "evaluate", "dial", "plots", "pictures", "display"),
        *("harness", "hf", "serve"),
    },
    {"cli", "commands", "__main__"},
    {"demo", "bench", "studies", "plan", "launch"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

# Parts that are told apart within a line, or held to less than it allows.
ALLOWED = {
    "exit_status": {"exit_status"},
    "mixers": {"mixers"},
    "monitoring": {"monitoring", "mixers"},
    "parsing": {"parsing", "mixers"},
    "config": {"config", "mixers", "monitoring", "parsing"},
    "data": {"data", "config"},
    "ops": {"ops"},
}


class Arrow(NamedTuple):
    source: str
    """Module, e.g. attamba.models.decoder."""
    target: str
    late: bool
    """Inside a function, or for the type checker alone."""
    line: int


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _absolute(node: ast.ImportFrom, module: str) -> str:
    """The module that a from-import names, dots at its begin resolved."""
    if not node.level:
        return node.module or ""
    is_package = MODULES[module].name == "__init__.py"
    package = module.split(".")[: -node.level + is_package or None]
    return ".".join([*package, *filter(None, [node.module])])


def _imports(module: str) -> Iterator[Arrow]:
    """Every import of a module, wherever it stands."""

    def walk(node: ast.AST, late: bool) -> Iterator[Arrow]:
        for child in ast.iter_child_nodes(node):
            inner = late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = True
            if isinstance(child, ast.Import):
                for name in child.names:
                    yield Arrow(module, name.name, late, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = _absolute(child, module)
                for name in child.names:
                    full = f"{base}.{name.name}"
                    yield Arrow(module, full if full in MODULES else base, late, child.lineno)
            else:
                yield from walk(child, inner)

    yield from walk(ast.parse(MODULES[module].read_text(encoding="utf-8")), False)


ARROWS = [arrow for module in MODULES for arrow in _imports(module)]
OWN = [a for a in ARROWS if a.target.split(".")[0] == "attamba"]


def _part(module: str) -> str:
    """attamba.models.decoder -> models; the package itself is ""."""
    return module.removeprefix("attamba").lstrip(".").partition(".")[0]


def test_every_part_has_its_place():
    parts = {_part(module) for module in MODULES} - {""}
    assert parts <= set(RANK), f"say in LAYERS where these belong: {sorted(parts - set(RANK))}"


def test_no_arrow_runs_back():
    back = []
    for arrow in OWN:
        source, target = _part(arrow.source), _part(arrow.target)
        if not source:  # `attamba` itself offers names of everything, and imports none at once
            assert arrow.late, f"attamba/__init__.py:{arrow.line} imports {arrow.target} at once"
            continue
        if source == "cli" and target in LAYERS[-1] and arrow.late:
            continue  # a command runs its part, which may stand on the command line
        allowed = ALLOWED.get(source, {p for p in RANK if RANK[p] <= RANK[source]} | {""})
        if target not in allowed:
            back.append(f"{arrow.source}:{arrow.line} imports {arrow.target}")
    assert not back, "\n".join(back)


def test_no_circle():
    """As Python sees it, when a module is loaded."""
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for arrow in OWN:
        # the name of a package in its own submodule is for what the package holds
        if not arrow.late and not arrow.source.startswith(arrow.target + "."):
            graph[arrow.source].add(arrow.target)
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def _is_kernel(module: str) -> bool:
    """Is it written for Triton, and so imported only where its kernels run?"""
    return module.startswith("attamba.ops.") and module.endswith((".triton", ".kernels"))


def _foreign(parts: set[str], late: bool) -> set[str]:
    """Packages beside the standard library that parts of the package import."""
    names = {
        a.target.split(".")[0]
        for a in ARROWS
        if _part(a.source) in parts and (late or not (a.late or _is_kernel(a.source)))
    }
    return names - set(sys.stdlib_module_names) - {"attamba"}


def test_operators_import_torch_alone():
    assert _foreign({"ops"}, late=True) <= {"torch", "triton"}
    assert _foreign({"modules", "models"}, late=True) == {"torch"}


def test_kernels_are_imported_late():
    early = [
        f"{arrow.source}:{arrow.line} imports {arrow.target}"
        for arrow in OWN
        if _is_kernel(arrow.target) and not (arrow.late or _is_kernel(arrow.source))
    ]
    assert not early, "\n".join(early)


def test_the_package_imports_torch_and_numpy_alone_where_modules_are_loaded():
    assert _foreign(set(RANK) - {"hf", "harness"} | {""}, late=False) <= {"torch", "numpy"}
    assert _foreign({"config", "data", ""}, late=False) <= {"numpy"}


# --------------------------------------------------------------------------------------------
# In a fresh interpreter
# --------------------------------------------------------------------------------------------


def _needs(roots: set[str]) -> set[str]:
    """Distributions that `roots` require, themselves included, names normalised."""
    found: set[str] = set()
    todo = set(roots)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo |= {re.match(r"[\w.-]+", r)[0] for r in required if "extra ==" not in r}
    return found


def _blocked() -> list[str]:
    """Importable names of every installed package that torch and numpy do not need."""
    keep = _needs({"torch", "numpy", "attamba"} - {"attamba"})
    names = importlib.metadata.packages_distributions()
    return sorted(
        name
        for name, owners in names.items()
        if name != "attamba" and not {re.sub(r"[-_.]+", "-", o).lower() for o in owners} & keep
    )


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
import json, sys
from importlib.machinery import PathFinder
class Finder:  # blocked packages are as if they were not installed
    names = set(json.loads(sys.argv[1]))
    def find_spec(self, name, path=None, target=None):
        blocked = name.partition(".")[0] in self.names
        return None if blocked else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder()
"""


def test_torch_and_numpy_are_enough():
    blocked = _blocked()
    assert {"pytest", "yaml", "rich", "safetensors", "tokenizers"} <= set(blocked)
    code = """
import torch, attamba
for name in attamba.__all__:
    getattr(attamba, name)
mixer = {"type": "attamba", "n_heads": 2, "ssm_heads": 2}
model = attamba.build_model(attamba.ModelConfig(vocab_size=9, dim=8, n_layers=1, mixer=mixer))
cache = model.new_cache()
print(model(torch.zeros(1, 5, dtype=torch.long), cache=cache).shape[1])
assert not Finder.names & {name.partition(".")[0] for name in sys.modules}
"""
    assert _python(BLOCK + code, json.dumps(blocked)).strip() == "5"


def test_the_package_itself_loads_nothing():
    code = (
        "import sys, attamba\n"
        "assert not {'torch', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert 'generate' in dir(attamba)\n"
        "try: attamba.nonsense\n"
        "except AttributeError as error: print(error)"
    )
    assert _python(code).strip() == "module 'attamba' has no attribute 'nonsense'"


def test_help_does_not_wait_for_torch():
    if not (PACKAGE / "cli.py").exists():
        pytest.skip("there is no command line yet")
    code = (
        "import sys\n"
        "from attamba.cli import main\n"
        "sys.argv = ['attamba', '--help']\n"
        "try: status = main()\n"
        "except SystemExit as exit: status = exit.code\n"
        "assert not status, status\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'help has loaded torch or numpy'\n"
    )
    assert "train" in _python(code)
