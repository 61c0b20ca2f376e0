"""The documentation: its snippets run, its commands parse, and what is generated is complete."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import doctest
import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from attamba import cli, config
from attamba.commands import evaluation
from attamba.config import load_run_config, override_model, parse_overrides
from attamba.ops.chunking import BOUNDARIES

yaml = pytest.importorskip("yaml")
pytest.importorskip("mkdocs")

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

NEEDS = {"transformers.md": "transformers", "evaluate.md": "lm_eval"}
"""Pages whose snippets need more than torch."""
RUN_BY_EXAMPLES = "end-to-end.md"


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    is_run: bool


def blocks(page: Path) -> list[Block]:
    found = re.finditer(
        r"^(?P<not_run><!-- not run: .+ -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return [Block(m["language"], m["code"], m["not_run"] is None) for m in found]


def hook(name: str) -> ModuleType:
    """A module of docs/hooks."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------
# Snippets
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where snippets run: with texts, and with a small run under the names of the pages."""
    folder = tmp_path_factory.mktemp("docs")
    line = "Once upon a time there was a king, and the king had a cat.\n"
    (folder / "mybook.txt").write_text(line * 300)
    (folder / "other.txt").write_text(line * 20)
    (folder / "configs").symlink_to(ROOT / "configs")
    small = ["model.dim=32", "model.n_layers=2", "mixer.ssm_heads=2", "train.steps=2"]
    quiet = ["train.progress=false", "train.device=cpu", "optim.warmup_steps=1"]
    arguments = ["data.train=" + str(folder / "mybook.txt"), "out=" + str(folder / "runs/mine")]
    assert cli.main(["train", str(ROOT / "configs/tiny.yaml"), *arguments, *small, *quiet]) == 0
    return folder


def _with_snippets() -> list[Any]:
    pages = [p for p in PAGES if {"python", "pycon"} & {b.language for b in blocks(p)}]
    return [pytest.param(p, id=p.stem) for p in pages if p.name != RUN_BY_EXAMPLES]


@pytest.mark.parametrize("page", _with_snippets())
def test_the_snippets_of_a_page_run(
    page: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    if page.name in NEEDS and importlib.util.find_spec(NEEDS[page.name]) is None:
        pytest.skip(f"{NEEDS[page.name]} is not installed")
    monkeypatch.chdir(folder)
    for block in blocks(page):
        if block.language == "python":
            compile(block.code, page.name, "exec")
    if page.name == "transformers.md":
        _run_alone(page, folder, tmp_path)
    else:
        _run_here(page)


def _run_here(page: Path) -> None:
    """The blocks of a page, one after the other in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    n_run = 0
    for block in blocks(page):
        if block.language == "python" and block.is_run:
            exec(compile(block.code, page.name, "exec"), names)
            n_run += 1
        if block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.code, names, page.name, None, None)
            told: list[str] = []
            doctest.DocTestRunner().run(test, out=told.append, clear_globs=False)
            assert not told, "".join(told)
            names |= test.globs
            n_run += 1
    assert n_run


