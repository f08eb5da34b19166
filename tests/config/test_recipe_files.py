"""Recipes of configs/recipes, a model's own guidance, and the recipe that a small model gets."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from support.runs import PixelStandIn, teacher_dir

from stepdistill.cache.precompute import cache_run
from stepdistill.config.files import method_class, method_config, parse_run_config
from stepdistill.config.layers import for_network, layers_of, merge, merged, recipe_files
from stepdistill.config.method_names import resolve_method
from stepdistill.config.planned import bundled
from stepdistill.config.run import RunConfig
from stepdistill.core.method import ScorerSpec, Setting
from stepdistill.core.path import FlowPath, VPPath
from stepdistill.evaluation.options import Options as Evaluation
from stepdistill.evaluation.run import evaluate
from stepdistill.families.registry import FAMILIES, load_family
from stepdistill.families.size import size_fits
from stepdistill.methods import METHODS
from stepdistill.monitoring.own_validation import PROMISED_SHARE, Grid
from stepdistill.pairs.teacher import make_pairs
from stepdistill.planning.recipes import (
    CARDS,
    forecast_of,
    known,
    known_forecast,
    listed,
    settings_hash,
    sized,
    verdict,
)
from stepdistill.planning.recipes import (
    run_of as run_at_size,
)
from stepdistill.storage.bundled import bundled_names
from stepdistill.testing.tiny import TINY
from stepdistill.trainers import train_run
from stepdistill.training.sources import open_dataset

RECIPES = recipe_files()
ABOUT = {name: layers[-1].recipe for name, layers in RECIPES.items()}
X = ["--pretrained_model_name_or_path", "x"]
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
VP, FLOW = Setting(VPPath.from_betas(BETAS)), Setting(FlowPath(), "flow", 3.0)


def written(path: Path, **values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def run_of(*argv: str, **options: Any) -> RunConfig:
    return parse_run_config([*argv, *X], **options)


# ------------------------------------------------------------------------------------ recipes
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_block_says(name: str) -> None:
    about, run = ABOUT[name], run_of("--recipe", name)
    assert about is not None, name
    cls, config = method_class(run.method), method_config(run.method, run.method_config)
    flow = about.family in ("sd3", "flux", "qwen_image", "z_image", "wan", "wan_i2v")
    method: Any = cls(config, FLOW if flow else VP)
    assert about.data == ("images" if about.family == "wan_i2v" else cls.data)
    served = about.steps or [method.sampler().num_steps]
    assert all(method.sampler(n).num_steps == n for n in served)
    assert method.sampler().num_steps in served
    assert about.family in ("", *FAMILIES)
    assert about.model in ("any", *bundled())
    assert (about.model == "any") == (about.size == "small")
    assert run.recipe == name


def test_files_lie_over_a_recipe_and_flags_over_them(tmp_path: Path) -> None:
    plain = run_of("--recipe", "sdxl-dmd2-lora-4step")
    told = run_of("--config", "dmd2", "dmd2_lora", "sdxl")
    assert {**told.model_dump(), "recipe": "sdxl-dmd2-lora-4step"} == plain.model_dump()
    file = written(tmp_path / "a.yaml", learning_rate=3e-5, seed=5)
    over = run_of("--config", file, "--recipe", "sdxl-dmd2-lora-4step", "--seed", "7")
    assert (over.learning_rate, over.seed, over.tuning.rank) == (3e-5, 7, 64)
    mine = written(tmp_path / "b.yaml", recipe="sdxl-dmd2-lora-4step", learning_rate=3e-5)
    named = run_of("--config", "sdxl-dmd2-lora-4step", "--learning_rate", "3e-5")
    assert run_of("--config", mine).model_dump() == named.model_dump()


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--recipe: .*got 'sdxl-dmd2'. Nearest: \['sdxl-dmd2-"):
        run_of("--recipe", "sdxl-dmd2")
    with pytest.raises(ValueError, match="expected a file with a block recipe"):
        run_of("--recipe", written(tmp_path / "a.yaml", method="dmd2"))
    odd = {"about": "a", "base": [], "steps": [1], "data": "tapes"}
    with pytest.raises(ValueError, match=r"expected a block recipe .* got data"):
        run_of("--recipe", written(tmp_path / "b.yaml", method="dmd2", recipe=odd))
    path = tmp_path / "c.yaml"
    around = {"about": "a", "base": [str(path)], "steps": [1], "data": "prompts"}
    with pytest.raises(ValueError, match="at most 5 deep, got one in itself"):
        run_of("--recipe", written(path, method="dmd2", recipe=around))
    with pytest.raises(ValueError, match=r"got sdxl-dmd2-1step, which is several.*1step/start'"):
        run_of("--recipe", "sdxl-dmd2-1step")
    with pytest.raises(ValueError, match=r"one of the trainings \['start', 'dmd2'\] of .* 'end'"):
        run_of("--recipe", "sdxl-dmd2-1step/end")
    part = {"about": "b", "base": [], "steps": [1], "data": "prompts", "options": {}}
    late = {"one": {**part, "student_of": "two"}, "two": part}
    several = {"about": "a", "base": [], "steps": [1], "data": "prompts", "trainings": late}
    with pytest.raises(ValueError, match=r"one.student_of: expected a training before it, .*two"):
        run_of("--recipe", written(tmp_path / "d.yaml", recipe=several))


def test_every_method_has_a_recipe_for_small_models() -> None:
    small = {n: a.called for n, a in ABOUT.items() if a and a.size == "small"}
    plain = [merged(RECIPES[name])["method"] for name, called in small.items() if not called]
    assert sorted(plain) == sorted(METHODS)
    for name, called in small.items():  # what the name stands for is what the recipe says
        method, stands_for = resolve_method(called) if called else ("", {})
        values = merged(RECIPES[name])
        assert not called or values["method"] == method
        assert stands_for.items() <= values.get("method_config", {}).items()


# ----------------------------------------------------------------------------------- guidance
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("dmd2", "sd15"), {"guidance": 1.75}),
        (("sd15", "dmd2"), {"guidance": 1.75}),
        (("dmd2", "sdxl"), {"guidance": 8.0}),
        (("f_distill", "sdxl"), {"guidance": 8.0}),  # that of its trainer's method
        (("dmd2", "flux"), {"guidance": 3.5}),
        (("lcm_lora", "sdxl"), {"guidance_range": (4.0, 16.0)}),
        (("lcm_lora", "flux"), {"guidance_range": (3.5, 3.5)}),
        (("pcm", "sdxl"), {"guidance_range": (7.0, 8.0)}),
        (("cd", "sd15"), {"guidance_range": (1.0, 1.0)}),  # the method's own law: none
        (("snoopi", "sd15"), {"guidance_range": (0.5, 4.0), "guidance": 4.5}),  # random
        (("lcm", "unet2d"), {"guidance_range": (1.0, 1.0), "embed_guidance": False}),
        (("slimflow_distill", "flux"), {"guidance": 1.0}),  # the model is a straight student
    ],
    ids=" ".join,
)
def test_a_model_s_guidance_wins_over_a_method_s_file(files, expected) -> None:
    run = run_of("--config", *files)
    config = method_config(run.method, run.method_config)
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_file_of_one_s_own_and_a_flag_win_over_both(tmp_path: Path) -> None:
    mine = written(tmp_path / "a.yaml", method_config={"guidance": 3.0})
    for argv, expected in (
        (["--config", "dmd2", "sd15", mine], 3.0),
        (["--config", "dmd2", mine, "sd15"], 3.0),
        (["--config", "dmd2", "sd15", "--method_config.guidance", "2.5"], 2.5),
        (["--config", "dmd2"], 8.0),
    ):
        assert run_of(*argv).method_config["guidance"] == expected


def test_every_model_file_states_guidance_of_a_method_or_any() -> None:
    for name in bundled_names("models"):
        (layer,) = layers_of(name)
        assert {*layer.model.guidance} <= {*METHODS, "any"}
        assert "resolution" not in layer.values  # the model's own
        assert layer.model.guidance or name == "small"
        assert (layer.model.family or name) in (*FAMILIES, "small")


def told_of(argv: list[str], **options: Any) -> tuple[RunConfig, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = parse_run_config(argv, **options)
    return run, [str(one.message) for one in said]


def test_a_teacher_s_family_settles_it_once(tmp_path_factory) -> None:
    """Where no model file is named: told, unless a flag says it."""
    teacher = ["--pretrained_model_name_or_path", str(teacher_dir("sd", tmp_path_factory))]
    run, said = told_of(["--config", "dmd2", *teacher])
    assert run.method_config["guidance"] == 1.75
    (line,) = said
    assert "guidance 1.75 in place of 8.0, as configs/models/sd15.yaml states of sd" in line
    run, said = told_of(["--config", "dmd2", *teacher, "--method_config.guidance", "3"])
    assert (run.method_config["guidance"], said) == (3.0, [])
    assert told_of(["--config", "dmd2", "sd15", *teacher])[1] == []
    _, (line,) = told_of(["--recipe", "sdxl-dmd2-lora-4step", *teacher])
    assert "sdxl is for models of family sdxl, the teacher is of sd" in line


def test_the_family_of_a_teacher_on_the_hub_settles_it_too(monkeypatch) -> None:
    asked = []

    def index(name: str, **_: Any) -> dict[str, Any]:
        asked.append(name)
        return {"_class_name": "StableDiffusionPipeline"}

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", index)
    teacher = ["--config", "dmd2", "--pretrained_model_name_or_path", "me/a-fine-tune"]
    run, said = told_of(teacher, by_size=True)  # train says it among its reasons
    line = run.reasons[-1]
    assert said == []
    assert (run.method_config["guidance"], asked) == (1.75, ["me/a-fine-tune"])
    assert "as configs/models/sd15.yaml states of sd" in line
    asked.clear()
    assert told_of(teacher)[0].method_config["guidance"] == 8.0  # a command that loads no teacher
    assert not asked


def test_a_small_model_gets_its_recipe_and_is_told(tmp_path_factory) -> None:
    teacher = ["--pretrained_model_name_or_path", str(teacher_dir("sd", tmp_path_factory))]
    run, said = told_of(["--method", "dmd2", *teacher, "--seed", "3"], by_size=True)
    assert (run.learning_rate, run.seed, run.tuning.student) == (1e-4, 3, "full")
    assert run.method_config["guidance"] == 1.0
    assert said == []  # it stands among what a run says at its start
    assert run.reasons[0] == "flags seed"
    assert run.reasons[1].startswith("recipe small-dmd2, as the denoiser has 0.0")
    for written, name in (("rcm", "rcm"), ("RCM", "rcm"), ("scm", "meanflow"), ("lcm", "lcm")):
        run, _ = told_of(["--method", written, *teacher], by_size=True)
        assert run.reasons[-1].startswith(f"recipe small-{name}, as the denoiser")
    run, said = told_of(["--config", "lcm_lora", "sd15", *teacher], by_size=True)
    assert (run.learning_rate, said) == (1e-4, [])
    assert run.reasons == ["files lcm_lora, sd15"]
    assert told_of(["--method", "vsd", *teacher])[0].learning_rate == 1e-5  # plan, cache


@pytest.mark.parametrize("named", [["--method", "tscd"], ["--recipe", "small-tscd"]])
def test_a_recipe_s_words_on_networks_of_a_kind_are_followed_and_told(
    named, tmp_path_factory
) -> None:
    """Of the kind alone; a flag lies over them."""
    said = "loss huber, as the network answers eps"
    for family, loss in (("sd", "huber"), ("sd_v", "l2")):
        teacher = ["--pretrained_model_name_or_path", str(teacher_dir(family, tmp_path_factory))]
        run, _ = told_of([*named, *teacher], by_size=True)
        assert (run.method_config["loss"], said in run.reasons) == (loss, loss == "huber")
        run, _ = told_of([*named, *teacher, "--method_config.loss", "l1"], by_size=True)
        assert run.method_config["loss"] == "l1"
        assert said not in run.reasons


def test_a_recipe_of_one_s_own_may_have_words_on_kinds(tmp_path, tmp_path_factory) -> None:
    teacher = ["--pretrained_model_name_or_path", str(teacher_dir("sd", tmp_path_factory))]
    block = {"about": "a", "base": ["small"], "steps": [1], "data": "prompts"}
    words = {"eps": {"learning_rate": 0.5, "tuning": {"rank": 3}}, "v": {"learning_rate": 0.25}}
    mine = {"recipe": {**block, "by_prediction": words}, "method": "dmd2", "learning_rate": 1.0}
    run, _ = told_of(["--recipe", written(tmp_path / "a.yaml", **mine), *teacher], by_size=True)
    assert (run.learning_rate, run.tuning.rank) == (0.5, 3)
    assert "learning_rate 0.5, rank 3, as the network answers eps" in run.reasons
    odd = {**mine, "recipe": {**block, "by_prediction": {"epsilon": {}}}}
    with pytest.raises(ValueError, match=r"by_prediction\.epsilon.*'x0', 'eps', 'v' or 'flow'"):
        run_of("--recipe", written(tmp_path / "b.yaml", **odd))


@pytest.mark.parametrize(
    ("name", "kind"), [(n, kind) for n, a in ABOUT.items() if a for kind in a.by_prediction]
)
def test_a_recipe_s_words_on_kinds_are_options(name, kind) -> None:
    values = merged(for_network(RECIPES[name], kind))
    RunConfig(**{**values, "pretrained_model_name_or_path": "x"})
    method_config(values["method"], values["method_config"])
    assert values != merged(RECIPES[name])


@pytest.mark.parametrize("name", sorted(a for m in METHODS.values() for a in m.aliases))
def test_what_a_user_s_name_stands_for_lies_over_a_small_model_s_recipe(
    name, tmp_path_factory
) -> None:
    teacher = ["--pretrained_model_name_or_path", str(teacher_dir("sd_v", tmp_path_factory))]
    run, _ = told_of(["--method", name, *teacher], by_size=True)
    (cls,) = (m for m in METHODS.values() if name in m.aliases)
    config = cls.Config(**run.method_config)
    for key, value in cls.aliases[name].items():
        meant = getattr(cls.Config(**{**run.method_config, key: value}), key)
        assert getattr(config, key) == meant, key


def test_a_user_s_flag_lies_over_the_name(tmp_path_factory) -> None:
    teacher = ["--pretrained_model_name_or_path", str(teacher_dir("sd_v", tmp_path_factory))]
    run, _ = told_of(["--method", "ect", *teacher, "--method_config.target", "ema"], by_size=True)
    assert (run.method_config["solver"], run.method_config["target"]) == ("data", "ema")


# --------------------------------------------------------------------------------- real sizes
def test_above_nine_tenths_of_a_card_is_tight() -> None:
    assert [verdict(share * 12e9, 12e9) for share in (0.9, 0.91, 1.0, 1.01)] == [
        *("fits", "tight", "tight", "no")
    ]


def test_the_index_is_of_the_recipes_as_they_stand() -> None:
    """Its figures themselves are computed again below; here that no file has changed since."""
    settings = {name: entry["settings"] for name, entry in known().items()}
    assert settings == {name: settings_hash(layers) for name, layers in sized().items()}


# `recipes --refresh` writes the index anew.
@pytest.mark.full
@pytest.mark.sampled_in_full("sd15-lcm-lora", "flux-dmd2-lora", "wan22-a14b-4step")
@pytest.mark.parametrize("name", sized())
def test_a_recipe_is_planned_at_its_real_size(name: str) -> None:
    made, stored = json.loads(json.dumps(forecast_of(RECIPES[name]))), known()[name]
    assert {key: made[key] for key in stored} == stored


SDXL_PASS = 5.98e12  # operations of its UNet at 1024 px: 2.99 T multiply-adds
STORED = [name for name, entry in known().items() if "forecast" in entry]


@pytest.mark.parametrize("name", STORED)
def test_a_stored_forecast_is_read_as_it_was_made(name: str) -> None:
    plan = known_forecast(RECIPES[name])
    assert plan is not None
    assert plan.peak == known()[name]["peak"]
    assert json.loads(json.dumps(asdict(plan))) == known()[name]["forecast"]
    changed = replace(RECIPES[name][-1], values={**RECIPES[name][-1].values, "seed": 9})
    assert known_forecast([*RECIPES[name][:-1], changed]) is None


@pytest.mark.parametrize("name", STORED)
def test_own_validations_cost_under_two_percent(name: str) -> None:
    """Of the stored forecasts: the teacher's reference and every validation, in rows."""
    plan = known_forecast(RECIPES[name])
    assert plan is not None
    said = plan.validation
    if not said["steps"]:
        assert "too few" in said["why"]
        return
    run = run_at_size(RECIPES[name])
    method = method_class(run.method)(method_config(run.method, run.method_config), VP)
    grid = Grid(len(said["prompts"]), said["images"], said["teacher_steps"])
    reference, each = grid.rows(method, run)
    count = math.ceil(run.max_train_steps / said["steps"])
    rows_per_step = (reference + count * each) / (said["share"] * run.max_train_steps)
    assert said["share"] < PROMISED_SHARE
    assert 4 <= count <= 20
    if plan.model == "sdxl":
        passes = plan.flops_per_step / SDXL_PASS
        assert (reference + count * each) / (passes * run.max_train_steps) < PROMISED_SHARE
        assert rows_per_step < 1.2 * passes
        if not plan.judges and "disc" not in plan.trained:  # whose steps are dearer than their rows
            assert rows_per_step == pytest.approx(passes, rel=0.2)  # rows are passes, about


