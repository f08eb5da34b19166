"""Read files that came from elsewhere: safetensors and JSON only, whole, and inside their folder.

A pipeline folder is looked through before Diffusers sees it: what it names is a class of Diffusers,
Transformers or this project, its weights are safetensors whose headers are true. No code of a
folder ever runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, pipelines
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.loading.paper import check_on_paper
from stepdistill.loading.project_code import project_file, project_parts
from stepdistill.loading.quiet import without_bars
from stepdistill.storage.files import PICKLED, one_line, read_json

_PART = re.compile(r"[A-Za-z]\w*")
_NETS = ("unet", "transformer", "vae")


COUNTER = ".num_batches_tracked"  # of a BatchNorm (Flux.2's VAE): the one integer beside weights


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Errors: ValueError for a missing or malformed one."""
    check_safetensors(Path(path))
    return load_file(path)


def check_safetensors(path: Path, floating: bool = False) -> None:
    """Errors: ValueError for a header that lies, a truncated file, or integers for weights."""
    try:
        with safe_open(path, framework="pt") as file:
            kinds = {
                file.get_slice(name).get_dtype()
                for name in file.keys()  # noqa: SIM118
                if not name.endswith(COUNTER)
            }
    except (SafetensorError, OSError, ValueError) as err:
        raise ValueError(
            f"{path}: expected a whole safetensors file, got a truncated or malformed one "
            f"({one_line(err)}). Fetch it again."
        ) from err
    odd = sorted(kind for kind in kinds if not kind.startswith(("F", "BF")))
    if floating and odd:
        raise ValueError(f"{path}: expected floating-point weights, got {odd}.")


def check_index(index: Mapping[str, Any], where: str | Path) -> None:
    """Errors: ValueError where model_index.json names a path, or code that is not a library's."""
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list | tuple) or len(entry) != 2:
            continue
        if not _PART.fullmatch(name):
            raise ValueError(f"{where}: expected names of parts, got {name!r}.")
        library, cls = entry
        if library is None and cls is None:
            continue
        known = library in ("diffusers", "transformers") or (
            isinstance(library, str) and _PART.fullmatch(library) and hasattr(pipelines, library)
        )
        known = known or (name == "scheduler" and project_file(library) is not None)
        if not known or not isinstance(cls, str) or not _PART.fullmatch(cls):
            raise ValueError(
                f"{where}: expected classes of diffusers and transformers, got {list(entry)!r} for "
                f"{name}. Code that comes with a model is not run."
            )


def check_weights(folder: Path, index: Mapping[str, Any]) -> None:
    """Errors: ValueError for a part that is pickled alone, or a malformed safetensors file."""
    for name, entry in index.items():
        part = folder / name
        if name.startswith("_") or not isinstance(entry, list | tuple) or not part.is_dir():
            continue
        files = [p for p in part.iterdir() if p.is_file()]
        complete = sorted(p for p in files if p.suffix == ".safetensors")
        pickled = sorted(p.name for p in files if p.suffix.lower() in PICKLED)
        if pickled and not complete:
            raise ValueError(
                f"{part}: expected safetensors, got the pickled {pickled[0]}, which is not read "
                "(it can run code). Save the pipeline anew with safe_serialization=True."
            )
        for shards in files:
            if shards.name.endswith(".index.json"):
                check_shard_index(shards)
        config = part / "config.json"
        quantised = config.is_file() and "quantization_config" in read_json(config)
        for path in complete:
            check_safetensors(path, floating=name in _NETS and not quantised)


def check_shard_index(file: Path) -> None:
    """Errors: ValueError where *.index.json of a part sends its loader to anything but the
    safetensors files beside it."""
    shards = read_json(file, ("weight_map",))["weight_map"]
    names = sorted(set(shards.values())) if isinstance(shards, dict) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: expected a weight_map of file names, got {type(shards)}.")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{file}: expected the names of .safetensors files beside it, got {name!r}. "
                "Pickled weights and files elsewhere are not read; save the part anew."
            )
        if not (file.parent / name).is_file():
            raise ValueError(f"{file}: expected {name} beside it, got none. Fetch it again.")


@contextmanager
def no_pickles(where: str) -> Iterator[None]:
    """Within: a loader of another library that would unpickle a file is stopped before it does.

    Hub ids are resolved inside these loaders, so what an index names is not known before.
    Args: where: the option to blame. Errors: ValueError, naming the file.
    """
    unpickle, refused = torch.load, list[str]()

    def refuse(file: Any, *args: Any, **options: Any) -> Any:
        refused.append(str(getattr(file, "name", file)))
        raise ValueError("pickled")

    torch.load = refuse  # type: ignore[assignment]
    try:
        yield
    except Exception as err:
        if refused:
            raise ValueError(
                f"{where}: expected safetensors, got the pickled {refused[0]}, which is not read "
                "(it can run code). Save it anew with safe_serialization=True."
            ) from err
        raise
    finally:
        torch.load = unpickle


def load_stock(model: str | Path, index: Mapping[str, Any], **options: Any) -> Any:
    """from_pretrained of a checked folder or a Hub id, by the pipeline class that its index names.

    DiffusionPipeline's own would read an optional part (Wan's denoiser) that `options` hand over.
    Errors: ValueError for whatever a broken folder makes the stock loader raise.
    """
    named = getattr(diffusers, index["_class_name"], None)
    known = isinstance(named, type) and issubclass(named, DiffusionPipeline)
    if "scheduler" not in options:
        options = {**project_parts(model, index, **_hub(options)), **options}
    return _load_checked(named if known else DiffusionPipeline, model, index, options)


def load_part(model: str | Path, index: Mapping[str, Any], name: str, **options: Any) -> Any:
    """One network of such a folder or Hub id. Errors: as those of `load_stock`."""
    library, cls = index[name]
    net_cls = getattr(import_module(library), cls)
    return _load_checked(net_cls, model, index, {"subfolder": name, **options})


def _hub(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a loader's options those that its parts are looked up with."""
    return {"revision": options["revision"]} if options.get("revision") else {}


def _load_checked(
    cls: Any, model: str | Path, index: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    only = options.get("subfolder")  # one part, or all that are not handed over
    read = {k: v for k, v in index.items() if k not in options and only in (None, k)}
    if Path(model).exists():
        check_index(index, Path(model) / "model_index.json")
        check_weights(Path(model), read)
    check_on_paper(model, read, **_hub(options))
    try:
        # A bar of each encoder's weights would stand within the pipeline's.
        with no_pickles("pretrained_model_name_or_path"), without_bars("transformers"):
            return cls.from_pretrained(str(model), use_safetensors=True, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, KeyError, AttributeError, TypeError, SafetensorError) as err:
        raise ValueError(
            f"pretrained_model_name_or_path: expected a whole {index.get('_class_name')}, got "
            f"{str(model)!r}, which does not load ({type(err).__name__}: {one_line(err)})."
        ) from err