def _run_alone(page: Path, folder: Path, tmp_path: Path) -> None:
    """In a process of its own: loading remote code changes transformers' tables."""
    for out, options in (("exported", []), ("exported-alone", ["--trust-remote-code"])):
        assert cli.main(["export", "runs/mine", out, *options]) == 0
    script = tmp_path / "page.py"
    script.write_text(
        "\n".join(b.code for b in blocks(page) if b.is_run and b.language == "python")
    )
    done = subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env=os.environ | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_wrong_output_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```pycon\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(AssertionError, match="Expected"):
        _run_here(page)


def test_what_is_not_run_says_why() -> None:
    skipped = [(p.name, b.code) for p in PAGES for b in blocks(p) if not b.is_run]
    assert len(skipped) == 1 and "openai" in skipped[0][1]


# --------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------


def _commands() -> list[Any]:
    """Every line of shell in the pages, and the README's indented lines that begin a command."""
    readme = re.findall(r"^    ((?:attamba|pip|make) .*)$", (ROOT / "README.md").read_text(), re.M)
    found = [("README", line) for line in readme]
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("sh", "bash"):
                lines = block.code.replace("\\\n", " ").splitlines()
                found += [(page.stem, line) for line in lines]
    split = [(where, shlex.split(line, comments=True)) for where, line in found]
    return [
        pytest.param(words, id=f"{where}: {' '.join(words)}") for where, words in split if words
    ]


COMMANDS = _commands()


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_one(words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize(
    "line",
    [
        "attamba evaluate runs/mine",
        "attamba eval runs/mine --colour",
        "attamba eval runs/mine mixer.chunk_sizes=4",
        "attamba eval runs/mine --sweep chunk_sizes=4",
        "attamba train configs/missing.yaml",
        "attamba train configs/tiny.yaml optim.lr=-1",
        "pip install -e '.[nothing]'",
        "make nothing",
        "torchrun --nproc-per-nodes 8 -m attamba.cli train configs/tiny.yaml",
        "torchrun --nproc-per-node 8 -m attamba.cli train configs/tiny.yaml optim.lr=-1",
        "python examples/nothing.py",
        "python -m attamba.nothing",
        "rm -rf runs",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError, OSError)):
        check(shlex.split(line))


def check(words: list[str]) -> None:
    """Raise for a command that cannot be meant."""
    program, *arguments = words
    if program == "attamba":
        _check_own(cli.parse(arguments))
    elif program in ("attamba-lm-eval", "lm_eval"):
        _check_harness(arguments)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(arguments)
        assert args.module and args.training_script == "attamba.cli", words
        _check_own(cli.parse(args.training_script_args))
    elif program == "pip":
        extras = re.fullmatch(r"install -e \.\[([\w,]+)\]", " ".join(arguments))
        assert extras, words
        known = importlib.metadata.metadata("attamba").get_all("Provides-Extra")
        assert set(extras[1].split(",")) <= set(known or ()), words
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in arguments), words
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None, words
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), words
    else:
        raise AssertionError(f"{words}: {program} is no program that the pages should use")


def _check_own(args: argparse.Namespace) -> None:
    """Configuration keys of a command of ours, in its arguments and its sweep."""
    words = getattr(args, "overrides", [])
    files = [ROOT / word for word in words if "=" not in word]
    if hasattr(args, "resume") or files:
        assert files and (len(files) == 1 or not hasattr(args, "resume")), words
        for path in files:
            load_run_config(path, [word for word in words if "=" in word])
    elif hasattr(args, "config"):
        load_run_config(ROOT / args.config, words)
    elif words:
        override_model(config.ModelConfig(), parse_overrides(words))
    if getattr(args, "sweep", None):
        field, swept = evaluation.parse_sweep(args.sweep)
        for value in swept:
            override_model(config.ModelConfig(), {field: value})


def _check_harness(arguments: list[str]) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval._cli.harness import HarnessCLI

    harness = HarnessCLI()
    assert harness._parser.parse_args(["run", *arguments]).model == "attamba"


# --------------------------------------------------------------------------------------------
# What is generated
# --------------------------------------------------------------------------------------------


def _config_classes() -> dict[str, type]:
    """Every config dataclass by the prefix of its keys."""
    hints = typing.get_type_hints(config.RunConfig)
    found = {f"{name}.": hook("generated").section_of(hint) for name, hint in hints.items()}
    sections = {name: section for name, section in found.items() if section is not None}
    mixers = {f"mixer.:{name}": mixer for name, mixer in config.MIXERS.items()}
    return {"": config.RunConfig} | sections | mixers


@pytest.mark.parametrize("prefix", _config_classes())
def test_every_config_field_is_told(prefix: str) -> None:
    generated = hook("generated")
    cls, keys = _config_classes()[prefix], prefix.partition(":")[0]
    told = generated.configuration()
    section = generated.table(cls, keys)
    assert section in told
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(typing.get_type_hints(cls)[field.name]):
            continue
        (row,) = [line for line in section.splitlines() if f"| `{keys}{field.name}` |" in line]
        _, _, values, default, meaning, _ = re.split(r"(?<!\\)\|", row)
        assert values.strip(), row
        assert meaning.strip() or field.name == "type", f"{row} needs a docstring in {cls}"
        assert default.strip() or field.default == "", row


def test_every_boundary_policy_is_told() -> None:
    told = hook("generated").configuration()
    for name, policy in BOUNDARIES.items():
        (row,) = [line for line in told.splitlines() if line.startswith(f"| `{name}` |")]
        assert all(f"`{option}`" in row for option in policy.options)


def test_every_command_and_option_is_told() -> None:
    generated = hook("generated")
    told = generated.command_line()
    parsers = list(generated.leaves(cli.build_parser()))
    assert len(parsers) > 10
    for parser in parsers:
        assert f"## {parser.prog}\n" in told
        assert all(option in told for a in parser._actions for option in a.option_strings)


PUBLIC = ["", ".data", ".harness", ".hf", ".models", ".ops", ".train"]
"""Packages whose __all__ is what users import."""


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_on_a_page_of_the_api(package: str) -> None:
    source = ROOT.joinpath("attamba", *package.split("."), "__init__.py").read_text()
    (names,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    told = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", told, re.M)}
    assert set(names) - shown <= {"ops"}  # a package, with a page


def test_markers_stand_on_their_pages() -> None:
    generated = hook("generated")
    for marker in generated.MARKERS:
        pages = [p for p in PAGES if marker in p.read_text(encoding="utf-8")]
        assert len(pages) == 1
        assert marker not in generated.on_page_markdown(pages[0].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("A line.\n\nTwo more\nof text.", "A line.\n\nTwo more\nof text."),
        ("a: one\nb, c: two\n    more", "- `a`: one\n- `b`, `c`: two more"),
        ("a: one. Raises ValueError\nif not.", "- `a`: one.\n\nRaises ValueError if not."),
        ("Into <out>/x, not `<out>`.", "Into &lt;out>/x, not `<out>`."),
        ("Rule:\n\n    a: code <x>", "Rule:\n\n    a: code <x>"),
        ("a: as follows\n\n    x = 1", "- `a`: as follows\n\n        x = 1"),
        ("Args:\n    a: one", "Args:\n    a: one"),
        ("Shapes: B batch.", "Shapes: B batch."),
    ],
)
def test_docstrings_become_markdown(text: str, rendered: str) -> None:
    pytest.importorskip("griffe")
    assert hook("docstrings").tidy(text) == rendered


# --------------------------------------------------------------------------------------------
# The build
# --------------------------------------------------------------------------------------------

LINK = '<a href="https://arxiv.org/abs/2411.17685">paper</a>'


@pytest.mark.parametrize(
    ("html", "is_refused"),
    [
        (LINK, False),
        ('<script src="assets/x.js"></script><img src="images/a.svg">', False),
        ('<script src="https://cdn.example/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', True),
        ('<link href="https://fonts.example" rel="preconnect">', True),
        ('<link rel="canonical" href="https://docs.example/">', False),
        ('<img alt="" src="https://badge.example/x.svg">', True),
    ],
)
def test_a_page_that_asks_the_network_is_refused(html: str, is_refused: bool) -> None:
    from mkdocs.exceptions import PluginError

    page = argparse.Namespace(file=argparse.Namespace(src_uri="page.md"))
    if not is_refused:
        assert hook("generated").on_post_page(html, page=page) == html
        return
    with pytest.raises(PluginError, match=r"page\.md would ask the network"):
        hook("generated").on_post_page(html, page=page)


@pytest.mark.parametrize(
    ("text", "nav", "is_whole"),
    [
        ("# A\n\n[itself](index.md#a)", ["index.md"], True),
        ("[broken](missing.md)", ["index.md"], False),
        ("[broken](index.md#missing)", ["index.md"], False),
        ("![broken](images/missing.svg)", ["index.md"], False),
        ("[absolute](/index.md)", ["index.md"], False),
        ("whole", ["index.md", "missing.md"], False),
        ("left out of the navigation", [], False),
        ("::: attamba.display.columns", ["index.md"], True),
        ("::: attamba.display.column", ["index.md"], False),
        ("[attamba.missing][]", ["index.md"], False),
    ],
)
def test_the_build_is_strict(text: str, nav: list[str], is_whole: bool, tmp_path: Path) -> None:
    """With the site's own validation, a page that is not whole ends the build."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort, BuildError

    loaded = load_config(str(_site(text, nav, tmp_path)), strict=True)
    if is_whole:
        build(loaded)
        assert (tmp_path / "site" / "index.html").is_file()
        return
    with pytest.raises((Abort, BuildError)):
        build(loaded)


def test_the_makefile_s_command_is_strict(tmp_path: Path) -> None:
    """Its options all together: --quiet, for one, would make --strict count no warnings."""
    (options,) = re.findall(
        r"^docs:.*\n.*/mkdocs (build .*)$", (ROOT / "Makefile").read_text(), re.M
    )
    path = _site("[broken](missing.md)", ["index.md"], tmp_path)
    command = [sys.executable, "-m", "mkdocs", *options.split(), "-f", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "missing.md" in done.stderr and "strict mode" in done.stdout + done.stderr


def _site(text: str, nav: list[str], folder: Path) -> Path:
    """The mkdocs.yml of a small site: one page with `text`, another, and the site's validation."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(text)
    (folder / "docs" / "other.md").write_text("another page")
    tree = {"site_name": "test", "nav": [*nav, "other.md"], "validation": site["validation"]}
    tree["plugins"] = ["mkdocstrings"] if ":::" in text or "][]" in text else []
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(tree))
    return folder / "mkdocs.yml"
