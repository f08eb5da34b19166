"""Import order and file budgets, read from the source with ast; nothing is imported.

    core <- losses, nn <- models <- methods <- training <- export, evaluation, trainers, cli, demo

data and sampling stand between models and training. Lazy imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "stepdistill"
FILES = sorted(ROOT.rglob("*.py"))

_MODELS = {"core", "losses", "nn", "models"}
_TRAINING = {*_MODELS, "methods", "data", "sampling", "rewards", "reporting", "training"}
_TOP = {*_TRAINING, "export", "evaluation", "planning", "trainers", "demo", "comparison"}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "losses": {"core"},
    "nn": {"core"},
    "models": {"core", "losses", "nn"},
    "rewards": _MODELS,
    "data": {"core", "models"},
    "sampling": {"core", "models"},
    "methods": {"core", "losses", "nn"},
    "reporting": set(),
    "training": _TRAINING,
    "evaluation": _TOP,
    "planning": _TOP,
    "export": _TOP,
    "trainers": _TOP,
    "demo": _TOP,
    "comparison": _TOP,
    "cli": _TOP,
    "__init__": _TOP,
}
LIBRARIES_METHODS_LEAVE_ALONE = {"diffusers", "accelerate", "peft", "transformers"}
LIBRARIES_CORE_LEAVES_ALONE = {*LIBRARIES_METHODS_LEAVE_ALONE, "safetensors"}
METHOD_LINES, ADAPTER_LINES, OTHER_LINES = 150, 140, 300


def modules(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names of the modules that source in `package` imports, relative ones made absolute."""
    for node in ast.walk(ast.parse(source)):
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
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                inner = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(inner, ast.Name):
                    found.add(inner.id)
    return found


def budget(path: Path) -> int:
    if layer_of(path) == "methods" and "Method" in bases(path):
        return METHOD_LINES
    if layer_of(path) == "models" and "Family" in bases(path):
        return ADAPTER_LINES
    return OTHER_LINES


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_import_order(path: Path) -> None:
    layer = layer_of(path)
    assert layer in ALLOWED, f"{layer}: say in ALLOWED where this package stands"
    for module in imported(path):
        parts = module.split(".")
        if parts[0] == "stepdistill" and len(parts) > 1 and parts[1] != layer:
            assert parts[1] in ALLOWED[layer], f"{layer} may not import {module} ({name(path)})"


@pytest.mark.parametrize("layer", ["core", "losses", "methods"])
def test_algorithms_know_no_model_library(layer: str) -> None:
    for path in sorted((ROOT / layer).rglob("*.py")):
        used = {module.split(".")[0] for module in imported(path)}
        banned = (
            LIBRARIES_METHODS_LEAVE_ALONE if layer == "methods" else LIBRARIES_CORE_LEAVES_ALONE
        )
        assert not used & banned, f"{name(path)} imports {sorted(used & banned)}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_budget(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= budget(path), f"{name(path)} has {lines} lines, budget {budget(path)}"


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
