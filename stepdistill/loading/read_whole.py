"""A single file is read whole: what it holds is used by a part, known to be harmless, or refused.

Scales of 8-bit weights, marks of another kind of model, or a side network would else be dropped by
Diffusers' converters without a word, and the teacher be another than the file says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from stepdistill.loading.paper import check_numbers, on_meta, part_config
from stepdistill.loading.safe_files import read_tensors
from stepdistill.loading.traced import origin, traced
from stepdistill.storage.files import one_line

_BUFFERS = "(sqrt_|log_)?(recip_|recipm1_|one_minus_)?(betas|alphas_cumprod(_prev)?)"
# What no part reads, and why that is right.
HARMLESS = {
    r"model_ema\..*": "an average for training on; the plain weights are the ones published",
    r".*position_ids": "0, 1, 2, ...: made anew",
    rf"{_BUFFERS}|posterior_\w+|lvlb_weights|(model\.)?logvar|denoiser\.sigmas": "the training "
    "code's own tables; the scheduler's configuration says the schedule",
    r"scale_factor|global_step|state_dict": "bookkeeping; the autoencoder's configuration scales",
    r"first_stage_model\.(loss|discriminator)\..*": "how the autoencoder was trained",
    r"(.*\.)?logit_scale": "of contrastive training; no text encoder here reads it",
    r"v_pred|ztsnr": "marks, read by schedule_marks",
}
_HARMLESS = re.compile("|".join(f"(?:{rule})" for rule in HARMLESS))

_TEXT = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.\d|text_encoders\.\w+)\.(?P<kind>transformer|model)\."
)
_OPEN_CLIP = re.compile(
    r"(positional_embedding|token_embedding\.weight|ln_final\.(weight|bias)|text_projection"
    r"|transformer\.resblocks\.(?P<layer>\d+)\.(attn\.in_proj_(weight|bias)"
    r"|(attn\.out_proj|ln_[12]|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)))"
)


def check_all_read(
    path: Path, header: Mapping[str, Tensor], index: Mapping[str, Any], config: str
) -> None:
    """Errors: ValueError for entries of the file that no part of the pipeline takes.

    Args: header: name -> empty tensor on the meta device. config: the folder or Hub id of `index`.
    """
    left = {name for name in header if not _HARMLESS.fullmatch(name)}
    parts = dict(_networks(index, config))
    for name, (cls, net_config, net) in parts.items():
        if cls.__name__ in SINGLE_FILE_LOADABLE_CLASSES:
            left -= _converted(path, header, cls, net_config, net)
        elif name.startswith("text_encoder"):
            left -= set(_text(left, net))
    if not any("T5" in cls.__name__ for cls, _, _ in parts.values()):
        left = {name for name in left if not name.startswith("text_encoders.t5xxl.")}  # left out
    if left:
        odd, more = sorted(left), f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ValueError(
            f"pretrained_model_name_or_path: expected a file of plain weights of the parts in "
            f"{config!r}, got {path} with {', '.join(odd[:3])}{more}, which nothing here reads "
            "(scales of 8-bit weights, marks, other networks). Convert it to a plain checkpoint, "
            "or name another --single_file_config."
        )


def _networks(
    index: Mapping[str, Any], config: str
) -> Iterator[tuple[str, tuple[type[Any], Any, nn.Module]]]:
    """(part, (class, configuration, network on the meta device)) of what may hold weights."""
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list | tuple) or None in entry:
            continue
        cls = getattr(import_module(entry[0]), entry[1], None) if "." not in entry[0] else None
        if name in ("safety_checker", "image_encoder") or not isinstance(cls, type):
            continue
        if not issubclass(cls, nn.Module):
            continue
        stock, where = entry[0] == "diffusers", f"{config}/{name}/config.json"
        part = part_config(cls, stock, config, name, {})
        check_numbers(part, where)
        yield name, (cls, part, on_meta(cls, stock, part, where))


def _converted(
    path: Path, header: Mapping[str, Tensor], cls: type[Any], config: Any, net: nn.Module
) -> set[str]:
    """The entries that Diffusers' converter makes weights of the network of."""
    names = net.state_dict().keys()
    if names <= header.keys():  # in Diffusers' own layout already
        return set(names)
    convert = SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]["checkpoint_mapping_fn"]
    try:
        try:
            made = convert(config=config, checkpoint=traced(header))
        except Exception:  # it may look at values, which the meta device has none of
            made = convert(config=config, checkpoint=traced(read_tensors(path)))
    except Exception as err:  # whatever a converter stumbles over
        raise ValueError(
            f"pretrained_model_name_or_path: expected a checkpoint of {cls.__name__}, got {path}, "
            f"which Diffusers can't convert ({type(err).__name__}: {one_line(err)}). Name another "
            "--single_file_config."
        ) from err
    return set[str]().union(*(origin(value) for name, value in made.items() if name in names))


def _text(names: set[str], net: Any) -> Iterator[str]:
    """The entries of a text encoder: Transformers' names, or OpenCLIP's, behind a prefix."""
    text_names = {name.removeprefix("text_model.") for name in net.state_dict()}
    layers = getattr(net.config, "num_hidden_layers", 0)
    for name in names:
        prefix = _TEXT.match(name)
        if prefix is None:
            continue
        rest = name[prefix.end() :]
        if prefix["kind"] == "transformer" and rest.removeprefix("text_model.") in text_names:
            yield name
        known = _OPEN_CLIP.fullmatch(rest) if prefix["kind"] == "model" else None
        # Stable Diffusion 2 reads the layer before the last, and its configuration ends there.
        if known is not None and int(known["layer"] or 0) <= layers:
            yield name
