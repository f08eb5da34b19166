"""Import order, circles and file budgets, read from the source with ast; nothing is imported.

Each room imports only rooms before it. Lazy imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "stepdistill"
FILES = sorted(ROOT.rglob("*.py"))

ORDER = (
    *("core", "reporting", "storage", "loading"),
    *("losses", "families", "data"),
    *("methods", "rewards", "sampling"),
    *("config", "roles"),
    *("testing", "export", "pairs"),
    *("cache", "monitoring"),
    *("training", "planning", "trainers"),
    *("evaluation", "particles", "demo", "comparison", "cli"),
)
# Besides the order: what a room leaves alone though it stands before.
NEVER = {
    "methods": {"reporting", "storage", "loading", "families", "data"},
    "roles": {"methods"},
    "comparison": {"demo"},
}
PUBLIC = "__init__"  # names public things lazily, of any room
LIBRARIES_METHODS_LEAVE_ALONE = {"diffusers", "accelerate", "peft", "transformers"}
LIBRARIES_CORE_LEAVES_ALONE = {*LIBRARIES_METHODS_LEAVE_ALONE, "safetensors"}
METHOD_LINES, ADAPTER_LINES = 150, 140


@cache
def statements(source: str) -> list[ast.AST]:
    """Its imports and classes, wherever they stand: a file is parsed once for all its tests."""
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def modules(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names of the modules that source in `package` imports, relative ones made absolute."""
    for node in statements(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "stepdistill":  # from stepdistill import X: X may be a package
                yield from (f"stepdistill.{alias.name}" for alias in node.names)
            else:
                yield module


def imported(path: Path) -> Iterator[str]:
    return modules(path.read_text(), ("stepdistill", *path.relative_to(ROOT).parts[:-1]))


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def bases(path: Path) -> set[str]:
    """Names of the classes that the file's classes derive from, subscripts dropped."""
    found = set()
    for node in statements(path.read_text()):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                inner = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(inner, ast.Name):
                    found.add(inner.id)
    return found


def budget(path: Path) -> int | None:
    if layer_of(path) == "methods" and "Method" in bases(path):
        return METHOD_LINES
    if layer_of(path) == "families" and "Family" in bases(path):
        return ADAPTER_LINES
    return None


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_room_has_its_place() -> None:
    assert {layer_of(path) for path in FILES} == {*ORDER, PUBLIC}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_import_order(path: Path) -> None:
    room = layer_of(path)
    if room == PUBLIC:
        return
    allowed = {*ORDER[: ORDER.index(room) + 1]} - NEVER.get(room, set())
    for module in imported(path):
        parts = module.split(".")
        if parts[0] == "stepdistill" and len(parts) > 1:
            assert parts[1] in allowed, f"{room} may not import {module} ({name(path)})"


def test_no_files_import_each_other_in_a_circle() -> None:
    names = {_dotted(path): path for path in FILES}
    graph = {name: {m for m in _files_of(path, names) if m != name} for name, path in names.items()}
    while leaves := {name for name, needs in graph.items() if not needs}:
        graph = {name: needs - leaves for name, needs in graph.items() if name not in leaves}
    assert not graph, f"these import each other, or one that does: {sorted(graph)}"


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _files_of(path: Path, names: dict[str, Path]) -> Iterator[str]:
    """Dotted names of the files that a file imports, modules and names of modules alike."""
    package = ("stepdistill", *path.relative_to(ROOT).parts[:-1])
    for node in statements(path.read_text()):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{module}.{alias.name}" for alias in node.names} & {*names}
            yield from inner
            if module in names and len(inner) < len(node.names):
                yield module


@pytest.mark.parametrize("layer", ["core", "losses", "methods"])
def test_algorithms_know_no_model_library(layer: str) -> None:
    for path in sorted((ROOT / layer).rglob("*.py")):
        used = {module.split(".")[0] for module in imported(path)}
        banned = (
            LIBRARIES_METHODS_LEAVE_ALONE if layer == "methods" else LIBRARIES_CORE_LEAVES_ALONE
        )
        assert not used & banned, f"{name(path)} imports {sorted(used & banned)}"


@pytest.mark.parametrize("path", [p for p in FILES if budget(p)], ids=name)
def test_file_budget(path: Path) -> None:
    lines, most = len(path.read_text().splitlines()), budget(path) or 0
    assert lines <= most, f"{name(path)} has {lines} lines, budget {most}"


def test_budgets_reach_methods_and_adapters() -> None:
    """The base-class rule finds them; a renamed base would silently lift every budget."""
    kinds = [budget(path) for path in FILES]
    assert kinds.count(METHOD_LINES) >= 3
    assert kinds.count(ADAPTER_LINES) >= 3


def test_the_reader_sees_every_kind_of_import() -> None:
    source = (
        "import a.b\nfrom ..core import times\nfrom .metrics import X\nfrom . import teacher\n"
        "from stepdistill import export\ndef f():\n    from diffusers import Y\n"
    )
    assert set(modules(source, ("stepdistill", "demo"))) == {
        "a.b",
        "stepdistill.core",
        "stepdistill.demo.metrics",
        "stepdistill.demo",
        "stepdistill.export",
        "diffusers",
    }


def test_launchers_are_thin() -> None:
    for path in sorted((ROOT.parent / "train").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 40, path.name
