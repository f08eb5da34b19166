"""Forecasts against what is known: parameter counts, byte sums, operations, and the tiny models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import NETWORKS, teacher_dir

from stepdistill.config.planned import bundled
from stepdistill.config.run import RunConfig
from stepdistill.planning.blueprint import blueprint, describe
from stepdistill.planning.costs import Forecast
from stepdistill.planning.forecast import forecast
from stepdistill.planning.report import hours_per_1k, print_plan, suggestions
from stepdistill.planning.tracker import CostTracker
from stepdistill.testing.tiny import TINY, TINY_FAMILY
from stepdistill.testing.tiny_control import tiny_sd3_controlnet

# Millions of denoiser parameters of the released models.
RELEASED = {
    "sd21": 866,
    "sd15": 860,
    "sdxl": 2567,
    "sdxl_controlnet": 2567,
    "sd15_controlnet": 860,
    "sd35_medium": 2243,
    "sd35_large": 8057,
    "flux": 11901,
    "flux_fill": 11902,  # of Flux.1 dev's, and 320 more columns of its first layer
    "flux_kontext": 11901,
    "instruct_pix2pix": 860,
    "sd15_inpaint": 860,
    "sd_x4_upscaler": 473,
    "sdxl_inpaint": 2567,
    "qwen_image": 20430,
    "qwen_image_edit": 20430,
    "wan_1_3b": 1419,
    "wan_14b": 14288,
    "stable_audio": 1057,
    "ace_step": 1575,
}


def run_config(model: str | Path, **options: Any) -> RunConfig:
    options = {"method": "dmd2", "method_config": {"num_steps": 1}, **options}
    return RunConfig(pretrained_model_name_or_path=str(model), **options)


# Averaged alike; a configuration that two tests share is traced once.
LORA: dict[str, Any] = {"tuning": {"rank": 2}, "ema_decay": 0.9}
FULL: dict[str, Any] = {"tuning": {"student": "full", "fake": "full"}, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_dir("sd3", tmp_path_factory)  # the fewest operations of those with prompts


@pytest.mark.sampled("sd21", "sdxl", "sd35_medium", "wan_1_3b")
@pytest.mark.parametrize("name", RELEASED)
def test_bundled_models_have_the_released_size(name: str) -> None:
    count = sum(p.numel() for p in blueprint(name, torch.bfloat16).net.parameters())
    assert round(count / 1e6) == RELEASED[name]


CUT_BY_MASK = ("qwen_image", "z_image")  # encoders whose rows depend on the words


@pytest.mark.full
@pytest.mark.sampled_in_full(name=(*CUT_BY_MASK, *NETWORKS))
@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_is_forecast(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The frozen bytes are the denoiser's own, in float32."""
    folder = teacher_dir(name, tmp_path_factory)
    guidance = 3.0 if TINY_FAMILY[name].has_null else 1.0
    plan = forecast(run_config(folder, method_config={"num_steps": 1, "guidance": guidance}))
    assert plan.frozen >= 4 * plan.num_parameters
    assert [cost.phase for cost in plan.phases] == ["student", "fake"]
    assert all(cost.activations > 0 and cost.flops > 0 for cost in plan.phases)


@pytest.mark.sampled("sd15_controlnet-361")
@pytest.mark.parametrize(("name", "size"), [("sdxl_controlnet", 1251), ("sd15_controlnet", 361)])
def test_bundled_controlnets_have_the_released_size(name: str, size: int) -> None:
    (net,) = blueprint(name, torch.bfloat16).side_parts.values()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == size


def test_a_controlnet_that_shares_its_embedding_is_described(tmp_path: Path) -> None:
    """3.5 Large's, which the stock pipeline gives the transformer's own."""
    tiny_sd3_controlnet(without_text=True).save_pretrained(tmp_path)
    (net,) = blueprint(str(tmp_path), torch.bfloat16).side_parts.values()
    assert {p.device.type for p in net.parameters()} == {"meta"}


