"""Merge LoRAs into a loaded pipeline: every entry of a file, to the value it says, or none.

W <- W + sum_i scale_i * (alpha_i / rank_i) * B_i A_i, in the dtype of W, by Diffusers' own loader
(load_lora_weights, fuse_lora, unload_lora_weights) or by PEFT for a folder that PEFT wrote. These
drop what they can't place with a line in a log at most; here that is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin
from huggingface_hub import hf_hub_download
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_FILE
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepdistill.loading.safe_files import no_pickles, read_tensors
from stepdistill.loading.teacher_lora import LoraSource, parse_lora
from stepdistill.loading.traced import traced, used
from stepdistill.storage.files import one_line

_UP = {  # of each name of the down factor
    "lora_A": "lora_B",
    "lora_down": "lora_up",
    "lora.down": "lora.up",
    "lora_linear_layer.down": "lora_linear_layer.up",
}
_DOWN = re.compile(
    rf"(?P<stem>.+[._])(?P<side>{'|'.join(map(re.escape, _UP))})(?P<rest>(\.\w+)?\.weight)"
)
# Wan in Kohya's layout, whose converter in Diffusers asks for the alpha of every module.
_ASKS_ALPHAS = "lora_unet_blocks_"
# What a zero in it adds: nothing.
_ADDED = re.compile(r"\.(diff(_\w+)?|lora_B\.\w+|(lora_|lora\.)up\.\w+)$")


@torch.no_grad()
def merge_loras(pipeline: Any, texts: Sequence[str], net_names: Sequence[str]) -> None:
    """Merge the LoRAs into the pipeline's weights, in order; no adapter is left behind.

    Args: texts: see `parse_lora`. net_names: of each the component of its denoiser.
    Errors: ValueError for a pipeline without a LoRA loader, or a file that fits no module of it.
    """
    for lora, net_name in zip([parse_lora(text) for text in texts], net_names, strict=True):
        if lora.weight_name is None:
            with no_pickles("teacher_lora"):
                _merge_peft(pipeline, net_name, lora)
        elif isinstance(pipeline, LoraBaseMixin):
            with no_pickles("teacher_lora"):
                _merge_stock(pipeline, net_name, lora)
        else:
            raise ValueError(
                f"teacher_lora: expected a pipeline with load_lora_weights, got "
                f"{type(pipeline).__name__}, to which Diffusers gives none. Use an adapter saved "
                "by PEFT (adapter_config.json), or merge it into the base beforehand."
            )


def _merge_stock(pipeline: Any, net_name: str, lora: LoraSource) -> None:
    name, file = "teacher", lora.file or Path(hf_hub_download(lora.place, str(lora.weight_name)))
    tensors, scaled_by_header = read_tensors(file), LORA_ADAPTER_METADATA_KEY in _header(file)
    try:
        tensors_alone = tensors if scaled_by_header else _without_alphas(tensors)
        where: dict[str, Any] = {}
        if scaled_by_header:
            where |= {"weight_name": file.name, "use_safetensors": True}
        given = str(file.parent) if scaled_by_header else tensors_alone
        where |= {"load_into_transformer_2": True} if net_name == "transformer_2" else {}
        with _converting(pipeline) as conversions:
            pipeline.load_lora_weights(given, adapter_name=name, **where)
        converted, options = conversions[-1]
        holders = [part for part, names in pipeline.get_list_adapters().items() if name in names]
        if not holders:  # the stock loader only logs it
            raise ValueError("no key of it names a module there")
        nets = [getattr(pipeline, part) for part in holders]
        unread = _not_loaded(converted, nets, name)
        traces = traced(tensors_alone)
        again = pipeline.lora_state_dict(dict(traces), **options)[0]
        read = used(traces, (value for key, value in again.items() if key not in unread))
        check_all_used({key: value for key, value in tensors_alone.items() if key not in read})
    except IndexError as err:  # Diffusers' loader takes the rank of the first module it finds
        why = "all its keys for one part (denoiser or a text encoder) name no module there"
        raise _misfit(pipeline, lora, why) from err
    except (ValueError, KeyError, RuntimeError, SafetensorError) as err:
        raise _misfit(pipeline, lora, err) from err
    # An alpha of each module is lost on the way, so all are in the weights.
    if not scaled_by_header:
        for layer in (x for net in nets for x in net.modules() if isinstance(x, BaseTunerLayer)):
            layer.lora_alpha[name] = layer.r[name]
    pipeline.set_adapters([name], [lora.scale])
    pipeline.fuse_lora(components=holders, adapter_names=[name])
    pipeline.unload_lora_weights()


def _header(file: Path) -> Mapping[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def _without_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same LoRA with each alpha / rank in the up factor, so that its scale is 1; alphas are
    left out, or are the rank where the converter asks for them.

    Errors: ValueError for a factor without the other, an alpha without either.
    """
    left, scaled = dict(tensors), dict[str, Tensor]()
    for down, parts in [(key, match) for key in tensors if (match := _DOWN.fullmatch(key))]:
        up = f"{parts['stem']}{_UP[parts['side']]}{parts['rest']}"
        alpha = left.pop(f"{parts['stem'].rstrip('._')}.alpha", None)
        if up not in left:
            raise ValueError(f"{down} stands without {up}")
        scaled[down], scaled[up] = left.pop(down), left.pop(up)
        if alpha is not None:
            rank = scaled[down].shape[0]
            scale = float(alpha) / rank
            scaled[up] = scaled[up] if scale == 1.0 else scaled[up].float() * scale
            if down.startswith(_ASKS_ALPHAS):
                scaled[f"{parts['stem'].rstrip('._')}.alpha"] = torch.tensor(float(rank))
    return scaled | left


