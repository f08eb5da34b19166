"""Teachers kept in one .safetensors file, read by Diffusers' own converters.

Such a file holds weights alone. Its architecture, scheduler and tokenizers come from a pipeline
folder (or Hub id) of the same kind, `single_file_config`; a file with the denoiser only takes the
other weights from there too. Without one, the base that Diffusers recognises is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config
from safetensors import SafetensorError, safe_open

from stepdistill.loading.place import is_single_file
from stepdistill.loading.read_whole import check_all_read
from stepdistill.loading.safe_files import load_stock, no_pickles

# Where the parts beside the denoiser stand in a whole checkpoint: SD, SDXL, SD3 and later.
_OTHER_PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")


def config_source(model: str | Path, config: str | None) -> str:
    """The folder or Hub id that holds model_index.json and the scheduler of `model`.

    Errors: ValueError for a config beside a pipeline folder, or a file that is no safetensors.
    """
    if not is_single_file(model):
        if config is not None:
            raise ValueError(
                f"single_file_config: expected none with the pipeline {str(model)!r}, got "
                f"{config!r}. It goes with a single .safetensors file."
            )
        return str(model)
    return config if config is not None else _recognised(Path(model))


def _header(path: Path, metadata: dict[str, str] | None = None) -> dict[str, torch.Tensor]:
    """name -> empty tensor of that shape: no weight is read. Errors: ValueError when malformed.

    Args: metadata: filled with the file's own.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if metadata is not None:
                metadata.update(file.metadata() or {})
            return {
                name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                for name in file.keys()  # noqa: SIM118 (not a mapping)
            }
    except SafetensorError as err:
        raise ValueError(
            f"pretrained_model_name_or_path: expected a whole safetensors file, got {path}: {err}."
        ) from err


def is_whole(path: str | Path) -> bool:
    """Whether the file holds the parts beside the denoiser too."""
    return _holds_parts(_header(Path(path)))


def _holds_parts(header: Iterable[str]) -> bool:
    return any(name.startswith(_OTHER_PARTS) for name in header)


def schedule_marks(path: str | Path) -> dict[str, Any]:
    """What the file says of its noise schedule, as a scheduler's configuration; it knows its
    weights better than the pipeline that describes their architecture.

    The marks are ComfyUI's empty tensors v_pred and ztsnr, and ModelSpec's prediction_type.
    """
    metadata = dict[str, str]()
    names = _header(Path(path), metadata).keys()
    said = "v" if "v_pred" in names else metadata.get("modelspec.prediction_type", "")
    kind = {"v": "v_prediction", "epsilon": "epsilon"}.get(said)
    return {
        **({"prediction_type": kind} if kind else {}),
        **({"rescale_betas_zero_snr": True} if "ztsnr" in names else {}),
    }


def _recognised(path: Path) -> str:
    """The Hub id of the base that Diffusers takes a checkpoint for."""
    repo: str = fetch_diffusers_config(_header(path))["pretrained_model_name_or_path"]
    try:
        DiffusionPipeline.load_config(repo)
    except OSError as err:
        raise ValueError(
            f"single_file_config: expected the configuration of {path.name}, got none here, and "
            f"{repo!r}, which the file looks like, cannot be fetched. Name a pipeline folder of "
            "the same architecture with --single_file_config."
        ) from err
    return repo


def load_single_file(
    path: str | Path,
    index: dict[str, Any],
    config: str,
    net_name: str,
    torch_dtype: torch.dtype,
    **parts: Any,
) -> Any:
    """The stock pipeline of a single file.

    Args: index: model_index.json of `config`. net_name: the denoiser's component. parts: components
        not to load.
    Errors: ValueError where the file has not the weights that the configuration describes, or has
        more than are read.
    """
    header = _header(Path(path))
    check_all_read(Path(path), header, index, config)
    try:
        if _holds_parts(header):
            cls: Any = getattr(diffusers, index["_class_name"])
            with no_pickles("single_file_config"):  # the parts that the file lacks
                return cls.from_single_file(str(path), config=config, dtype=torch_dtype, **parts)
        if net_name not in parts:
            net_cls: Any = getattr(diffusers, index[net_name][1])
            parts[net_name] = net_cls.from_single_file(
                str(path), config=config, subfolder=net_name, dtype=torch_dtype
            )
    except (SingleFileComponentError, ValueError, KeyError, RuntimeError, IndexError) as err:
        raise ValueError(
            f"pretrained_model_name_or_path: expected a checkpoint of the architecture in "
            f"{config!r}, got {path}: {str(err)[:300]}. Name another --single_file_config."
        ) from err
    return load_stock(config, index, dtype=torch_dtype, **parts)
