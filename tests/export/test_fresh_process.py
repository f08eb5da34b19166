"""The model card's own code, run in a process that knows Diffusers alone, makes our image.

By default of each kind of sampler one; of all that is exported, the saved scheduler's image is
compared as it is written.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.processes import run, run_without_package
from support.runs import build_trainer, teacher_dir

from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.times import uniform_grid
from stepdistill.export.lora import export_lora
from stepdistill.export.pipeline import export_pipeline
from stepdistill.export.run import sample_export
from stepdistill.sampling import to_pil

CASES = {
    "sd_eps_renoise_late": ("sd", "dmd2", "full", SamplerSpec((0.4, 0.2), "renoise")),
    "sd_v_one": ("sd_v", "dmd2", "full", SamplerSpec((1.0,), "renoise")),
    "sd_v_tcd": ("sd_v", "dmd2", "lora", SamplerSpec((1.0, 0.76, 0.5), "tcd", gamma=0.3)),
    "sd_w": ("sd", "lcm_w", "full", SamplerSpec(uniform_grid(2), w=6.5, boundary_scale=10.0)),
    "sd_guided": ("sd_v", "dmd2", "full", SamplerSpec(uniform_grid(2), "ode", guidance=3.0)),
    "sd_velocity": ("sd_v", "reflow_raw", "lora", SamplerSpec(uniform_grid(4), "ode")),
    "sd3_shifted": ("sd3", "dmd2", "lora", SamplerSpec(uniform_grid(4, 3.0), "renoise")),
    "sd3_given_sigmas": ("sd3", "dmd2", "full", SamplerSpec((0.9, 0.5, 0.1), "ode")),
    "sdxl_two": ("sdxl", "dmd2", "full", SamplerSpec(uniform_grid(2), "renoise")),
    "sd3_anchored": ("sd3", "dmd2", "lora", SamplerSpec(uniform_grid(3), "anchored", heun=True)),
    "sd_v_heun": ("sd_v", "dmd2", "full", SamplerSpec(uniform_grid(2), "ode", heun=True)),
    "dit_two": ("dit", "dmd2", "full", SamplerSpec(uniform_grid(2), "renoise")),
}
LORA_CASES = ("sd_v_tcd", "sd_velocity", "sd3_shifted", "sd3_anchored")
DEFAULT = ("sd_v_tcd", "sd_v_tcd_lora", "sd3_given_sigmas", "dit_two")
CARDS = [
    pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.full])
    for name in (*CASES, *(f"{name}_lora" for name in LORA_CASES))
]

RUNNER = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
for folder, code in json.loads(sys.argv[1]).items():
    torch.manual_seed(0)
    try:
        exec(code, {})
        os.replace("image.png", folder + ".png")
    except Exception:
        traceback.print_exc()
foreign = [name for name in sys.modules if name.split(".")[0] in ("stepdistill", "support")]
assert not foreign, foreign
"""


def nudge(trainer: Any) -> None:
    """Push every student weight off its start, or the teacher's image would pass."""
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        noise = torch.randn(param.shape, generator=generator)
        param.data += 0.05 * noise * (param.data.std() + 0.1)


def expected_image(trainer: Any, spec: SamplerSpec) -> Image.Image:
    """The in-memory sampler's image from torch's global generator at seed 0."""
    family = trainer.family
    prompts = [0] if family.conditioning == "label" else ["a prompt"]
    shape = (1, *family.sample_shape())
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        latents = sample_x0(
            trainer.bank["student"],
            spec,
            torch.randn(shape),
            family.encode(prompts),
            family.null(1),
            fresh_noise=lambda _step: torch.randn(shape),
        )
        return to_pil(family.images(latents))[0]


@pytest.fixture(scope="module")
def runs(
    request: Any, tmp_path_factory: Any
) -> tuple[Path, dict[str, Image.Image], dict[str, Any], str]:
    """All cases of this run of the tests, cards in ONE process: (folder, images, records, log)."""
    root = tmp_path_factory.mktemp("cards")
    here = [item for item in request.session.items if item.path == request.path]
    tested = {item.callspec.params["name"] for item in here if hasattr(item, "callspec")}
    images, codes, records = {}, {}, {}
    for name, (family, method, layout, spec) in CASES.items():
        if name not in tested:
            continue
        teacher = teacher_dir(family, tmp_path_factory)
        options = {"alpha": 3.0} if layout == "lora" else {}
        trainer = build_trainer(method, teacher, layout, root / "runs" / name, **options)
        nudge(trainer)
        facts = {"model": str(teacher), "method": method, "step": 1, "seed": 0}
        images[name] = expected_image(trainer, spec)
        export_pipeline(trainer.family, trainer.bank, spec, root / name, facts)
        if f"{name}_lora" in tested:
            images[f"{name}_lora"] = images[name]
            export_lora(
                trainer.family, trainer.bank, spec, root / f"{name}_lora", facts, dtype="float32"
            )
    for name in images:
        card = (root / name / "README.md").read_text()
        codes[name] = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]  # type: ignore[index]
        records[name] = json.loads((root / name / "distillation.json").read_text())
    runner = partial(run_without_package, RUNNER, json.dumps(codes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(root / "mods"))
        done = run(runner, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, images, records, done.stderr


@pytest.mark.parametrize("name", CARDS)
def test_card_makes_our_image(name: str, runs: Any) -> None:
    root, images, _, log = runs
    made = root / f"{name}.png"
    assert made.exists(), log[-3000:]
    theirs = np.asarray(Image.open(made)).astype(int)
    ours = np.asarray(images[name]).astype(int)
    assert np.abs(theirs - ours).max() <= 1  # one level of 8-bit rounding


@pytest.mark.full
def test_images_differ_between_cases(runs: Any) -> None:
    """Or the comparison would be of one grey image with itself."""
    _, images, _, _ = runs
    seen = [np.asarray(images[name]).astype(int) for name in CASES if name in images]
    assert len(seen) > 8
    apart = [np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]]
    assert min(apart) > 5


@pytest.mark.full
def test_records_say_what_to_type(runs: Any) -> None:
    """Of the cases that this run of the tests made."""
    _, _, records, _ = runs
    plain = ("sd_velocity", "sd3_shifted", "dit_two", "sd_guided")
    expected = {
        **dict.fromkeys(plain, ("call", {})),
        "sd_eps_renoise_late": ("call", {"timesteps": [399, 199]}),
        "sd_v_tcd": ("call", {"eta": 0.3, "timesteps": [999, 759, 499]}),
        "sd_w": ("guidance_scale", 7.5),
        "sd3_given_sigmas": ("call", {"sigmas": [0.9, 0.5, 0.1]}),
    }
    made = expected.keys() & records.keys()
    assert made
    for name in made:
        entry, value = expected[name]
        assert records[name][entry] == value, name
    if "sd_guided" in made:
        assert records["sd_guided"]["guidance_scale"] == 3.0
    if "sd3_shifted" in made:
        assert records["sd3_shifted"]["load_without"] == ["text_encoder_3", "tokenizer_3"]


def test_a_lora_is_not_sampled_as_a_pipeline(tmp_path) -> None:
    record = {"num_inference_steps": 1, "load_without": [], "conditioning": "prompt", "call": {}}
    (tmp_path / "distillation.json").write_text(json.dumps({**record, "lora": {"file": "x"}}))
    with pytest.raises(ValueError, match=r"expected an exported pipeline, got .*, a LoRA"):
        sample_export(tmp_path, ["a cat"], tmp_path / "out")