@pytest.mark.full
def test_a_controlnet_is_held_whole_and_run_in_every_call(tmp_path_factory: Any) -> None:
    folders = [teacher_dir(name, tmp_path_factory) for name in ("sd3", "sd3_controlnet")]
    plain, beside = (forecast(run_config(folder, **LORA)) for folder in folders)
    offloaded = forecast(run_config(folders[1], **LORA, offload_encoders=True))
    weights = load_file(folders[1] / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert plain.beside == 0
    weights.pop("pos_embed.pos_embed")  # a table
    assert beside.beside == offloaded.beside == sum(w.nbytes for w in weights.values())
    assert beside.frozen == plain.frozen
    assert beside.encoders == plain.encoders
    assert beside.resident - plain.resident == beside.beside
    assert beside.flops_per_step > 1.2 * plain.flops_per_step
    # Eight processes divide the denoiser, and each holds the ControlNet.
    peaks = [plan.peak_on(8, "fsdp2") for plan in (plain, beside)]
    assert peaks[1] - peaks[0] >= beside.beside


@pytest.mark.full
def test_pairs_of_images_are_forecast(teacher: Path) -> None:
    """Both images of a pair go through the student, in one call of twice the rows."""
    options: dict[str, Any] = {"tuning": {"rank": 2}}
    made = [
        forecast(run_config(teacher, method="preference", method_config=config, **options))
        for config in ({}, {"loss": "hinge"})
    ]
    assert [[cost.phase for cost in plan.phases] for plan in made] == [["student"]] * 2
    logistic, hinge = (plan.phases[0] for plan in made)
    assert logistic.flops > 1.2 * hinge.flops  # the reference's forward
    twice = forecast(run_config(teacher, method="preference", method_config={"loss": "hinge"},
                                train_batch_size=2, **options))  # fmt: skip
    assert twice.phases[0].flops == pytest.approx(2 * hinge.flops, rel=0.1)


def test_every_bundled_model_is_described() -> None:
    assert set(RELEASED) <= set(bundled())
    for name in bundled():
        assert describe(name)["parts"], name


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ('["evil_package", "Net"]', "classes of diffusers and transformers"),
        ('["diffusers", "os.system"]', "classes of diffusers and transformers"),
        ("[broken", "expected valid JSON"),
    ],
)
def test_a_foreign_index_is_refused_before_an_import(tmp_path: Path, entry: str, told: str) -> None:
    index = f'{{"_class_name": "StableDiffusionPipeline", "unet": {entry}}}'
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=told):
        describe(str(tmp_path))