def test_plan_of_a_recipe_alone_needs_neither_torch_nor_its_models_name() -> None:
    code = """
import sys, time
start = time.process_time()
from stepdistill.cli import main
try:
    main(["plan", "--recipe", "sdxl-dmd2-lora-4step", "--gpu", "a100", "--num_gpus", "2"])
except SystemExit as stop:
    assert stop.code == 0
print(time.process_time() - start < 3.0, sorted({"torch", "diffusers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert last == "True []"
    peak = known()["sdxl-dmd2-lora-4step"]["peak"]
    shown = next(line for line in lines if "peak of one process" in line)
    assert f"{peak / 2**30:.2f}" in shown
    assert "fits 80 GB" in lines


def test_the_table_shows_memory_and_needs_no_torch() -> None:
    code = """
import sys, time
start = time.process_time()
from stepdistill.cli import main
main(["recipes"])
print(time.process_time() - start < 2.0, sorted({"torch", "diffusers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert last == "True []"
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert {*listed()} <= {*rows}
    for name, (about, _, peak) in listed().items():
        words = ["-"] * (1 + len(CARDS))
        if peak is not None:
            words = [f"{peak / 2**30:.1f}", *(verdict(peak, card * 1e9) for card in CARDS)]
        assert words == rows[name].split(about.data, 1)[1].split()[: 1 + len(CARDS)]


# --------------------------------------------------------------------------------- tiny models
def data_of(kind: str, teacher: Path, folder: Path) -> list[str]:
    """Flags of a data source of that kind."""
    if kind == "prompts":
        (folder / "prompts.txt").write_text("a cat\na dog\n")
        return ["--data.prompts_file", str(folder / "prompts.txt")]
    if kind == "pairs":
        (folder / "prompts.txt").write_text("a cat\na dog\n")
        make_pairs(str(teacher), str(folder / "prompts.txt"), folder / "pairs", num_pairs=2,
                   num_steps=2, guidance=1.0)  # fmt: skip
        return ["--data.pairs_dir", str(folder / "pairs")]
    (folder / "pictures").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (90 * i, 20, 200)).save(folder / "pictures" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in range(2)]
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    if kind == "preferences":
        row = {"text": "a cat", "chosen": "pictures/0.png", "rejected": "pictures/1.png"}
        (folder / "pairs.jsonl").write_text(json.dumps(row))
        return ["--data.preferences_file", str(folder / "pairs.jsonl")]
    return ["--data.train_data_dir", str(folder / "pictures")]


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_a_tiny_model_and_exports(
    name: str, tmp_path, tmp_path_factory, monkeypatch
) -> None:
    def judge(images: torch.Tensor, by: Any) -> torch.Tensor:
        other = by if isinstance(by, torch.Tensor) else 0.0
        return (images - other).square().mean(dim=(1, 2, 3))

    def judges(specs: Mapping[str, ScorerSpec], *_: Any) -> dict[str, Any]:
        heads = {name for name, spec in specs.items() if spec.kind == "features"}
        return {name: PixelStandIn() if name in heads else judge for name in specs}

    about: Any = ABOUT[name]
    monkeypatch.setattr("stepdistill.training.checks.check_scorers", lambda *_: None)
    monkeypatch.setattr("stepdistill.training.trainer.build_scorers", judges)  # without weights
    plain = "sd_upscale" if about.data == "lowres" else "sd_v"
    teacher = teacher_dir(about.family or plain, tmp_path_factory)
    short = (
        f"--recipe {name} --pretrained_model_name_or_path {teacher} "
        f"--output_dir {tmp_path / 'run'} --max_train_steps 2 --train_batch_size 2 "
        "--gradient_accumulation_steps 1 --mixed_precision no --tuning.rank 2 "
        "--disable_progress_bar"
    )
    argv = [*short.split(), *data_of(about.data, teacher, tmp_path)]
    run = parse_run_config(argv)
    options = method_config(run.method, run.method_config)
    if about.data == "prompts" and "real" in METHODS[run.method](options, FLOW).needs:
        images = data_of("images", teacher, tmp_path)[1]  # of the heads' own
        run = parse_run_config([*argv, "--data.gan.train_data_dir", images])
    if run.method == "disback":  # as long as its targets take to walk back, at least
        counts = ("warm_start.updates 1", "record_updates 1", "backtrack_updates 1", "nodes 2")
        counted = [part for one in counts for part in f"--method_config.{one}".split()]
        run = parse_run_config([*argv, *counted, "--max_train_steps", "4"])
    alone = {"init_student_from": None, "decoder": None}
    train_run(RunConfig(**merge(run.model_dump(), alone)))
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    shutil.rmtree(tmp_path / "run")


def test_a_resolution_far_from_the_model_s_own_is_told(tmp_path_factory) -> None:
    family = load_family(teacher_dir("sd", tmp_path_factory))
    side = family.image_size()[0]
    with pytest.warns(UserWarning, match=r"16 times the pixels .* 2.6e\+02 times .* attention"):
        size_fits(4 * side, family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for resolution in (None, side, round(1.4 * side)):
            size_fits(resolution, family)


class Means:
    """The mean of each channel: a feature network without weights."""

    name, facts = "means", {"weights": "none", "preprocess": "as made"}

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3))


def at_size(command: str, teacher: str, prompts: str, out: str, side: int) -> None:
    if command == "pairs":
        make_pairs(teacher, prompts, out, num_pairs=1, num_steps=1, resolution=side)
    elif command == "cache":
        argv = ["--pretrained_model_name_or_path", teacher, "--data.prompts_file", prompts]
        argv += ["--cache_dir", out, "--resolution", str(side)]
        run = parse_run_config(argv, method="dmd2")
        cache_run(run, open_dataset(run))
    else:
        drawn: dict[str, Any] = {"student": [teacher], "steps": [1], "teacher_steps": [1]}
        paths: dict[str, Any] = {"prompts_file": prompts, "output_dir": out}
        evaluate(Evaluation(teacher=teacher, resolution=side, **drawn, **paths), [Means()])


@pytest.mark.sampled("pairs")
@pytest.mark.parametrize("command", ["pairs", "cache", "evaluate"])
def test_every_command_that_takes_a_size_tells_one_far_from_the_model_s(
    command: str, tmp_path_factory, tmp_path: Path
) -> None:
    """Of plan, see tests/planning/test_forecast.py."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    teacher = str(teacher_dir("sd", tmp_path_factory))
    with pytest.warns(UserWarning, match="resolution: expected about the model's own 16 x 16 px"):
        at_size(command, teacher, str(prompts), str(tmp_path / "out"), 32)


def test_tiny_models_serve_every_family_of_a_recipe() -> None:
    assert {a.family for a in ABOUT.values() if a and a.family} <= set(TINY)
