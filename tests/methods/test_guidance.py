"""What a method's class says of its guidance: options, range, and the teacher it ends at."""

from __future__ import annotations

import pytest
import torch

from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, VPPath
from stepdistill.methods import METHODS

VP = VPPath.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dmd2", {"guidance": 8.0}, 8.0),
        ("dmd2", {"gan": {"weight_g": 1e-3}, "gan_alone": True}, 1.0),  # it ends at the images
        ("f_distill", {}, 1.75),
        ("dmd", {"guidance": 3.0}, 3.0),
        ("vsd", {}, 1.0),  # guided alike, teacher and fake agree at the plain teacher
        ("vsd", {"guidance_range": (0.5, 4.0)}, 1.0),
        ("consistency", {"guidance_range": (4.0, 16.0)}, 10.0),
        ("consistency", {"embed_guidance": True, "inference_guidance": 8.5}, 8.5),
        ("pcm", {"guidance_range": (3.0, 5.0)}, 4.0),
        ("tscd", {"guidance_range": (1.0, 1.0)}, 1.0),
        ("pcm", {"guidance_range": (1.0, 1.0), "inference_guidance": 7.5}, 7.5),
        ("tscd", {"guidance_range": (1.0, 1.0), "inference_guidance": 3.0}, 3.0),
        ("ctm", {"guidance_range": (3.0, 5.0)}, 4.0),
        ("lora_guidance", {"guidance": 7.5}, 7.5),
        (
            "lora_guidance",
            {"embed_guidance": True, "guidance_range": (2.0, 14.0), "guidance": 5.0},
            5.0,
        ),
        ("meanflow", {"guidance": 5.0}, 5.0),
        ("boot", {"guidance": 5.0}, 5.0),
        ("scott", {"guidance_range": (2.0, 6.0)}, 4.0),
        ("add", {"guidance": 2.5}, 2.5),
        ("scale_distill", {"guidance": 9.0}, 9.0),
        ("ladd", {}, 1.0),
        ("reflow", {}, 1.0),
        ("rfpp", {}, 1.0),
        ("slimflow", {"stage": "distill", "guidance": 2.0}, 2.0),
    ],
)
def test_the_teacher_a_student_ends_at(name: str, options: dict, expected: float) -> None:
    cls = METHODS[name]
    path = FlowPath() if name in ("reflow", "rfpp", "slimflow") else VP
    method = cls(cls.Config(**options), Setting(path, "flow" if path is not VP else "v"))
    assert method.teacher_guidance == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_that_guides_is_named(name: str) -> None:
    cls = METHODS[name]
    guiding = {f for f in cls.Config.model_fields if "guidance" in f.split("_")}
    # Read with the others, a stage's name, and which network is guided.
    told = {"inference_guidance", "guidance_stage", "fake_guidance"}
    assert guiding - told == set(cls.guidance_options)


@pytest.mark.parametrize("name", [n for n in sorted(METHODS) if METHODS[n].guidance_options])
def test_options_hold_the_guidance_at_one_number(name: str) -> None:
    cls = METHODS[name]
    assert cls.guidance_of(cls.Config(**cls.options_at(3.0))) == (3.0, 3.0)


def test_a_range_overrules_the_number_it_stands_beside() -> None:
    cls = METHODS["vsd"]
    assert cls.guidance_of(cls.Config(guidance_range=(0.5, 4.0))) == (0.5, 4.0)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dmd2", {"guidance": 8.0}, (8.0, 1.0, 1.0, False)),
        ("dmd2", {"trained_step": "last", "num_steps": 4}, (1.75, 1.0, 1.0, True)),
        ("vsd", {}, (4.5, 4.5, 1.0, False)),
        ("vsd", {"guidance_range": (0.5, 4.0)}, (2.25, 2.25, 1.0, False)),
    ],
)
def test_how_the_fake_is_called(name: str, options: dict, expected: tuple) -> None:
    cls = METHODS[name]
    fit = cls(cls.Config(**options), Setting(VP, "v")).fake_fit
    assert fit is not None
    assert (fit.teacher, fit.fake, fit.fitted, fit.last_step) == expected


def test_only_score_methods_have_a_fake() -> None:
    for name, info in METHODS.items():
        path = FlowPath() if name in ("reflow", "rfpp", "slimflow") else VP
        method = info(info.Config(), Setting(path, "flow" if path is not VP else "v"))
        assert (method.fake_fit is not None) == ("fake" in method.roles())
