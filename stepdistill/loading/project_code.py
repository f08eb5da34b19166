"""Schedulers in pipelines/, for samplers that no stock scheduler takes, and the routed pipeline.

A folder that needs one holds a copy of its file, which Diffusers runs with trust_remote_code=True
alone. Here the class always comes from this project's own file: no code of a folder ever runs.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module, util
from pathlib import Path
from typing import Any

from stepdistill.storage.bundled import bundled_file


def project_file(module: Any) -> Path | None:
    """The file of such a module of pipelines/, None for any other name."""
    if not isinstance(module, str) or not module.isidentifier():
        return None
    if "_scheduler" not in module and module != "multi_student":
        return None
    return bundled_file(f"pipelines/{module}.py")


@cache
def project_module(module: str) -> Any:
    """That module. Errors: ValueError where the file is missing."""
    from diffusers import SchedulerMixin  # seconds, which a push can do without

    file = project_file(module)
    if file is None:
        raise ValueError(
            f"{module}.py: expected it among the project's pipelines, got none. Install "
            "stepdistill with pip, or run it from its checkout."
        )
    made = _run(module, file)
    made.SchedulerMixin = SchedulerMixin  # Diffusers looks there for the base of a given part
    return made


def _run(module: str, file: Path) -> Any:
    spec = util.spec_from_file_location(module, file)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "a .py file has a loader"
    made: Any = util.module_from_spec(spec)
    sys.modules[module] = made  # by this name Diffusers saves its classes, and finds them
    spec.loader.exec_module(made)
    return made


@cache
def optimise_module() -> Any:
    """pipelines/optimise_latent.py, which no folder names. Errors: see `project_module`."""
    file = bundled_file("pipelines/optimise_latent.py")
    if file is None:
        raise ValueError(
            "optimise_latent.py: expected it among the project's pipelines, got none. Install "
            "stepdistill with pip, or run it from its checkout."
        )
    return _run("stepdistill_optimise_latent", file)


def part_class(library: str, name: str) -> Any:
    """The class that a model_index.json names: a library's, one of a pipeline's own folder in
    Diffusers (stable_audio), or one of pipelines/."""
    if project_file(library) is not None:
        return getattr(project_module(library), name)
    if library.isidentifier() and util.find_spec(f"diffusers.pipelines.{library}"):
        library = f"diffusers.pipelines.{library}"
    return getattr(import_module(library), name)


def project_parts(model: str | Path, index: Mapping[str, Any], **hub: Any) -> dict[str, Any]:
    """The scheduler of a pipeline folder or Hub id where it is one of pipelines/, by name."""
    library, name = index.get("scheduler") or ("", "")
    if project_file(library) is None:
        return {}
    cls = part_class(library, name)
    return {"scheduler": cls.from_pretrained(str(model), subfolder="scheduler", **hub)}


def put_code(part: Any, folder: Path) -> str | None:
    """Copy the file of a scheduler of pipelines/ into `folder`; its module, None for others."""
    file = project_file(type(part).__module__)
    if file is None:
        return None
    shutil.copyfile(file, folder / file.name)
    return file.stem


def is_project_code(file: Path) -> bool:
    """Whether a file in an export is one of pipelines/, byte for byte."""
    ours = project_file(file.stem)
    return ours is not None and file.suffix == ".py" and ours.read_bytes() == file.read_bytes()