def test_a_broken_part_config_is_said(tmp_path: Path) -> None:
    index = (
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    (tmp_path / "model_index.json").write_text(index)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected valid JSON"):
        describe(str(tmp_path))


def test_the_tracker_knows_peak_and_what_was_freed() -> None:
    tracker = CostTracker()
    with tracker:
        a = torch.zeros(256)  # 1 KiB
        b = a + 1
        del a
        c = b.view(2, 128)  # no storage of its own
    assert (tracker.live, tracker.peak) == (1024, 2048)
    assert c.shape == (2, 128)


def test_the_tracker_counts_a_multiply_add_as_two() -> None:
    tracker = CostTracker()
    with tracker:
        torch.zeros(2, 3) @ torch.zeros(3, 5)
    assert tracker.flops == 2 * 2 * 3 * 5


@pytest.mark.full
def test_held_bytes_are_those_of_the_real_parts(teacher: Path) -> None:
    from stepdistill.families.registry import load_family

    pipeline = load_family(teacher).pipeline
    size = {
        name: sum(4 * p.numel() for p in getattr(pipeline, name).parameters())
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    plan = forecast(run_config(teacher, **FULL))
    net = size.pop("transformer")
    assert plan.frozen == net
    assert plan.trained == {"student": net, "fake": net}
    assert plan.averaged == net
    assert plan.optimizer == 4 * net
    assert plan.encoders == sum(size.values())


@pytest.mark.full
def test_offloaded_encoders_cost_nothing(teacher: Path) -> None:
    here, away = (forecast(run_config(teacher, **LORA, offload_encoders=x)) for x in (False, True))
    assert here.peak - away.peak >= here.encoders > 0
    assert away.encoders == away.encoding == 0


@pytest.mark.full
def test_adapters_cost_less_than_copies(teacher: Path) -> None:
    lora, full = (forecast(run_config(teacher, **options)) for options in (LORA, FULL))
    assert sum(lora.trained.values()) < sum(full.trained.values()) / 4
    assert lora.peak < full.peak


@pytest.mark.full
def test_checkpointing_trades_memory_for_work(teacher: Path) -> None:
    plain = forecast(run_config(teacher, train_batch_size=8))
    spared = forecast(run_config(teacher, train_batch_size=8, gradient_checkpointing=True))
    assert spared.phases[0].activations < plain.phases[0].activations
    assert spared.flops_per_step > plain.flops_per_step


@pytest.mark.full
def test_activations_grow_with_the_batch_and_work_is_proportional(teacher: Path) -> None:
    one = forecast(run_config(teacher, train_batch_size=2))
    four = forecast(run_config(teacher, train_batch_size=8))
    assert four.flops_per_step == pytest.approx(4 * one.flops_per_step, rel=1e-6)
    assert four.phases[0].activations > 2 * one.phases[0].activations


def linear_sizes(folder: Path) -> tuple[int, int, int]:
    """(weights in linear layers, their rows, all other parameters) of the denoiser."""
    net = blueprint(str(folder), torch.float32).net
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    inside = sum(m.weight.numel() for m in layers)
    rows = sum(m.out_features for m in layers)
    return inside, rows, sum(p.numel() for p in net.parameters()) - inside


@pytest.mark.full
def test_an_int8_base_holds_a_byte_a_weight_and_a_scale_a_row(teacher: Path) -> None:
    inside, rows, others = linear_sizes(teacher)
    tuning = {"rank": 2, "base_quantization": "int8"}
    plan = forecast(run_config(teacher, gradient_checkpointing=True, tuning=tuning))
    assert plan.frozen == inside + 4 * rows + 4 * others
    assert plan.num_parameters == inside + others


@pytest.mark.full
def test_an_nf4_base_holds_half_a_byte_a_weight_and_a_scale_a_block(teacher: Path) -> None:
    inside, _, others = linear_sizes(teacher)
    plan = forecast(run_config(teacher, tuning={"rank": 2, "base_quantization": "nf4"}))
    packed = plan.frozen - 4 * others
    assert inside / 2 + inside / 64 <= packed <= 1.1 * (inside / 2 + inside / 64)


@pytest.mark.full
def test_a_quantised_base_costs_no_less_work(teacher: Path) -> None:
    plain, packed = (
        forecast(
            run_config(
                teacher,
                gradient_checkpointing=True,
                tuning={"rank": 2, "base_quantization": kind},
            )
        )
        for kind in ("none", "int8")
    )
    assert packed.flops_per_step == plain.flops_per_step
    assert packed.frozen < plain.frozen


@pytest.mark.full
def test_recomputing_holds_one_blocks_unpacked_weights_at_a_time(teacher: Path) -> None:
    kept, freed = (
        forecast(
            run_config(
                teacher,
                gradient_checkpointing=told,
                tuning={"rank": 2, "base_quantization": "int8"},
            )
        )
        for told in (False, True)
    )
    inside, _, _ = linear_sizes(teacher)
    assert kept.phases[0].activations - freed.phases[0].activations > inside


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "options"),
    [("consistency", {}), ("vsd", {}), ("pcm", {}), ("tscd", {}), ("ctm", {}), ("reflow", {})],
)
def test_methods_with_images_and_pairs_are_forecast_too(
    teacher: Path, method: str, options: dict[str, Any]
) -> None:
    plan = forecast(run_config(teacher, method=method, method_config=options))
    assert plan.flops_per_step > 0
    assert plan.peak > plan.resident


