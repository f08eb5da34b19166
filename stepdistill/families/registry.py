"""Find and load the family that serves a pipeline: by the class named in model_index.json.

Everything that can be wrong with a model id is said before a weight is read.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel

from stepdistill.core.method import Setting
from stepdistill.core.registry import Registry
from stepdistill.families.family import Family
from stepdistill.families.generic import generic_family
from stepdistill.families.schedule import read_schedule
from stepdistill.loading.quantization import check_quantization, loader_config, requantized
from stepdistill.loading.safe_files import check_index, load_part, load_stock
from stepdistill.loading.single_file import config_source, is_single_file, load_single_file
from stepdistill.loading.teacher_lora import merge_loras, parse_lora
from stepdistill.loading.weightless import weightless
from stepdistill.storage.files import read_json

FAMILIES: Registry[Family] = Registry("stepdistill.families", Family)


def family_for(pipeline_class: str) -> type[Family]:
    """The family that serves a Diffusers pipeline class name, the generic one where none is made.

    Errors: ValueError naming the nearest served classes, where the generic one can't serve it.
    """
    served = {name: family for family in FAMILIES.values() for name in family.pipelines}
    if pipeline_class not in served:
        try:
            generic = generic_family(pipeline_class)
        except ValueError:
            pass  # the message below says what is served
        else:
            warnings.warn(
                f"model: {pipeline_class} has no family of its own; the generic one listens to its "
                "call. Run `stepdistill check` on it, and train only where it passes.",
                stacklevel=2,
            )
            return generic
        near = difflib.get_close_matches(pipeline_class, served, n=3, cutoff=0.3)
        raise ValueError(
            f"model: expected a pipeline class that has a family, got {pipeline_class!r}. "
            f"Nearest: {near or sorted(served)}."
        )
    return served[pipeline_class]


def model_index(model: str | Path, config: str | None = None, **hub: Any) -> dict[str, Any]:
    """model_index.json of a local folder, a Hub id, or the configuration of a single file.

    Args: config: see `single_file.config_source`.
    Errors: ValueError where the folder is no Diffusers pipeline or the file is broken.
    """
    model = config_source(model, config)
    folder = Path(model)
    if not folder.exists():
        if str(model).startswith(("/", ".", "~")):  # no Hub id does
            raise ValueError(
                f"pretrained_model_name_or_path: expected a pipeline folder or a Hub id, got "
                f"{str(model)!r}, which is not there."
            )
        found: dict[str, Any] = DiffusionPipeline.load_config(model, **hub)
        check_index(found, model)
        return found
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"pretrained_model_name_or_path: expected a Diffusers pipeline folder "
            f"(with model_index.json), got {str(model)!r}. Save it with save_pretrained."
        )
    read = read_json(index, ("_class_name",))
    if not isinstance(read.get("_class_name"), str):
        raise ValueError(f"{index}: expected an object with a string _class_name, got none.")
    check_index(read, index)
    return read


def pipeline_class_of(model: str | Path, config: str | None = None, **hub: Any) -> str:
    """The `_class_name` in model_index.json. Errors: see `model_index`."""
    name: str = model_index(model, config, **hub)["_class_name"]
    return name


def load_family(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    teacher_lora: Sequence[str] = (),
    single_file_config: str | None = None,
    base_quantization: str = "none",
    base_dtype: torch.dtype | None = None,
    **components: Any,
) -> Family:
    """The loaded family of a folder, Hub id or single file; safetensors only, never remote code.

    Parts saved as None (SD3 without T5) stay None: the stock loader wants to be told so.

    Args:
        teacher_lora: `path[:scale]` of LoRAs merged into the weights, in order.
        single_file_config: pipeline folder or Hub id that describes a single-file checkpoint.
        base_quantization: "int8" or "nf4": the denoiser's linear layers, its other weights in
            base_dtype (None: torch_dtype).
        components: parts to pass to from_pretrained instead of loading them (None to leave out).
    """
    check_quantization(base_quantization)
    for text in teacher_lora:
        parse_lora(text)  # refuses a wrong one before the base is read
    hub = {"revision": revision} if revision else {}
    index = model_index(model, single_file_config, **hub)
    cls = family_for(index["_class_name"])
    missing = {name: None for name, entry in index.items() if entry == [None, None]}
    parts = {**missing, **components}
    quantized = base_quantization != "none" and cls.net_name not in parts
    made_here = bool(teacher_lora) or is_single_file(model)  # there is no folder to read it from
    dtype = base_dtype or torch_dtype
    net = partial(load_part, model, index, cls.net_name, variant=variant, dtype=dtype, **hub)
    if quantized and not made_here:
        parts[cls.net_name] = net(quantization_config=loader_config(base_quantization, dtype))
    if is_single_file(model):
        config = config_source(model, single_file_config)
        pipeline = load_single_file(model, index, config, cls.net_name, torch_dtype, **parts)
    else:
        pipeline = load_stock(model, index, variant=variant, dtype=torch_dtype, **hub, **parts)
    if cls.conditioning == "prompt":
        _check_encoders(pipeline)
    merge_loras(pipeline, cls.net_name, teacher_lora)
    if quantized and made_here:
        made = requantized(getattr(pipeline, cls.net_name), base_quantization, dtype)
        pipeline.register_modules(**{cls.net_name: made})
    family = cls(pipeline)
    if quantized:
        again = {"revision": revision, "variant": variant, "torch_dtype": dtype, **components}
        again |= {"teacher_lora": teacher_lora, "single_file_config": single_file_config}
        family.unquantized = (lambda: load_family(model, **again).net) if made_here else net
    return family


def load_encoders(
    model: str | Path,
    device: torch.device,
    *,
    revision: str | None = None,
    variant: str | None = None,
    teacher_lora: Sequence[str] = (),
    single_file_config: str | None = None,
) -> Family:
    """A family to encode prompts and images with: no weight of its denoiser is read or held.

    Its denoiser has its configuration and shapes, and one zero on `device` for all weights. It is
    loaded after all with teacher_lora, as merging reads both.
    """
    parts: dict[str, Any] = {}
    hub = {"revision": revision} if revision else {}
    index = model_index(model, single_file_config, **hub)
    name = family_for(index["_class_name"]).net_name
    if not teacher_lora:
        where = config_source(model, single_file_config)
        parts[name] = weightless(where, index, name, device, **hub)
    return load_family(
        model,
        revision=revision,
        variant=variant,
        teacher_lora=teacher_lora,
        single_file_config=single_file_config,
        **parts,
    )


def _check_encoders(pipeline: Any) -> None:
    """Errors: ValueError where no text encoder is left to encode a prompt with."""
    encoders = [name for name in pipeline.components if name.startswith("text_encoder")]
    if encoders and all(getattr(pipeline, name) is None for name in encoders):
        raise ValueError(
            f"model: expected one of {encoders} to encode prompts, got a pipeline without any. "
            "Save it with its text encoder; SD3 may go without T5, SDXL without its first."
        )


def load_setting(model: str | Path, config: str | None = None, **hub: Any) -> Setting:
    """The facts a method may know, from the scheduler's config alone: no weight is read."""
    index = model_index(model, config, **hub)
    family_for(index["_class_name"])  # refuses unserved classes first
    library, name = index["scheduler"]
    scheduler_cls = getattr(import_module(library), name)
    where = config_source(model, config)
    try:
        scheduler = scheduler_cls.from_pretrained(where, subfolder="scheduler", **hub)
    except (OSError, TypeError, KeyError, AttributeError) as err:
        raise ValueError(f"{where}: expected a readable scheduler config, got {err}.") from err
    return Setting(*read_schedule(scheduler))


