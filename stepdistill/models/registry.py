"""Find and load the family that serves a pipeline: by the class named in model_index.json.

Everything that can be wrong with a model id is said before a weight is read.
"""

from __future__ import annotations

import difflib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepdistill.models.family import Family

# family name -> "module:Class"; modules load on demand, so one broken family breaks no other.
FAMILIES: dict[str, str] = {
    "sd": "stepdistill.models.sd:StableDiffusionFamily",
    "sd3": "stepdistill.models.sd3:StableDiffusion3Family",
    "dit": "stepdistill.models.dit:DiTFamily",
}


def family_class(name: str) -> type[Family]:
    """The Family class of that short name."""
    module, _, cls = FAMILIES[name].partition(":")
    found: type[Family] = getattr(import_module(module), cls)
    return found


def family_for(pipeline_class: str) -> type[Family]:
    """The family that serves a Diffusers pipeline class name.

    Errors: ValueError naming the nearest served classes.
    """
    served = {cls: name for name in FAMILIES for cls in family_class(name).pipelines}
    if pipeline_class not in served:
        near = difflib.get_close_matches(pipeline_class, served, n=3, cutoff=0.3)
        raise ValueError(
            f"model: expected a pipeline class that has a family, got {pipeline_class!r}. "
            f"Nearest: {near or sorted(served)}."
        )
    return family_class(served[pipeline_class])


def pipeline_class_of(model: str | Path, **hub: Any) -> str:
    """The `_class_name` in model_index.json of a local folder or a Hub id.

    Errors: ValueError where the folder is no Diffusers pipeline.
    """
    folder = Path(model)
    if folder.exists():
        index = folder / "model_index.json"
        if not index.is_file():
            raise ValueError(
                f"pretrained_model_name_or_path: expected a Diffusers pipeline folder "
                f"(with model_index.json), got {str(model)!r}. Save it with save_pretrained."
            )
        try:
            config = json.loads(index.read_text())
        except json.JSONDecodeError as err:
            raise ValueError(f"{index}: expected valid JSON, got {err}.") from err
    else:
        config = DiffusionPipeline.load_config(str(model), **hub)
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"model_index.json of {model}: expected _class_name a string, got {name}.")
    return name


def load_family(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    **components: Any,
) -> Family:
    """The loaded family of a local folder or Hub id; safetensors only, never remote code.

    Args: components: parts to pass to from_pretrained instead of loading them (None to leave out).
    """
    hub = {"revision": revision} if revision else {}
    cls = family_for(pipeline_class_of(model, **hub))
    pipeline = DiffusionPipeline.from_pretrained(
        str(model),
        variant=variant,
        torch_dtype=torch_dtype,
        use_safetensors=True,
        **hub,
        **components,
    )
    return cls(pipeline)
