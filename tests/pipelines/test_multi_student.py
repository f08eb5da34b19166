"""The routed pipeline over stock classes: saved, loaded by Diffusers, routed and called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support.runs import teacher_dir
from torch import nn

from stepdistill.families.registry import load_family
from stepdistill.loading.project_code import project_module
from stepdistill.testing.tiny import TINY_FAMILY

CODE: Any = project_module("multi_student")
ALL = [n for n, f in TINY_FAMILY.items() if f.conditioning == "prompt" and not f.needs_images()]
PROMPTS = ["a cat", "a dog runs away", "a cat"]


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path_factory, monkeypatch) -> None:
    """Diffusers copies a pipeline's file to a cache; parallel tests must not share it."""
    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


def two(family: Any, prompts: list[str]) -> Any:
    """A pipeline of two students, each nearest to one prompt; the first is the base itself."""
    name, layer = next(
        (name, layer)
        for name, layer in family.net.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(("to_q", "to_out.0"))
    )
    shapes = {name: [[2, layer.in_features], [layer.out_features, 2]]}
    centroids = CODE.embed(family.pipeline, prompts).tolist()
    students = CODE.StudentAdapters(
        family.net_name, shapes, 2, centroids=centroids, offsets=[0.0, 0.0], call={}
    )
    for half in (students.down, students.up):
        half[name.replace(".", "/")][1].normal_(generator=torch.Generator().manual_seed(0))
    return CODE.routed(family.pipeline, students)


@pytest.mark.full
@pytest.mark.parametrize("family", ALL)
def test_it_is_saved_loaded_and_routed(family, tmp_path, tmp_path_factory) -> None:
    loaded = load_family(teacher_dir(family, tmp_path_factory))
    pipe = two(loaded, PROMPTS[:2])
    alone, together = CODE.embed(pipe, PROMPTS[:1]), CODE.embed(pipe, PROMPTS)
    assert torch.allclose(alone[0], together[0], atol=1e-6)
    pipe.save_pretrained(tmp_path / "out")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(stock).__name__ == type(loaded.pipeline).__name__
    assert stock.students_of(PROMPTS) == [0, 1, 0]
    parts = {name for name, part in loaded.pipeline.components.items() if part is not None}
    assert {n for n, part in stock.components.items() if part is not None} == {*parts, "students"}


def test_the_base_is_left_alone_and_a_student_is_its_adapter(tmp_path_factory) -> None:
    family = load_family(teacher_dir("sd", tmp_path_factory))
    pipe = two(family, PROMPTS[:2])
    pipe.set_progress_bar_config(disable=True)

    def image(source: Any, **more: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        return source("a cat", generator=generator, **options, **more).images

    before = image(family.pipeline)
    assert torch.equal(image(pipe), before)  # student 0 adds nothing
    moved = image(pipe, student=1)
    assert float((moved - before).abs().max()) > 1e-3
    assert torch.equal(image(family.pipeline), before)
    name = next(iter(pipe.students.config.modules))
    key, layer = name.replace(".", "/"), family.net.get_submodule(name)
    with torch.no_grad():
        layer.weight += pipe.students.up[key][1] @ pipe.students.down[key][1]
        merged = image(family.pipeline)
        layer.weight -= pipe.students.up[key][1] @ pipe.students.down[key][1]
    assert torch.allclose(merged, moved, atol=1e-4)
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        image(pipe, student=2)
    with pytest.raises(ValueError, match="expected one to choose a student by"):
        pipe(prompt_embeds=torch.zeros(1, 77, 8))
