"""What a method's file asks of a model that can't: settled and told; a user's own is refused.

Teachers are tiny: a size matters to recipes alone (tests/config/test_recipe_files.py).
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import PixelStandIn, TinyData, key_beside, teacher_dir
from torch import Tensor

from stepdistill.config.files import method_class, method_config, parse_run_config
from stepdistill.config.run import RunConfig
from stepdistill.core.method import FIELDS
from stepdistill.families.registry import teacher_facts
from stepdistill.storage.bundled import bundled_names
from stepdistill.testing.tiny import TINY_FAMILY
from stepdistill.training.checks import method_fits, roles_fit, run_fits

# Refused of these models whatever is settled, by the methods' files and what the error says.
TEXT = "needs items with a prompt"  # a loss that reads text, of a model that reads none
REFUSED: dict[str, tuple[Collection[str], str]] = {
    **dict.fromkeys(["snoopi", "swiftbrush_v2"], ({"dit", "edm", "edm_plain", "unet2d"}, TEXT)),
    "lora_guidance": (
        {"edm", "edm_plain", "unet2d"},
        "the teacher is its own student|num_steps: expected at most 9, got 50",
    ),
}
IMAGELESS = {name for name, family in TINY_FAMILY.items() if not family.edits_image()}
REFUSED["scale_distill"] = (IMAGELESS, "expected a model that reads an image beside the prompt")
# One of each kind of contradiction, and a file that none of these models contradicts.
SAMPLE = [
    *(("lcm", name) for name in ("sd", "sd3", "flux", "flux_schnell", "dit")),
    *(("progressive", "unet2d"), ("lora_guidance", "unet2d"), ("snoopi", "dit")),
    *(("instaflow_reflow", "edm"), ("slimflow_reflow", "edm"), ("dmd2", "sd3")),
]
ONE_EACH = {family: name for name, family in reversed(TINY_FAMILY.items())}.values()
MODELS = [*ONE_EACH, "flux_schnell", "edm_plain", "sd_v"]
REST = [(file, name) for name in MODELS for file in bundled_names("methods")]


def run_of(file: str, teacher: Path, *flags: str) -> tuple[RunConfig, list[str]]:
    argv = ["--config", file, "--pretrained_model_name_or_path", str(teacher), *flags]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = parse_run_config(argv)
    return run, [str(one.message) for one in told]


def check(run: RunConfig, teacher: Path) -> None:
    """What a trainer says before it loads a weight."""
    cls, facts = method_class(run.method), teacher_facts(teacher)
    config = method_config(run.method, run.method_config)
    fields = ({"x0", "noise"} | FIELDS[cls.data]) - {"cond"}
    beside = key_beside(facts.family)
    data = TinyData((4, 4, 4), facts.conditioning, tuple(sorted(fields)), beside)
    kinds = {name: spec.kind for name, spec in cls(config, facts.setting).scorers().items()}
    kinds |= {one.kind: "" for one in run.rewards}
    judges = {n: PixelStandIn() if kind == "features" else _alike for n, kind in kinds.items()}
    method_fits(cls, config, facts, data, judges, rewards=run.rewards)
    run_fits(cls, config, run, facts)
    roles_fit(cls, config, run, facts)


def _alike(images: Tensor, by: object) -> Tensor:
    return images.flatten(1).mean(1)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        *SAMPLE,
        *(pytest.param(*one, marks=pytest.mark.full) for one in REST if one not in SAMPLE),
    ],
)
def test_every_method_s_file_suits_every_family(file: str, name: str, tmp_path_factory) -> None:
    models, message = REFUSED.get(file, (set(), ""))
    teacher = teacher_dir(name, tmp_path_factory)
    if name in models:
        with pytest.raises(ValueError, match=message):
            check(run_of(file, teacher)[0], teacher)
    else:
        check(run_of(file, teacher)[0], teacher)


@pytest.mark.parametrize(
    ("file", "name", "line"),
    [
        (
            "lcm",
            "sd3",
            "method_config: embed_guidance False in place of True, inference_guidance 4.0 in place "
            "of 8.5, as this model can't be told its guidance.",
        ),
        (
            "lcm",
            "flux",
            "method_config: inference_guidance 3.5 in place of 8.5, as the embedding learns no "
            "other.",
        ),
        (
            "progressive",
            "unet2d",
            "method_config: guidance_stage False in place of True, stage_starts None in place of "
            "(0.2, 0.4, 0.6, 0.8), as there is no guidance to fold in.",
        ),
        (
            "instaflow_reflow",
            "edm",
            "method_config: setup wrapped in place of raw, as the preconditioning of an EDM-type "
            "model is no velocity.",
        ),
    ],
)
def test_what_a_model_can_t_is_settled_and_told(
    file: str, name: str, line: str, tmp_path_factory
) -> None:
    assert line in run_of(file, teacher_dir(name, tmp_path_factory))[1]


def test_a_run_s_first_lines_say_it(tmp_path_factory) -> None:
    teacher = str(teacher_dir("sd3", tmp_path_factory))
    argv = ["--config", "lcm", "--pretrained_model_name_or_path", teacher]
    reasons = parse_run_config(argv, by_size=True).reasons
    assert any(one.startswith("embed_guidance False in place of True") for one in reasons)


def test_what_the_user_says_is_refused_before_a_weight_is_loaded(
    tmp_path_factory, tmp_path
) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    file = tmp_path / "mine.yaml"
    file.write_text(
        yaml.safe_dump({"method": "lcm", "method_config": {"embed_guidance": True}})
        + "  inference_guidance: 4.0\n"
    )
    flag = "--method_config.embed_guidance"
    for run, told in (run_of("lcm", teacher, flag), run_of(str(file), teacher)):
        assert run.method_config["embed_guidance"] is True
        assert not any("embed_guidance False" in line for line in told)
        with pytest.raises(
            ValueError, match=r"expected a model that can be told its guidance, got"
        ):
            check(run, teacher)


def test_a_checkpoint_without_a_null_is_not_guided(tmp_path_factory, tmp_path: Path) -> None:
    """klein, step-distilled: its family has a null, and its model file states guidance 4."""
    teacher = shutil.copytree(teacher_dir("flux2", tmp_path_factory), tmp_path / "klein")
    index: dict[str, Any] = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    run, told = run_of("dmd2", teacher)
    assert run.method_config["guidance"] == 1.0
    assert "guidance 1.0 in place of 8.0, as this model has no null condition" in told[0]
    check(run, teacher)


def test_plan_settles_the_models_that_it_knows_without_files() -> None:
    run, told = run_of("lcm", Path("sd35_large"))
    assert run.method_config["embed_guidance"] is False
    assert run.method_config["guidance_range"] == (4.0, 4.0)
    assert any("states of sd3" in line for line in told)