def conditioning_of(model: Any, config: str | None = None, **hub: Any) -> str:
    """ "prompt", "label" or "none": what a Family, folder, Hub id or single file is told."""
    if isinstance(model, Family):
        return model.conditioning
    cls = family_for(pipeline_class_of(model, config, **hub))
    net = (
        UNet2DModel.load_config(config_source(model, config), subfolder=cls.net_name, **hub)
        if cls.reads_conditioning
        else {}
    )
    return cls.conditioning_in(net)


def has_null(model: Any, config: str | None = None, **hub: Any) -> bool:
    """Whether that model has an empty condition to guide away from."""
    if isinstance(model, Family):
        return model.has_null
    index = model_index(model, config, **hub)
    return family_for(index["_class_name"]).null_in(index)


def reads_image(model: Any, config: str | None = None, **hub: Any) -> bool:
    """Whether that model's condition holds a first frame beside the prompt."""
    if isinstance(model, Family):
        return model.reads_image
    return family_for(pipeline_class_of(model, config, **hub)).reads_image


def refuse_one_step(
    model: Any, as_flow: bool, num_steps: int, config: str | None = None, **hub: Any
) -> None:
    """See Family.refuse_one_step, for a Family, folder, Hub id or single file."""
    if isinstance(model, Family):
        model.refuse_one_step(type(model.pipeline).__name__, as_flow, num_steps)
    else:
        name = pipeline_class_of(model, config, **hub)
        family_for(name).refuse_one_step(name, as_flow, num_steps)
