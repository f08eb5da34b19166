"""Classes found by file name and by entry points, never listed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from stepdistill.core.registry import Registry, from_file, is_file_class
from stepdistill.families import FAMILIES
from stepdistill.methods import METHODS


class Shape:
    name = ""


def package(folder: Path, monkeypatch: Any, **modules: str) -> Registry[Any]:
    """A registry of a package of those modules, of a name of its own."""
    name = f"shapes_{folder.name}"
    (folder / name).mkdir()
    for module, source in {"__init__": "", **modules}.items():
        (folder / name / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    return Registry(name, Shape)


def declare(folder: Path, group: str, line: str) -> None:
    """An installed distribution with that entry point."""
    made = folder / f"{line.split()[0]}-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {line.split()[0]}\nVersion: 1\n")
    (made / "entry_points.txt").write_text(f"[{group}]\n{line}\n")


@pytest.mark.parametrize("registry", [METHODS, FAMILIES], ids=["methods", "families"])
def test_the_index_is_what_the_classes_say(registry) -> None:
    name = registry.package
    file = Path(sys.modules[name].__file__ or "").with_name("index.json")
    assert file.read_text() == registry.index_text(), f"{name} has changed: call write_index()"


ROUND = 'class Round:\n    name = "round"\n'


def test_a_module_counts_where_a_class_has_its_name(tmp_path, monkeypatch) -> None:
    found = package(
        tmp_path,
        monkeypatch,
        round=ROUND,
        helper='class Other:\n    name = "round"\n',
        plain="X = 1",
    )
    assert [*found] == ["round"]
    assert len(found) == 1
    assert found["round"].__name__ == "Round"
    with pytest.raises(KeyError):
        found["helper"]


def test_names_cost_no_import(tmp_path, monkeypatch) -> None:
    source = 'class A:\n    name = "broken"\nraise OSError("no")\n'
    found = package(tmp_path, monkeypatch, broken=source)
    assert "broken" in [*found]
    assert f"{found.package}.broken" not in sys.modules
    with pytest.raises(OSError, match="no"):
        found["broken"]


def test_an_entry_point_adds_a_class(tmp_path, monkeypatch) -> None:
    found = package(tmp_path, monkeypatch, round=ROUND)
    (tmp_path / "outside.py").write_text(
        f"from {__name__} import Shape\nclass Far(Shape):\n    name = 'far'\n"
    )
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    declare(tmp_path, found.package, "far = outside:Far")
    assert [*found] == ["round", "far"]
    assert found["far"].__name__ == "Far"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("far = nowhere_at_all:Far", "ModuleNotFoundError.*Mend or uninstall"),
        ("far = json:Missing", "AttributeError"),
        ("far = json:JSONDecoder", "expected a Shape named 'far'.*got <class 'json"),
        ("round = json:JSONDecoder", "expected one 'round', got .*round and json:JSONDecoder"),
    ],
)
def test_a_wrong_entry_point_is_named(line, said, tmp_path, monkeypatch) -> None:
    found = package(tmp_path, monkeypatch, round=ROUND)
    declare(tmp_path, found.package, line)
    with pytest.raises(ValueError, match=said):
        found[line.split()[0]]


def own_file(folder: Path, source: str = "") -> str:
    """FILE.py:CLASS of a class that derives from Shape."""
    sys.modules.setdefault(__name__, sys.modules[Shape.__module__])
    default = f"from {__name__} import Shape\nclass Star(Shape):\n    name = 'star'\n"
    (folder / "star.py").write_text(source or default)
    return f"{folder}/star.py:Star"


def test_a_class_of_a_file_is_added_by_its_name(tmp_path, monkeypatch) -> None:
    found = package(tmp_path, monkeypatch, round=ROUND)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Shape.__module__])
    text = own_file(tmp_path)
    assert found.add_file(text) == found.add_file(text) == "star"
    assert "star" in found
    assert [*found] == ["round", "star"]
    assert found["star"].__name__ == "Star"
    assert found.others == {"star": text}
    assert len(found) == 2
    assert "round" in found
    assert "square" not in found


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Star: name = 'star'", "that derives from Shape, got <class"),
        ("X = 1", "expected a class Star in .* got None"),
        ("1 / 0", "to run, got ZeroDivisionError"),
    ],
)
def test_a_wrong_file_is_named(source, said, tmp_path, monkeypatch) -> None:
    found = package(tmp_path, monkeypatch, round=ROUND)
    with pytest.raises(ValueError, match=said):
        found.add_file(own_file(tmp_path, source))
    with pytest.raises(ValueError, match="of a file that is there"):
        found.add_file(f"{tmp_path}/nowhere.py:Star")


def test_a_written_index_is_read_without_an_import(tmp_path, monkeypatch) -> None:
    source = 'class Round:\n    name = "round"\n    corners = 0\n'
    found = package(tmp_path, monkeypatch, round=source)
    assert found.index == {}
    written = Registry[Any](found.package, Shape, facts=("corners",))
    written.write_index()
    fresh = Registry[Any](found.package, Shape, facts=("corners",))
    assert fresh.index == {"round": {"corners": 0}}
    assert fresh._loaded == {}


def test_two_files_of_one_name_are_two_modules(tmp_path, monkeypatch) -> None:
    """The same text elsewhere runs again; a file that was run is not."""
    found = package(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Shape.__module__])
    source = f"from {__name__} import Shape\nSEEN = []\nclass Star(Shape):\n    name = 'star'\n"
    text = own_file(tmp_path, source)
    one, again = from_file(text, "here")[0], from_file(text, "here")[0]
    assert one is again
    (tmp_path / "other").mkdir()
    assert from_file(own_file(tmp_path / "other", source), "here")[0] is not one
    assert found.add_file(text) == "star"
    other = own_file(tmp_path / "other", source.replace("'star'", "'far'"))
    assert found.add_file(other) == "far"
    assert [*found] == ["star", "far"]


@pytest.mark.parametrize(("text", "is_one"), [("a.py:A", True), ("a.py", False), ("dmd2", False)])
def test_a_class_of_a_file_is_told_from_a_name(text, is_one) -> None:
    assert is_file_class(text) is is_one
