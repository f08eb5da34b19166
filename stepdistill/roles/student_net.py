"""Students of another architecture than the teacher's: the stock denoiser class, other sizes.

The user gives the denoiser's config keys to change (Tuning.student_config). Such a student starts
at the stock class's own random initialisation: no weight is copied, even where shapes agree, for
half a teacher is no better start than none. What it is called with must stay the teacher's.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from stepdistill.families.family import Family
from stepdistill.families.registry import family_for
from stepdistill.loading.source import ModelSource

# What a family hands the network and reads from it: latents, sizes, conditioning, the time's scale.
_INTERFACE = (
    *("in_channels", "out_channels", "sample_size", "patch_size", "all_patch_size"),
    *("joint_attention_dim", "caption_channels", "cap_feat_dim", "pooled_projection_dim"),
    *("encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type", "addition_time_embed_dim"),
    *("projection_class_embeddings_input_dim", "class_embed_type", "num_class_embeds"),
    *("num_embeds_ada_norm", "use_additional_conditions", "guidance_embeds", "time_cond_proj_dim"),
    *("timestep_scale", "t_scale", "text_dim", "image_dim"),
)


def merged_config(
    cls: Any, base: Mapping[str, Any], given: Mapping[str, Any], shared: Sequence[str] = ()
) -> dict[str, Any]:
    """The teacher's denoiser config with the student's changes, as `cls.from_config` takes it.

    Args: given: changes, or a whole config.json (its `_` entries say of which class). shared: keys
        that go with networks beside it (Family.shared_config).
    Errors: ValueError for another class, an unknown key, or a changed key of the interface.
    """
    where = "tuning.student_config"
    class_name = given.get("_class_name", cls.__name__)
    if class_name != cls.__name__:
        raise ValueError(
            f"{where}: expected a config of {cls.__name__}, the teacher's denoiser class, got one "
            f"of {class_name}."
        )
    changes = {key: value for key, value in given.items() if not key.startswith("_")}
    known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.4)
        raise ValueError(
            f"{where}: expected config keys of {cls.__name__}, got {unknown}. "
            f"Nearest: {near or 'none'}."
        )
    # A cross-attention behind a caption projection is the network's own affair.
    fixed = [
        *_INTERFACE,
        *shared,
        *(() if "caption_channels" in base else ("cross_attention_dim",)),
    ]
    moved = {
        key: (base.get(key), changes[key])
        for key in fixed
        if key in changes and _plain(changes[key]) != _plain(base.get(key))
    }
    if moved:
        listed = "; ".join(f"{key} {was!r}, given {now!r}" for key, (was, now) in moved.items())
        raise ValueError(
            f"{where}: expected the teacher's latents and conditioning, got other values of "
            f"{listed}. Leave these keys out: teacher and student share prompts and latents."
        )
    options = {key: value for key, value in base.items() if not key.startswith("_")}
    return {**options, **changes}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def check_student_config(
    given: Mapping[str, Any], model: str | Path | ModelSource | Family
) -> None:
    """Whether the model's denoiser class builds such a student; reads configs, never weights.

    Errors: ValueError, see `merged_config`, and for a config the class itself refuses.
    """
    counted = len(model.net_parts if isinstance(model, Family) else _nets(ModelSource.of(model)))
    if counted > 1:
        raise ValueError(
            f"tuning.student_config: expected a model of one denoiser, got {counted} that share "
            "the times. Train one expert a run: --expert high, then low."
        )
    if isinstance(model, Family):
        cls: Any = type(model.net)
        base: Mapping[str, Any] = model.config
        shared = model.shared_config
    else:
        source = ModelSource.of(model)
        family = family_for(source.pipeline_class)
        net_name, shared = family.net_name, family.shared_config
        library, name = source.index[net_name]
        cls = getattr(import_module(library), name)
        base = cls.load_config(source.described_at, subfolder=net_name, **source.hub)
    config = merged_config(cls, base, given, shared)
    try:
        with init_empty_weights():
            cls.from_config(config)
    except Exception as err:  # whatever a stock class raises at sizes that do not go together
        raise ValueError(
            f"tuning.student_config: expected sizes that {cls.__name__} can be built with, got "
            f"{dict(given)}: {err}"
        ) from err


def _nets(source: ModelSource) -> tuple[str, ...]:
    one = (source.expert,) if source.expert != "both" else ()
    return one or family_for(source.pipeline_class).nets_in(source.index)


def new_student(family: Family, given: Mapping[str, Any]) -> nn.Module:
    """A fresh denoiser with that config at its own random initialisation (torch's generator)."""
    cls: Any = type(family.net)
    config = merged_config(cls, family.config, given, family.shared_config)
    net: nn.Module = cls.from_config(config)
    stock: Any = family.net
    return net.to(stock.device).eval()
