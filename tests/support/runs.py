"""Tiny teachers on disk and trainers on them, shared by the tests that train for real."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stepdistill import TrainConfig, Tuning
from stepdistill.core.method import FIELDS, Scorer, Setting
from stepdistill.core.path import FlowPath, VPPath
from stepdistill.core.types import EASIER, MASK
from stepdistill.families.beside import fields_beside
from stepdistill.families.family import Family
from stepdistill.families.features import FeatureBlock, chosen_blocks
from stepdistill.families.registry import family_for, load_family, teacher_facts
from stepdistill.loading.source import ModelSource
from stepdistill.methods import METHODS
from stepdistill.rewards.vision import KIND, ConvFeatures
from stepdistill.storage.folders import write_folder
from stepdistill.testing.tiny import TINY, TINY_FAMILY
from stepdistill.testing.tiny_video import small_references
from stepdistill.trainers import DistillationTrainer, trainer_class
from stepdistill.training import trainer as training

# Of each kind of teacher one, for what is tested in every layout: eps, v and flow, prompts, labels.
THOROUGH = ("sd", "sd_v", "sd3", "dit")
# Of each kind of network one, for what no family has of its own: what each has is met by the
# matrix and by `stepdistill check`, which tests/families/test_families.py makes of all.
NETWORKS = ("sd", "sd3", "dit", "edm", "wan_i2v")
small_references()
_TEACHERS: dict[str, Path] = {}
_SHAPES: dict[str, tuple[int, ...]] = {}  # of a teacher's latents by its folder
_READ: dict[str, Family] = {}  # by its folder, as it was read


def teacher_dir(family: str, tmp_path_factory: Any) -> Path:
    """The saved tiny teacher of that name, built once a test process."""
    if family not in _TEACHERS:
        folder, pipeline = tmp_path_factory.mktemp("teachers") / family, TINY[family]()
        pipeline.save_pretrained(folder)
        _TEACHERS[family] = folder
        _SHAPES[str(folder)] = family_for(type(pipeline).__name__)(pipeline).sample_shape()
    return _TEACHERS[family]


def fingerprint(tensors: Mapping[str, Tensor], skip_adapters: bool = False) -> dict[str, str]:
    """name -> hash of the tensor's bytes."""
    return {
        name: hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, value in tensors.items()
        if not (skip_adapters and ".lora_" in name)
    }


def key_beside(family: type[Family]) -> tuple[str, ...]:
    """The keys of an item's images beside its prompt, where the family reads some."""
    return ("image",) if family.from_first_frame() else tuple(fields_beside(family))


