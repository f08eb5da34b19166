"""Schedulers of pipelines/ that an export may carry, where no stock one takes its step.

An export's folder holds a copy of the file for loading by Diffusers alone (trust_remote_code). This
package never runs that copy: it loads the class from its own file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

OWN = {"tcd_flow_match_scheduler": "FlowMatchTCDScheduler"}  # file of pipelines/ -> class
_FOLDERS = (
    Path(__file__).parents[2] / "pipelines",
    Path(sys.prefix) / "share" / "stepdistill" / "pipelines",  # of an installed wheel
)


def is_own(entry: Any) -> bool:
    """Whether a model_index.json entry (library, class) names one of them."""
    told = isinstance(entry, list | tuple) and all(isinstance(part, str) for part in entry)
    return told and tuple(entry) in OWN.items()


def is_own_copy(path: Path) -> bool:
    """Whether that file is a true copy of one of them."""
    return path.stem in OWN and path.read_bytes() == own_file(path.stem).read_bytes()


def own_file(module: str) -> Path:
    """The source of that module. Errors: ValueError where the installation lacks it."""
    for folder in _FOLDERS:
        if (folder / f"{module}.py").is_file():
            return folder / f"{module}.py"
    raise ValueError(
        f"scheduler: expected {module}.py in one of {[str(f) for f in _FOLDERS]}, got none. "
        "Install stepdistill from a whole checkout or wheel."
    )


def library_class(library: str, name: str) -> Any:
    """The class that a model_index.json entry names, ours from this project's own file."""
    if not is_own((library, name)):
        return getattr(import_module(library), name)
    if library not in sys.modules:  # Diffusers looks it up there by the name in the index
        spec = spec_from_file_location(library, own_file(library))
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[library] = module
        spec.loader.exec_module(module)
    return getattr(sys.modules[library], name)


def scheduler_class(name: str) -> Any:
    """The scheduler class of that name: ours, or Diffusers'."""
    module = next((m for m, own in OWN.items() if own == name), None)
    return library_class(module or "diffusers", name)


def own_parts(
    model: str | Path, index: Mapping[str, Any], revision: str | None = None
) -> dict[str, Any]:
    """Parts of a pipeline folder or Hub id that are ours, to hand to from_pretrained."""
    return {
        name: library_class(*entry).from_pretrained(str(model), subfolder=name, revision=revision)
        for name, entry in index.items()
        if is_own(entry)
    }
