"""Imports go only downward, and each heavy package has its door."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"lightbulb": "lightbulb", "kernels": "lightbulb.kernels"}
FOLDERS |= {"data_prep": "lightbulb.data_prep", "launcher": "lightbulb.launcher"}

LEVELS = [
    ("config", "registry", "folder", "kernels"),
    ("ops",),
    ("nn",),
    ("routing",),
    ("mixers",),
    ("models",),
    ("modifiers", "data", "parallel"),
    ("data_prep",),
    ("train", "inference"),
    ("experts", "evaluation", "planning"),
    ("recipes",),
    ("launcher",),
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
TOP_FILES = {"config", "registry", "folder"}  # one folder: lightbulb/

DATA_PREP_SEES = {"lightbulb.config", "lightbulb.registry", "lightbulb.folder", "lightbulb.data.tokenizer"}

DOORS = {
    "megatron": ("lightbulb/nn/groups.py", "lightbulb/parallel/"),
    "streaming": ("lightbulb/data/shards.py",),
    "datatrove": ("data_prep/executor.py",),
    "tiktoken": ("lightbulb/data/bpe.py",),
}
ONE_FILE = ("deepspeed", "faiss")


class Import(NamedTuple):
    """One imported module."""

    path: Path
    line: int
    source: str
    target: str
    in_function: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.source} imports {self.target}"


def files() -> Iterator[tuple[Path, str]]:
    """Every source file with its module name."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield path, ".".join([package, *(part for part in parts if part != "__init__")])


def imports(path: Path, module: str) -> Iterator[Import]:
    """Every import statement of a file."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, in_function in _walk(ast.parse(path.read_text(encoding="utf-8")), False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, module, alias.name, in_function)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                # a module or a name of a module: only the files can tell
                longer = f"{base}.{alias.name}"
                yield Import(path, node.lineno, module, longer if longer in MODULES else base, in_function)


def _walk(node: ast.AST, in_function: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, in_function
        yield from _walk(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def part_of(module: str) -> str:
    """``lightbulb.nn.norm`` belongs to ``nn``; the package itself is as low as its lowest files."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "config"


def problem_of(item: Import) -> str | None:
    """What is wrong with an import of our own, or None."""
    source, target = part_of(item.source), part_of(item.target)
    for part in (source, target):
        if part not in LEVEL:
            return f"{item}: {part!r} has no level; give it one in tests/test_imports.py and docs/architecture.md"
    same_folder = source == target or {source, target} <= TOP_FILES
    if source == "data_prep" and not same_folder and item.target not in DATA_PREP_SEES:
        return f"{item}: data_prep may see only {', '.join(sorted(DATA_PREP_SEES))}"
    if not same_folder and LEVEL[target] >= LEVEL[source]:
        return f"{item}: level {LEVEL[source]} ({source}) may not import level {LEVEL[target]} ({target})"
    return None


MODULES = {module for _, module in files()}
ALL = [item for path, module in files() for item in imports(path, module)]
OWN = [item for item in ALL if item.target.partition(".")[0] == "lightbulb"]


def test_every_file_is_seen() -> None:
    assert {"lightbulb.config", "lightbulb.data_prep.write", "lightbulb.launcher.cli", "lightbulb.kernels"} <= MODULES
    assert len(OWN) > 100


def test_the_levels_are_those_of_the_documentation() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    documented = [tuple(name.rstrip("/") for name in re.findall(r"`([^`]+)`", cell)) for _, cell in rows]
    assert [int(number) for number, _ in rows] == list(range(len(LEVELS)))
    assert documented == LEVELS
    assert {part_of(module) for module in MODULES} == set(LEVEL)


def test_imports_go_downward() -> None:
    problems = [problem for item in OWN if (problem := problem_of(item)) is not None]
    assert not problems, "\n".join(problems)


def test_kernels_are_reached_through_one_door() -> None:
    strays = [
        str(item)
        for item in OWN
        if part_of(item.target) == "kernels" and part_of(item.source) != "kernels" and item.source != "lightbulb.ops"
    ]
    assert not strays, "\n".join(strays)


def test_imported_modules_of_our_own_exist() -> None:
    missing = [str(item) for item in OWN if item.target not in MODULES and item.target != "lightbulb"]
    assert not missing, "\n".join(missing)


def test_no_import_of_our_own_inside_a_function() -> None:
    hidden = [str(item) for item in OWN if item.in_function]
    assert not hidden, "\n".join(hidden)


@pytest.mark.parametrize("package", DOORS)
def test_package_comes_in_through_its_door(package: str) -> None:
    strays = [
        str(item)
        for item in _of(package)
        if not any(item.path.relative_to(ROOT).as_posix().startswith(door) for door in DOORS[package])
    ]
    assert not strays, "\n".join(strays)


@pytest.mark.parametrize("package", ONE_FILE)
def test_package_is_imported_by_one_file_at_most(package: str) -> None:
    found = _of(package)
    assert len({item.path for item in found}) <= 1, "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("source", "target", "problem"),
    [
        ("lightbulb.nn.norm", "lightbulb.nn.parameter", None),
        ("lightbulb.config", "lightbulb.registry", None),
        ("lightbulb.models.block", "lightbulb.config", None),
        ("lightbulb.nn.norm", "lightbulb.models.block", r"lightbulb.nn.norm imports lightbulb.models.block: level 2"),
        ("lightbulb.data.loader", "lightbulb.parallel.engine", r"level 6 \(data\) may not import level 6 \(parallel\)"),
        ("lightbulb.data_prep.read", "lightbulb.data.tokenizer", None),
        ("lightbulb.data_prep.read", "lightbulb.data.shards", "data_prep may see only"),
        ("lightbulb.kernels.scan", "lightbulb.ops", "may not import"),
        ("lightbulb.train.loop", "lightbulb.launcher.cli", "may not import"),
        ("lightbulb.surprise.file", "lightbulb.config", "'surprise' has no level"),
    ],
)
def test_the_rule_itself(source: str, target: str, problem: str | None) -> None:
    found = problem_of(Import(ROOT / "some.py", 1, source, target, False))
    assert found is None if problem is None else re.search(problem, found or ""), found


def _of(package: str) -> list[Import]:
    return [item for item in ALL if item.target.partition(".")[0] == package]