def made(**changes: Any) -> Forecast:
    values = {
        "model": "m",
        "method": "dmd2",
        "num_parameters": 10,
        "frozen": 1000,
        "trained": {"student": 100},
        "averaged": 0,
        "gradients": 100,
        "optimizer": 200,
        "encoders": 50,
        "encoding": 0,
        "largest_block": 10,
    }
    return Forecast(**{**values, **changes})


def test_sharding_divides_what_is_held() -> None:
    from stepdistill.planning.costs import Cost

    plan = made(phases=(Cost("student", 1, 100 + 40, 7),))
    assert plan.peak == 1000 + 100 + 200 + 50 + 140
    assert plan.peak_on(2, "ddp") == plan.peak + 100
    assert plan.peak_on(4, "fsdp2") == 50 + 1400 // 4 + 40 + 20


def test_hours_follow_from_the_peak_rate() -> None:
    from stepdistill.planning.costs import Cost

    plan = made(phases=(Cost("student", 2, 0, 10**14),))
    assert hours_per_1k(plan, "h100") == pytest.approx(2e14 * 1000 / (989.4e12 * 0.4) / 3600)


@pytest.mark.full
def test_hours_count_every_micro_batch(teacher: Path) -> None:
    options: dict[str, Any] = {"max_train_steps": 4000}
    runs = [run_config(teacher, gradient_accumulation_steps=n, **options) for n in (1, 8)]
    plans = [forecast(run) for run in runs]
    assert hours_per_1k(plans[1], "h100") == pytest.approx(8 * hours_per_1k(plans[0], "h100"))
    assert plans[1].peak == plans[0].peak
    shares = [plan.validation.get("share", 0.0) for plan in plans]  # of a run's own, in rows
    often = [len(range(0, 4000, plan.validation["steps"] or 4000)) for plan in plans]
    assert often[1] > often[0]
    assert all(share < 0.02 for share in shares)