@contextmanager
def _converting(pipeline: Any) -> Iterator[list[tuple[dict[str, Tensor], dict[str, Any]]]]:
    """Within: what the pipeline's LoRA converter returns, and the options it was called with."""
    convert, conversions = pipeline.lora_state_dict, list[tuple[dict[str, Tensor], Any]]()

    def noted(given: Any, **options: Any) -> Any:
        result = convert(given, **options)
        options.pop("weight_name", None)
        conversions.append((dict(result[0]), options))
        return result

    pipeline.lora_state_dict = noted
    try:
        yield conversions
    finally:
        del pipeline.lora_state_dict


def _not_loaded(state: Mapping[str, Tensor], nets: Sequence[nn.Module], name: str) -> set[str]:
    """Names of tensors of a converted LoRA that are in no adapter `name` of the networks.

    The loaders rename once more, so tensors are told by size of their values.
    """
    loaded = [
        param.detach()
        for net in nets
        for key, param in net.named_parameters()
        if name in key.split(".")
    ]
    left = Counter(_values_of(param) for param in loaded)
    dtypes = {param.dtype for param in loaded}
    unread = set()
    for key, value in state.items():
        there = next((v for v in (_values_of(value.to(d)) for d in dtypes) if left[v]), None)
        if there is None:
            unread.add(key)
        else:
            left[there] -= 1
    return unread


def _values_of(value: Tensor) -> tuple[str, str]:
    """Sums of the magnitudes and squares, which zeros around it (a wider input) don't change."""
    x = value.detach().double()
    return f"{float(x.abs().sum()):.9e}", f"{float(x.square().sum()):.9e}"


def check_all_used(left: Mapping[str, Tensor]) -> None:
    """Errors: ValueError for entries of a file that a loader leaves out, but for those that add
    zero to something."""
    odd = sorted(key for key, value in left.items() if not (_ADDED.search(key) and not value.any()))
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(
            f"{', '.join(odd[:3])}{more} would be left out (of no module here, or of a kind that "
            "Diffusers does not read)"
        )


def _merge_peft(pipeline: Any, net_name: str, lora: LoraSource) -> None:
    net: nn.Module = getattr(pipeline, net_name)
    try:
        adapted: Any = PeftModel.from_pretrained(net, lora.place)
        # Loaded once more, as this says what from_pretrained keeps to itself.
        unexpected = adapted.load_adapter(lora.place, "default").unexpected_keys
        unread = {key.replace(".default", "") for key in unexpected}  # PEFT's names in the network
        tensors = read_tensors(Path(lora.place) / PEFT_FILE)
        check_all_used({k: v for k, v in tensors.items() if {k, f"{k}.weight"} & unread})
    except (ValueError, KeyError, RuntimeError, SafetensorError) as err:
        raise _misfit(pipeline, lora, err) from err
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.scale_layer(lora.scale)
    pipeline.register_modules(**{net_name: adapted.merge_and_unload()})


def _misfit(pipeline: Any, lora: LoraSource, why: object) -> ValueError:
    file = f"{lora.place}/{lora.weight_name}" if lora.weight_name else lora.place
    return ValueError(
        f"teacher_lora: expected a LoRA of {type(pipeline).__name__}, got {file}: {one_line(why)}."
    )
