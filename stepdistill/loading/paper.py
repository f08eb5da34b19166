"""What a pipeline's configurations describe, built without memory before any weight is read.

A number with three zeros too many would ask for terabytes, one that does not fit for a traceback
from deep inside. Networks are built on torch's meta device, and the shapes they need are held
against the headers of the files beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from stepdistill.storage.files import one_line

MAX_SIDE = 16384  # of a sample, in latents or px
MAX_LAYERS = 10_000


def check_on_paper(model: str | Path, index: Mapping[str, Any], **hub: Any) -> None:
    """Errors: ValueError for a part whose configuration describes nothing that can be built, or
    another network than its weights are of; it names the file and the value.

    Args: index: of model_index.json, looked through (see `check_index`), the parts to be loaded.
    """
    for name, entry in index.items():
        named = isinstance(entry, list | tuple) and len(entry) == 2
        if name.startswith("_") or not named:
            continue
        library, cls_name = entry
        cls = getattr(import_module(library), cls_name, None) if library in _BUILT else None
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            continue
        where = f"{model}/{name}/config.json"
        state = _state(Path(model) / name, cls)
        if state and state in _PASSED:
            continue
        stock = library == "diffusers"
        config = part_config(cls, stock, model, name, hub)
        check_numbers(config, where)
        net = on_meta(cls, stock, config, where)
        if "quantization_config" not in config:
            _check_shapes(net, Path(model) / name, where)
        if state:
            _PASSED.add(state)


_BUILT = ("diffusers", "transformers")
_PASSED: set[tuple[Any, ...]] = set()  # parts that this process has looked at: one is loaded often


def _state(folder: Path, cls: type[Any]) -> tuple[Any, ...]:
    """What tells a local part's files from others; () for a Hub id's."""
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    facts = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return (cls.__name__, *facts) if facts else ()


Rule = tuple[Callable[[Any], bool], str]  # what holds for a value, and so in words


def whole_number(low: int, high: int) -> Rule:
    """The rule of whole numbers from low to high."""
    rule = f"a whole number from {low} to {high}"
    return lambda v: type(v) is int and low <= v <= high, rule


def is_finite(value: Any) -> bool:
    """Whether it is a number (not true or false), and neither NaN nor infinite."""
    return type(value) in (int, float) and math.isfinite(value)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("sample_size", "sample_height", "sample_width"), whole_number(1, MAX_SIDE)),
    "num_hidden_layers": whole_number(0, MAX_LAYERS),
    "scaling_factor": (lambda v: is_finite(v) and v != 0, "a finite number other than 0"),
    "shift_factor": (is_finite, "a finite number"),
}


def check_numbers(
    config: Mapping[str, Any], where: str, rules: Mapping[str, Rule] = _RULES
) -> None:
    """Errors: ValueError for a value that no stock class looks at before it is used.

    Args: rules: of the values by key, for each one of a list; none of them looks at null.
    """
    for key, (holds, rule) in rules.items():
        value = config.get(key)
        every = value if isinstance(value, list | tuple) else [value]
        if value is not None and not all(holds(one) for one in every):
            raise ValueError(f"{where}: expected {key} to be {rule}, got {value!r}.")


def part_config(
    cls: Any, diffusers: bool, model: str | Path, name: str, hub: Mapping[str, Any]
) -> dict[str, Any]:
    """A part's config.json. Args: diffusers: else of Transformers. Errors: ValueError for a broken
    one."""
    where = f"{model}/{name}/config.json"
    try:
        if diffusers:
            config = cls.load_config(str(model), subfolder=name, **hub)
        else:
            config = cls.config_class.get_config_dict(str(model), subfolder=name, **hub)[0]
    except Exception as err:  # whatever broken files make the stock readers stumble over
        raise ValueError(
            f"{where}: expected a readable configuration, got {one_line(err)}"
        ) from err
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected an object, got {type(config).__name__}.")
    _check_class(cls, diffusers, config, where)
    return config


# Of files that were saved by a former class of the same network.
_FORMER = {"Transformer2DModel": ("DiTTransformer2DModel", "PixArtTransformer2DModel")}


def _check_class(cls: Any, diffusers: bool, config: Mapping[str, Any], where: str) -> None:
    """Errors: ValueError for a configuration of another class than model_index.json names."""
    if diffusers:
        key, expected = "_class_name", cls.__name__
        named = config.get(key, expected)
        saved = named.removeprefix("Flax") if isinstance(named, str) else None
        right = saved == expected or expected in _FORMER.get(saved or "", ())
    else:
        key, expected = "model_type", cls.config_class.model_type
        named = config.get(key, expected)
        parts = [v for v in config.values() if isinstance(v, dict)]  # one may be the network's own
        right = named == expected or expected in [v.get(key) for v in parts]
        right = right or cls.config_class.base_config_key in config
    if not right:
        raise ValueError(
            f"{where}: expected {key} {expected}, as model_index.json names {cls.__name__}, got "
            f"{named!r}. Save the pipeline anew, or correct the one that is wrong."
        )


def on_meta(cls: Any, diffusers: bool, config: dict[str, Any], where: str) -> nn.Module:
    """The network without memory. Errors: ValueError for a config that describes none."""
    try:
        with torch.device("meta"):
            if diffusers:
                net: nn.Module = cls.from_config(config)
            else:
                net = cls(cls.config_class.from_dict(config))
    except Exception as err:  # whatever a stock class raises at values that do not go together
        raise ValueError(
            f"{where}: expected a config that {cls.__name__} can be built from, got "
            f"{one_line(err)}."
        ) from err
    return net


def _check_shapes(net: nn.Module, folder: Path, where: str) -> None:
    """Errors: ValueError where a weight in the folder has another shape than the network's."""
    needed = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                shape = tuple(opened.get_slice(name).get_shape())
                if name in needed and shape != needed[name]:
                    raise ValueError(
                        f"{where}: expected the network of {file.name}, whose {name} is of "
                        f"{shape}, got a description of one with {needed[name]}."
                    )