@pytest.mark.full
@pytest.mark.parametrize(
    ("share", "said"), [(0.8, "fits"), (0.95, "tight (95% of it is forecast)")]
)
def test_above_nine_tenths_is_tight(
    teacher: Path, share: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_config(teacher)
    assert print_plan(run, 1, "rtx4090", forecast(run).peak / share / 1e9)
    assert f"\n{said}" in capsys.readouterr().out


@pytest.mark.full
def test_a_plan_tells_the_runs_own_validation(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, short = (run_config(teacher, max_train_steps=n) for n in (100_000, 10))
    said = forecast(long).validation
    assert 0 < said["share"] < 0.02
    print_plan(long, 1, "h100", None)
    assert f"validation: every {said['steps']:,} updates" in capsys.readouterr().out
    assert forecast(short).validation["steps"] == 0
    assert forecast(run_config(teacher, validation_steps=0)).validation == {}


@pytest.mark.full
def test_suggestions_begin_with_what_saves_most(teacher: Path) -> None:
    run = run_config(teacher, tuning={"student": "full", "fake": "full"}, train_batch_size=4)
    offered = list(suggestions(run, forecast(run)))
    first = forecast(offered[0][1]).peak
    for changes in ({"offload_encoders": True}, {"optimizer": "adamw_8bit"}, {"ema_decay": 0.0}):
        assert first <= forecast(run.model_copy(update=changes)).peak
    told, last = offered[-1]
    assert (last.train_batch_size, last.tuning.student, last.tuning.rank) == (1, "lora", 16)
    assert last.gradient_accumulation_steps == 4  # the same samples an update
    for name in ("gradient_checkpointing", "mixed_precision=bf16", "offload_encoders"):
        assert name in told
    assert told.index("base_quantization=int8") < told.index("base_quantization=nf4")


@pytest.mark.full
def test_text_encoders_that_fill_the_memory_go_first(teacher: Path) -> None:
    run = run_config(teacher, tuning={"rank": 2})
    large = replace(forecast(run), encoders=2**40)
    assert next(suggestions(run, large))[0] == "offload_encoders"


@pytest.mark.full
def test_a_run_that_does_not_fit_is_told_what_would(
    teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_config(teacher, tuning={"student": "full", "fake": "full"}, train_batch_size=8)
    plan = forecast(run)
    assert print_plan(run, 1, "rtx4090", None)
    assert not print_plan(run, 1, "rtx4090", (plan.peak - 1) / 1e9)
    assert "batch 1 with accumulation" in capsys.readouterr().out  # of eight: it saves most


def test_a_resolution_far_from_the_model_s_own_is_told(teacher: Path) -> None:
    run = run_config(teacher, resolution=512, rewards=[{"kind": "clop", "weight": 1.0}])
    with (
        pytest.warns(UserWarning, match="resolution: expected about the model's own 16 x 16 px"),
        pytest.raises(ValueError, match="scorers: expected a kind"),  # ends it before a trace
    ):
        forecast(run)


def test_unknown_models_and_gpus_are_refused(teacher: Path) -> None:
    with pytest.raises(ValueError, match="pipeline folder"):
        forecast(run_config("no/such/model"))
    with pytest.raises(ValueError, match="--gpu"):
        print_plan(run_config(teacher), 1, "abacus", None)


# --------------------------------------------------------------- phases that change in a run
@pytest.mark.full
def test_all_parts_of_a_run_are_forecast(teacher: Path) -> None:
    """disback's recording, then its distribution matching, each by its share of the run."""
    options = {"num_steps": 1, "critic_steps": 2, "nodes": 3, "record_updates": 4}
    config = {**options, "backtrack_updates": 2}
    run = run_config(teacher, method="disback", method_config=config, max_train_steps=10, **LORA)
    plan = forecast(run)
    plain = forecast(run_config(teacher, method_config={"num_steps": 1, "critic_steps": 2}, **LORA))
    record, student, fake = plan.phases
    assert [(c.phase, c.since, c.share) for c in plan.phases] == [
        ("record", 0, 0.4), ("student", 4, 0.6), ("fake", 4, 0.6)
    ]  # fmt: skip
    assert (fake.flops, fake.repeat) == (plain.phases[1].flops, 2)
    assert student.flops > plain.phases[0].flops  # the target is an adapter more
    assert record.flops > fake.flops  # it draws its own sample, which the fake's first does not
    expected = 0.4 * record.flops + 0.6 * (student.flops + 2 * fake.flops)
    assert plan.flops_per_step == round(expected)
    nodes = plan.averaged - plain.averaged
    assert nodes == 2 * plan.trained["fake"]
    assert plan.peak == pytest.approx(plain.peak + nodes, rel=0.02)


@pytest.mark.full
def test_a_warm_start_and_what_follows_are_forecast(teacher: Path) -> None:
    config = {"num_steps": 1, "warm_start": {"updates": 4, "teacher_steps": 2}}
    plan = forecast(run_config(teacher, method_config=config, max_train_steps=8, **LORA))
    told = [(c.phase, c.since) for c in plan.phases]
    assert told == [("student", 0), ("fake", 0), ("student", 4), ("fake", 4)]
    alone = forecast(run_config(teacher, method_config=config, max_train_steps=4, **LORA))
    assert [(c.phase, c.since) for c in alone.phases] == told[:2]
    assert alone.phases[0].flops == plan.phases[0].flops != plan.phases[2].flops


def test_a_run_too_short_for_its_stages_is_not_forecast(teacher: Path) -> None:
    with pytest.raises(ValueError, match="expected max_train_steps above 300"):
        forecast(run_config(teacher, method="disback", method_config={}, max_train_steps=300))
