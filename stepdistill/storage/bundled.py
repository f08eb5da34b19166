"""The project's own files beside the package: configs/, pipelines/, train/.

They stand at the top of a checkout and, installed from a wheel, in share/stepdistill/.
"""

from __future__ import annotations

import difflib
import sysconfig
from pathlib import Path

_ROOTS = (
    Path(__file__).parents[2],
    Path(sysconfig.get_path("data")) / "share" / "stepdistill",
)
_CONFIGS = ("methods", "models", "recipes")  # whose files are known by their names


def project_folder() -> Path:
    """The folder that holds configs/, pipelines/ and train/."""
    return next((root for root in _ROOTS if (root / "configs").is_dir()), _ROOTS[-1])


def bundled_file(name: str) -> Path | None:
    """The file of that path below a root, such as pipelines/x.py; None where there is none."""
    files = (root / name for root in _ROOTS)
    return next((file for file in files if file.is_file()), None)


def bundled_names(folder: str) -> list[str]:
    """Names, without suffix, of the YAML files of configs/FOLDER."""
    return sorted({f.stem for root in _ROOTS for f in (root / "configs" / folder).glob("*.yaml")})


def config_file(name: str | Path) -> Path:
    """A path to a YAML file, or a name such as dmd2 or sdxl of configs/.

    Errors: ValueError naming the nearest where there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    plain = str(name).removesuffix(".yaml")
    if "/" not in plain and "\0" not in plain:
        files = (bundled_file(f"configs/{folder}/{plain}.yaml") for folder in _CONFIGS)
        file = next((file for file in files if file is not None), None)
        if file is not None:
            return file
    known = [each for folder in _CONFIGS for each in bundled_names(folder)]
    near = difflib.get_close_matches(path.stem, known, n=3, cutoff=0.4)
    raise ValueError(
        f"--config: expected a YAML file, got {str(name)!r}, which is not there, nor is it a name "
        f"of configs/. Nearest: {near or known}."
    )