class TinyData(Dataset[dict[str, Any]]):
    """Six items with every field a method may need."""

    def __init__(
        self,
        shape: tuple[int, ...],
        told: str,
        fields: tuple[str, ...],
        beside: str | Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.items = []
        for i in range(6):
            kinds: dict[str, dict[str, Any]] = {
                "label": {"label": i % 3},
                "prompt": {"prompt": f"thing {i % 3}"},
                "none": {},
            }
            item = kinds[told]
            for name in fields:
                item[name] = torch.randn(shape, generator=generator)
            pictures = (beside,) if isinstance(beside, str) else beside
            for key in (*pictures, *({EASIER} & {*fields})):
                # A video's start is as wide as the tiny ones.
                size = (1 if key == MASK else 3, 16, 32 if key == "image" else 16)
                drawn = torch.rand(size, generator=generator)
                item[key] = drawn if key == MASK else drawn * 2 - 1
            self.items.append(item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def _anywhere(family: str, layout: str) -> bool:
    return True


def _null_has_words(family: str, layout: str) -> bool:
    """Not SDXL, nor Stable Audio: their null prompt is zeros, from which cross-attention adapters
    get no gradient.

    A batch of two that happens to be null throughout would leave them still.
    """
    return family not in ("sdxl", "stable_audio")


def _made_to_be_seen(family: str, layout: str) -> bool:
    """Not sound: what judges these are pixels."""
    return TINY_FAMILY[family].output != "audios"


def _no_preconditioning(family: str, layout: str) -> bool:
    """An EDM network's output can't be read as a velocity."""
    return not family.startswith("edm")


def _two_with_prompts(family: str, layout: str) -> bool:
    """One UNet and one transformer are enough where only the decoded image is new."""
    return family in ("sd", "sd3")


def _two_adapters_with_prompts(family: str, layout: str) -> bool:
    """Likewise, where another network carries an adapter."""
    return layout == "lora" and _two_with_prompts(family, layout)


def _brightness(images: Tensor, by: object) -> Tensor:
    """A stand-in for CLIP that needs no weights."""
    return images.mean(dim=(1, 2, 3)).tanh()


def _darkness(images: Tensor, by: object) -> Tensor:
    """The other taste."""
    return -_brightness(images, by)


def _contrast(images: Tensor, by: object) -> Tensor:
    """Another that needs no weights, and that no two images have in common."""
    return images.flatten(1).std(dim=1)


def _pixel_distance(images: Tensor, by: Any) -> Tensor:
    """A stand-in for LPIPS that needs no weights."""
    return (images - by).square().mean(dim=(1, 2, 3))


def learned_network(folder: Path) -> Path:
    """A network of 16 px as `features train` makes them, untrained, in a new folder there."""
    facts = {"model_type": KIND, "size_px": 16, "width": 4, "mean": 0.4, "std": 0.3, "data": "none"}
    torch.manual_seed(0)
    net = ConvFeatures(16, 4).state_dict()
    write_folder(folder / "net", {"model": net}, {"config": facts})
    return folder / "net"


class PixelStandIn(nn.Module):
    """A stand-in for a pixel network that needs no weights: what its heads read are the pixels."""

    blocks = MappingProxyType(
        {"mid": FeatureBlock("map", 3, "map"), "tokens": FeatureBlock("tokens", 3, "tokens")}
    )

    def features(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return {
            name: images if block.layout == "map" else images.flatten(2).mT
            for name, block in chosen_blocks(names, self.blocks).items()
        }


def _has_null(family: str, layout: str) -> bool:
    """Not models without a null condition, which guidance has nothing to steer away from."""
    return TINY_FAMILY[family].has_null


def _told_the_end(family: str, layout: str) -> bool:
    """Copies of networks whose time embedder can be told where a jump ends."""
    return layout == "full" and TINY_FAMILY[family].supports_s and _two_with_prompts(family, layout)


def _w_embedding(family: str, layout: str) -> bool:
    served = TINY_FAMILY[family]
    return layout == "full" and served.supports_w and served.net_name == "unet"


@dataclass(frozen=True)
class MethodCase:
    """One method with options, the data it needs, and where it applies.

    gan_fields: what a data source of the discriminator's own has; none means that it has none.
    run: options of the run.
    steps: student steps in which every role is trained twice.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    fits: Callable[[str, str], bool] = _anywhere
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    gan_fields: tuple[str, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 2

    @property
    def one_step(self) -> int:
        """Student steps in which every role is trained: one, or those of all stages."""
        return 1 if self.steps == 2 else self.steps

    def unexpectedly_still(self, role: str, still: set[str]) -> set[str]:
        """Tensors that did not move though they should have.

        LoRA A has no gradient while B is zero: at step 1 only B moves, at step 2 both do, so all
        must have moved after two steps. Cross-attention keys of an unused branch do not exist here.
        """
        left = {name for name in still if not _never_moves(name)}
        if any(name.startswith(("high.", "low.")) for name in left):
            # Which of two experts a step asks is drawn: one that moved is enough, and its B.
            left = {name for name in left if "lora_A" not in name}
            return left if len({name.partition(".")[0] for name in left}) == 2 else set()
        return left


def _never_moves(name: str) -> bool:
    """Parameters that no loss can reach in these networks."""
    # Of Qwen-Image's last block, what only makes text tokens; no later block reads them.
    unread = (f"transformer_blocks.1.{part}" for part in ("txt_mlp", "attn.to_add_out"))
    return any(part in name for part in ("y_embedder", "embedding_table", *unread))


METHOD_CASES: dict[str, MethodCase] = {
    "scale_distill": MethodCase("scale_distill", {"num_steps": 2}, ("x0", "easier")),
    "scale_distill_images": MethodCase("scale_distill", {"target": "images"}, ("x0",)),
    "dmd2": MethodCase("dmd2", {"num_steps": 2, "critic_steps": 2}),
    "dmd": MethodCase("dmd", {"regression": "l2"}, ("x0", "noise")),
    "dmd2_gan": MethodCase(
        "dmd2", {"num_steps": 1, "critic_steps": 1, "gan": {"weight_g": 1e-2}}, ("x0",)
    ),
    "dmd2_two_sources": MethodCase(
        "dmd2",
        {"num_steps": 2, "critic_steps": 2, "gan": {"weight_g": 1e-2}},
        fits=_two_with_prompts,
        gan_fields=("x0",),
    ),
    "dmd2_r1": MethodCase(
        "dmd2",
        {
            "num_steps": 1,
            "critic_steps": 1,
            "gan": {"weight_g": 1e-2, "r1_weight": 0.1, "r1": "exact"},
        },
        ("x0",),
        _two_with_prompts,
    ),
    "dmd2_later": MethodCase(
        "dmd2",
        {
            "num_steps": 2,
            "critic_steps": 1,
            "guidance": 2.0,
            "ca_times": "below_step",
            "fake_toward_student": 0.02,
            "approach": {"share": 0.75, "updates": 4, "noisy_first": True},
        },
        (),
        _two_adapters_with_prompts,
    ),
    "f_distill": MethodCase(
        "f_distill", {"critic_steps": 1, "ratio_ema": 0.5, "gan": {"weight_g": 1e-2}}, ("x0",)
    ),
    # A step records, then the target is a node, then the teacher.
    "disback": MethodCase(
        "disback",
        {"critic_steps": 1, "nodes": 2, "record_updates": 1, "backtrack_updates": 1},
        steps=3,
    ),
    "sid": MethodCase("sid", {"num_steps": 2, "alpha": 1.2}),
    "sid_long_short": MethodCase(
        "sid",
        {"guidance": 2.0, "fake_guidance": "long_short", "null_probability": 0.5},
        (),
        _two_with_prompts,
    ),
    "sid_zero_cfg": MethodCase(
        "sid", {"guidance": 1.0, "fake_guidance": "zero_cfg"}, (), _two_with_prompts
    ),
    "tdm": MethodCase("tdm", {"num_steps": 2, "critic_steps": 2}),
    "ladd": MethodCase(
        "ladd",
        {"num_steps": 2, "noisiest_share": 0.5, "disc_steps": 2, "gan": {"mismatched": True}},
        ("x0",),
    ),
    "ladd_r1": MethodCase(
        "ladd",
        {"rollout": "simulate", "gan": {"time_mean": None, "r1": "features", "r1_weight": 1.0}},
        (),
        _two_with_prompts,
        gan_fields=("x0",),
    ),
    "add": MethodCase(
        "add",
        {"num_steps": 2, "guidance": 2.0},
        ("x0",),
        _made_to_be_seen,
        {"pixels": PixelStandIn()},
    ),
    "add_teacher": MethodCase(
        "add",
        {
            "distillation_weight": "sds",
            "clean_first": 1,
            "num_steps": 2,
            "gan": {
                "source": "teacher",
                "time_mean": 0.0,
                "same_times": True,
                "r1": "approximate",
                "r1_weight": 1.0,
            },
        },
        ("x0",),
        lambda family, layout: family == "sd3",
    ),
    "dmd2_pixels": MethodCase(
        "dmd2",
        {"critic_steps": 1, "gan": {"weight_g": 1e-2, "source": "pixels", "r1_weight": 0.1}},
        ("x0",),
        lambda family, layout: family == "sd3",
        {"pixels": PixelStandIn()},
    ),
    "meanflow_heads": MethodCase(
        "meanflow",
        {"num_steps": 2, "gan": {"weight_g": 0.5, "weight_d": 0.5, "source": "pixels"}},
        ("x0",),
        lambda family, layout: family == "sd3",
        {"pixels": PixelStandIn()},
    ),
    "scott_pixels": MethodCase(
        "scott",
        {"num_grid": 20, "solver_steps": 1, "gan": {"source": "pixels"}},
        ("x0",),
        lambda family, layout: family == "sd3",
        {"pixels": PixelStandIn()},
    ),
    "vsd": MethodCase(
        "vsd", {"guidance_range": (0.5, 4.0), "null_probability": 0.5}, (), _null_has_words
    ),
    "vsd_words": MethodCase(
        "vsd",
        {"guidance_range": (0.5, 4.0), "null_probability": 0.0},
        (),
        lambda family, layout: not _null_has_words(family, layout),
    ),
    "vsd_clip": MethodCase(
        "vsd",
        {"null_probability": 0.0, "clip": {"weight": 0.1, "tau": 1.0}},
        (),
        _two_with_prompts,
        {"clip": _brightness},
    ),
    "tscd": MethodCase(
        "tscd",
        {"target": "ema", "segments": (2, 1), "stage_starts": (0.5,), "noise_offset": 0.1},
        ("x0",),
    ),
    "tscd_gan": MethodCase(
        "tscd", {"gan": {"weight_g": 0.1}, "gan_scale": (0.1, 0.1, 1.0, 1.0)}, ("x0",)
    ),
    "pcm": MethodCase("pcm", {"gan": {"weight_g": 0.1}}, ("x0",)),
    "tcd_told": MethodCase(
        "tscd", {"segments": (1,), "sampler": "tcd", "end_input": True}, ("x0",), _told_the_end
    ),
    "ctm": MethodCase("ctm", {"solver_steps": 2}, ("x0",)),
    "ctm_gan": MethodCase(
        "ctm", {"solver_steps": 1, "gan": {"weight_g": 0.1}}, ("x0",), _two_with_prompts
    ),
    "ctm_two_sources": MethodCase(
        "ctm",
        {"solver_steps": 1, "gan": {"weight_g": 0.1}},
        ("x0",),
        lambda family, layout: family == "sd3",
        gan_fields=("x0",),
    ),
    "ctm_lpips": MethodCase(
        "ctm",
        {"solver_steps": 1, "lpips": {}},
        ("x0",),
        lambda family, layout: family == "sd",
        {"lpips": _pixel_distance},
    ),
    "ctm_bootstrap": MethodCase(
        "ctm",
        {
            "guidance_range": (1.0, 1.0),
            "solver": "heun",
            "solver_steps": 2,
            "end_input": True,
            "denoising": 1.0,
            "bootstrap": True,
        },
        ("x0",),
        _told_the_end,
    ),
    "lcm": MethodCase("consistency", {"target": "self"}, ("x0",)),
    "cd": MethodCase("consistency", {"target": "ema"}, ("x0",)),
    "cd_lpips": MethodCase(
        "consistency",
        {"loss": "lpips", "target": "self"},
        ("x0",),
        lambda family, layout: family == "sd",
        {"lpips": _pixel_distance},
    ),
    "ect": MethodCase(
        "consistency",
        {"solver": "data", "target": "self", "loss": "norm", "shrink": {}},
        ("x0",),
    ),
    "tcm": MethodCase(
        "consistency",
        {"solver": "data", "target": "self", "shrink": {"truncate_at": 1.0}},
        ("x0",),
        _two_with_prompts,
    ),
    "meanflow": MethodCase("meanflow", {"num_steps": 2}, ("x0",)),
    "meanflow_general": MethodCase(
        "meanflow", {"r": "general", "same_share": 0.0}, ("x0",), _told_the_end
    ),
    "meanflow_jvp": MethodCase(
        "meanflow", {"estimator": "jvp"}, ("x0",), lambda family, layout: family == "sd3"
    ),
    "rcm": MethodCase(
        "meanflow",
        {"r": "zero", "sampler": "renoise", "matching": 1.0, "critic_steps": 1},
        ("x0",),
        _two_with_prompts,
    ),
    "sana_sprint": MethodCase(
        "meanflow",
        {
            "r": "zero",
            "sampler": "renoise",
            "gan": {"weight_g": 0.5, "weight_d": 0.5, "source": "teacher", "mismatched": True},
        },
        ("x0",),
        _two_with_prompts,
    ),
    "boot": MethodCase("boot", {"num_grid": 10}),
    "boot_heun": MethodCase(
        "boot",
        {"solver": "heun", "weight": "rate", "told_times": (0.5, 1.0)},
        (),
        _two_with_prompts,
    ),
    "scott": MethodCase("scott", {"num_grid": 20, "eta": 0.5, "solver_steps": 2}, ("x0",)),
    "feedback": MethodCase(
        "feedback",
        {"num_steps": 2},
        fits=_made_to_be_seen,
        scorers={"brightness": _brightness},
        run={"rewards": [{"kind": "brightness", "weight": 1.0, "tau": 2.0}]},
    ),
    "feedback_last": MethodCase(
        "feedback",
        {"num_steps": 2, "sampler": "ode", "trained_step": "last", "anchor_on": "v"},
        (),
        _two_with_prompts,
        {"brightness": _brightness, "darkness": _darkness},
        run={
            "rewards": [{"kind": "brightness", "weight": 1.0}, {"kind": "darkness", "weight": 0.0}],
            "reward_crop": 2,
        },
    ),
    "feedback_data": MethodCase(
        "feedback",
        {"num_steps": 2, "rollout": "data", "anchor": 0.0},
        ("x0",),
        lambda family, layout: family == "sd3",
        {"brightness": _brightness},
        run={"rewards": [{"kind": "brightness", "weight": 1.0, "every": 2}]},
    ),
    "lcm_reward": MethodCase(
        "consistency",
        {"target": "self"},
        ("x0",),
        _two_with_prompts,
        {"brightness": _brightness},
        run={"rewards": [{"kind": "brightness", "weight": 1.0}]},
    ),
    "lcm_w": MethodCase(
        "consistency", {"target": "ema", "embed_guidance": True}, ("x0",), _w_embedding
    ),
    "lora_guidance": MethodCase(
        "lora_guidance", {"guidance": 5.0, "states": "trajectory"}, (), _has_null
    ),
    "lora_guidance_w": MethodCase(
        "lora_guidance",
        {"guidance": 5.0, "embed_guidance": True, "guidance_range": (2.0, 8.0)},
        ("x0",),
        _w_embedding,
    ),
    "progressive": MethodCase(
        "lora_guidance",
        {"guidance": 5.0, "guidance_stage": False, "num_steps": (8, 4)},
        ("x0",),
        _two_with_prompts,
    ),
    "online_preference": MethodCase(
        "online_preference",
        {"num_steps": 2, "reward": {"kind": "contrast"}},
        scorers={"contrast": _contrast},
    ),
    "online_preference_all": MethodCase(
        "online_preference",
        {"num_steps": 3, "reward": {"kind": "contrast"}, "trained_steps": "all"},
        (),
        _two_with_prompts,
        {"contrast": _contrast},
    ),
    "preference": MethodCase("preference", {"num_steps": 3}, ("x0", "rejected")),
    "preference_hinge": MethodCase(
        "preference",
        {"num_steps": 2, "loss": "hinge", "weight": "snr", "prior_weight": 0.2},
        ("x0", "rejected"),
        lambda family, layout: family == "sd",
    ),
    "reflow": MethodCase("reflow", {"stage": "reflow"}, ("x0", "noise")),
    "reflow_raw": MethodCase(
        "reflow", {"stage": "reflow", "setup": "raw"}, ("x0", "noise"), _no_preconditioning
    ),
    "reflow_raw_distill": MethodCase(
        "reflow",
        {"stage": "distill", "setup": "raw"},
        ("x0", "noise"),
        lambda family, layout: family == "pixart_sigma",
    ),
    "reflow_distill": MethodCase("reflow", {"stage": "distill"}, ("x0", "noise")),
    "reflow_lpips": MethodCase(
        "reflow",
        {"stage": "distill", "loss": "lpips"},
        ("x0", "noise"),
        _two_with_prompts,
        {"lpips": _pixel_distance},
    ),
    "rfpp": MethodCase(
        "rfpp",
        {"perceptual": "inverse_t"},
        ("x0", "noise"),
        _two_with_prompts,
        {"lpips": _pixel_distance},
    ),
    "rfpp_huber": MethodCase("rfpp", {"perceptual": "none"}, ("x0", "noise")),
    "slimflow": MethodCase("slimflow", {"flip": "sample"}, ("x0", "noise")),
    "slimflow_distill": MethodCase(
        "slimflow", {"stage": "distill"}, ("x0", "noise"), _two_with_prompts
    ),
}
# A method without a case of its own has one by its facts.
METHOD_CASES |= {
    name: MethodCase(name, {}, tuple(sorted(FIELDS[cls.data] - {"cond"})))
    for name, cls in METHODS.items()
    if name not in {case.method for case in METHOD_CASES.values()}
}
# Some are for models that read an image beside the prompt alone.
METHOD_CASES |= {
    name: replace(case, fits=lambda family, layout: TINY_FAMILY[family].edits_image())
    for name, case in METHOD_CASES.items()
    if METHODS[case.method].needs_image
}
# Methods and teachers that can't meet for that.
UNFIT_IMAGELESS = {
    (method, family)
    for method, cls in METHODS.items()
    for family, adapter in TINY_FAMILY.items()
    if cls.needs_image and not adapter.edits_image()
}
# Two experts have no block that heads of a discriminator could read.
TWO_EXPERTS = {
    name: family
    for name, family in TINY_FAMILY.items()
    if family.variants.get(name, {}).get("boundary_ratio")
}


def needs_blocks(family: Family) -> None:
    """Skip the test of a family without blocks that heads could read."""
    if not family.feature_blocks():
        pytest.skip("two experts have no block in common")


def _has_heads(case: MethodCase) -> bool:
    cls = METHODS[case.method]
    table = Setting(VPPath.from_betas(torch.linspace(1e-4, 0.02, 1000)), "v")
    setting = table if case.method == "preference" else Setting(FlowPath(), "flow", 3.0)
    roles = cls(cls.Config(**case.options), setting).roles()
    return any(role.source == "head" and not role.reads for role in roles.values())


def _without_two_experts(fits: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    return lambda family, layout: family not in TWO_EXPERTS and fits(family, layout)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    WITH_HEADS = {name for name, case in METHOD_CASES.items() if _has_heads(case)}
METHOD_CASES |= {
    name: replace(METHOD_CASES[name], fits=_without_two_experts(METHOD_CASES[name].fits))
    for name in WITH_HEADS
}
# These judge pixels in every case, and sound has none.
OF_PIXELS = ("add", "feedback")
# Of each method its first case.
FIRST = tuple({case.method: name for name, case in reversed(METHOD_CASES.items())}.values())


def unguided(spec: MethodCase) -> dict[str, Any]:
    """The case's options for a model without a null condition: nothing to guide away from."""
    return {**spec.options, **METHODS[spec.method].options_at(1.0)}


def build_trainer(
    case: str,
    teacher: Path | ModelSource,
    layout: str,
    output_dir: Path,
    alpha: float | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    dataset: Any = None,
    gan_dataset: Any = None,
    method_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> DistillationTrainer:
    """A trainer of the case's few steps on a saved tiny teacher; datasets: in place of TinyData;
    method_options: over the case's."""
    spec, more = METHOD_CASES[case], method_options or {}
    args = TrainConfig(
        output_dir=str(output_dir),
        **{
            "tuning": Tuning(student=layout, fake=layout, rank=2, alpha=alpha),
            "max_train_steps": spec.steps,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "disable_progress_bar": True,
            **spec.run,
            **options,
        },
    )
    data, facts = dataset, teacher_facts(teacher)
    if data is None:
        shape = _latent_shape(teacher)
        data = TinyData(shape, facts.conditioning, spec.fields, key_beside(facts.family))
    if gan_dataset is None and spec.gan_fields:
        told = (facts.conditioning, spec.gan_fields, key_beside(facts.family))
        gan_dataset = TinyData(_latent_shape(teacher), *told, seed=1)
    load = training.load_family
    if load is load_family and args.frozen_dtype == torch.float32 and str(teacher) in _SHAPES:
        load = _read_once
    with patch.object(training, "load_family", load):
        return trainer_class(spec.method)(
            teacher if isinstance(teacher, ModelSource) else str(teacher),
            args,
            data,
            method=spec.method,
            method_config={**(spec.options if facts.has_null else unguided(spec)), **more},
            scorers=spec.scorers if scorers is None else scorers,
            gan_dataset=gan_dataset,
        )


def _read_once(model: str | ModelSource) -> Family:
    """load_family, whose files are read once a process: the denoiser and the scheduler are copied,
    what stays as it is in a run (text encoders, autoencoders, tokenisers) is shared."""
    source = ModelSource.of(model)
    folder = str(source.model)
    if source != ModelSource.of(folder):
        return load_family(source)
    read = _READ.get(folder)
    parts = {} if read is None else read.pipeline.components
    shared = [part for part in parts.values() if isinstance(part, nn.Module)]
    if read is None or any(next(part.parameters()).device.type != "cpu" for part in shared):
        read = _READ[folder] = load_family(source)  # or a run has moved them
    pipeline = copy.copy(read.pipeline)
    fresh = {
        name: copy.deepcopy(getattr(pipeline, name)) for name in (*read.net_parts, "scheduler")
    }
    pipeline.register_modules(**fresh)
    return type(read)(pipeline)


def _latent_shape(teacher: Path | ModelSource) -> tuple[int, ...]:
    key = str(teacher)
    if key not in _SHAPES:
        _SHAPES[key] = load_family(teacher).sample_shape()
    return _SHAPES[key]
