"""Quantised bases: what is loaded, what is refused, and what training and export make of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from support.runs import TinyData, fingerprint, teacher_dir
from torch import Tensor

from stepdistill import DistributionMatchingTrainer, TrainConfig, Tuning
from stepdistill.core.method import Role
from stepdistill.families.family import Family
from stepdistill.families.registry import load_family
from stepdistill.loading import quantization
from stepdistill.loading.quantization import check_quantization, is_packed, is_quantized
from stepdistill.loading.source import ModelSource
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.parity import LIMIT, check_family

pytestmark = pytest.mark.quantization
ROLES = {"teacher": Role(), "student": Role(train=True), "fake": Role(train=True)}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_dir("flux", tmp_path_factory)


@pytest.fixture(scope="module")
def int8(flux: Path) -> Family:
    pytest.importorskip("torchao", reason="int8 bases need torchao")
    return load_family(ModelSource.of(flux, base_quantization="int8"))


def called(family: Family, x_t: Tensor, net: Any = None) -> Tensor:
    t = torch.tensor([900.0, 300.0], dtype=torch.float64)
    cond = family.encode(["a red cube", "seven cats"])
    return family.forward(family.net if net is None else net, x_t, t, cond)


def latents(family: Family) -> Tensor:
    return torch.randn(2, *family.sample_shape(), generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------- loading
def test_linear_layers_are_held_in_a_quarter_of_their_bytes(int8: Family) -> None:
    packed = [p for p in int8.net.parameters() if is_packed(p)]
    linear = [m for m in int8.net.modules() if isinstance(m, torch.nn.Linear)]
    assert len(packed) == len(linear)
    held = sum(p.data.qdata.nbytes for p in packed)
    assert 4 * held == sum(4 * m.in_features * m.out_features for m in linear)


def test_eight_bits_change_the_output_by_a_percent_at_most(int8: Family, flux: Path) -> None:
    plain, x_t = load_family(flux), latents(int8)
    with torch.no_grad():
        there, here = called(plain, x_t), called(int8, x_t)
    assert 0 < float((here - there).norm() / there.norm()) < 0.02


def test_the_adapter_around_a_quantised_net_is_the_stock_pipeline(int8: Family) -> None:
    assert max(value for _, value in check_family(int8)) < LIMIT


def test_a_merged_teacher_lora_is_quantised_after_merging(flux: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="int8 bases need torchao")
    pipeline = load_family(flux).pipeline
    # On the values, for an adapter on the queries moves the output by little more than rounding.
    config = LoraConfig(r=2, target_modules=["to_v"], init_lora_weights="gaussian")
    pipeline.transformer.add_adapter(config)
    for name, param in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            param.data.fill_(1.0)
    state = get_peft_model_state_dict(pipeline.transformer)
    type(pipeline).save_lora_weights(tmp_path, transformer_lora_layers=state)
    with_lora = load_family(ModelSource.of(flux, teacher_lora=[str(tmp_path)]))
    quantised = load_family(
        ModelSource.of(flux, teacher_lora=[str(tmp_path)], base_quantization="int8")
    )
    x_t = latents(with_lora)
    with torch.no_grad():
        plain, merged, here = (called(f, x_t) for f in (load_family(flux), with_lora, quantised))
    assert float((here - merged).norm()) < 0.5 * float((plain - merged).norm())
    assert quantised.unquantized is not None
    again = quantised.unquantized().state_dict()
    assert all(torch.equal(again[k], v) for k, v in with_lora.net.state_dict().items())


# -------------------------------------------------------------------- refusals
def test_full_roles_are_refused_before_loading() -> None:
    with pytest.raises(ValueError, match="expected LoRA roles on a quantised base"):
        Tuning(student="full", base_quantization="int8")


def test_a_missing_package_is_said_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'torchao for .int8.*pip install "stepdistill\[quant'):
        load_family(ModelSource.of("no/such/model", base_quantization="int8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nf4_without_a_gpu_is_refused() -> None:
    pytest.importorskip("bitsandbytes", reason="nf4 bases need bitsandbytes")
    with pytest.raises(ValueError, match="expected a CUDA device for 'nf4'"):
        check_quantization("nf4")


def test_a_plain_family_is_not_taken_for_a_quantised_one(flux: Path) -> None:
    with pytest.raises(ValueError, match="expected a base loaded so, got a plain Flux"):
        RoleBank(load_family(flux), ROLES, Tuning(rank=2, base_quantization="int8"))


def test_a_teacher_that_came_quantised_has_no_full_students(int8: Family) -> None:
    with pytest.raises(ValueError, match="got full student"):
        RoleBank(int8, ROLES, Tuning(rank=2, student="full"))


# -------------------------------------------------------------------- training
def bank_of(flux: Path, **tuning: Any) -> RoleBank:
    pytest.importorskip("torchao", reason="int8 bases need torchao")
    family = load_family(ModelSource.of(flux, base_quantization="int8"))
    torch.manual_seed(0)
    bank = RoleBank(family, ROLES, Tuning(rank=2, base_quantization="int8", **tuning))
    for role in ("student", "fake"):
        for name, param in bank.members(role).items():
            if "lora_B" in name:
                param.data.normal_(std=0.1)
    return bank


def gradients(bank: RoleBank, x_t: Tensor) -> list[Tensor]:
    """Of the student, whose output reaches the loss through the fake: two roles of one base."""
    bank.train_only(("student",))
    cond = bank.family.encode(["a red cube", "seven cats"])
    t = torch.tensor([0.9, 0.3])
    x0 = bank["student"](x_t, t, cond).x0
    bank["fake"](x0, t * 0.5, cond).x0.square().mean().backward()
    found = [p.grad for p in bank.members("student").values()]
    assert all(g is not None for g in found)
    made = [g.clone() for g in found if g is not None]
    for param in bank.parameters():
        param.grad = None
    return made


def test_checkpointing_leaves_gradients_through_a_quantised_base_alone(flux: Path) -> None:
    bank = bank_of(flux)
    x_t = latents(bank.family)
    plain = gradients(bank, x_t)
    bank.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(bank, x_t), strict=True))


def test_gradients_are_close_to_those_of_the_plain_base(flux: Path) -> None:
    bank = bank_of(flux)
    plain = RoleBank(load_family(flux), ROLES, Tuning(rank=2))
    for role in ("student", "fake"):
        plain.load_role_state(role, bank.role_state(role))
    x_t = latents(bank.family)
    ours, theirs = (torch.cat([g.flatten() for g in gradients(b, x_t)]) for b in (bank, plain))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.1


def test_placing_casts_no_packed_weight(flux: Path) -> None:
    from stepdistill.training.step import place

    bank = bank_of(flux)
    before = [copy.deepcopy(p.data.qdata) for p in bank.family.net.parameters() if is_packed(p)]
    place(bank, TrainConfig(mixed_precision="bf16"), torch.device("cpu"))
    after = [p.data.qdata for p in bank.family.net.parameters() if is_packed(p)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def trainer(flux: Path, out: Path, steps: int, **options: Any) -> DistributionMatchingTrainer:
    pytest.importorskip("torchao", reason="int8 bases need torchao")
    args = TrainConfig(
        output_dir=str(out),
        max_train_steps=steps,
        train_batch_size=2,
        checkpointing_steps=2,
        disable_progress_bar=True,
        tuning=Tuning(rank=2, base_quantization="int8"),
        **{"learning_rate": 1e-3, **options},
    )
    config = {"num_steps": 1, "critic_steps": 1}
    data = TinyData((4, 8, 8), "prompt", ())
    return DistributionMatchingTrainer(flux, args, data, "dmd2", config)


@pytest.fixture(scope="module")
def trained(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> DistributionMatchingTrainer:
    made = trainer(flux, tmp_path_factory.mktemp("int8"), 4)
    made.train()
    return made


def test_training_moves_adapters_and_leaves_packed_weights_alone(
    trained: DistributionMatchingTrainer, flux: Path
) -> None:
    assert is_quantized(trained.family.net)
    fresh = load_family(ModelSource.of(flux, base_quantization="int8")).net
    packed = {n: p.data for n, p in fresh.named_parameters() if is_packed(p)}
    own = dict(trained.family.net.named_parameters())
    for name, there in packed.items():
        layer, _, leaf = name.rpartition(".")
        here = own.get(name, own.get(f"{layer}.base_layer.{leaf}"))
        assert here is not None
        assert torch.equal(here.data.qdata, there.qdata), name
    moved = trained.bank.members("student")
    assert any(float(p.abs().sum()) > 0 for n, p in moved.items() if "lora_B" in n)


def test_a_resumed_run_is_the_run_that_never_stopped(
    trained: DistributionMatchingTrainer, flux: Path, tmp_path: Path
) -> None:
    trainer(flux, tmp_path, 2).train()
    again = trainer(flux, tmp_path, 4, resume_from_checkpoint="latest")
    again.train()
    for role in ("student", "fake"):
        here = fingerprint(again.bank.role_state(role))
        assert here == fingerprint(trained.bank.role_state(role)), role


def images(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 16}
    call |= {"height": 32, "width": 32}
    generator = torch.Generator().manual_seed(0)
    found: Tensor = pipeline("a thing", generator=generator, output_type="pt", **call).images
    return found


def test_the_pipeline_export_holds_the_unquantised_base_with_the_adapter(
    trained: DistributionMatchingTrainer, flux: Path, tmp_path: Path
) -> None:
    folder = trained.export(tmp_path / "pipeline")
    saved = load_family(folder).net.state_dict()
    plain = load_family(flux).net.state_dict()
    folded = {name for name in plain if "time_text_embed" in name}  # the embedded guidance
    assert saved.keys() - folded == plain.keys() - folded
    touched = {n for n in saved.keys() - folded if not torch.equal(saved[n], plain[n])}
    adapted = {n for n, m in trained.bank.nets["base"].named_modules() if hasattr(m, "lora_A")}
    assert touched <= {f"{name}.weight" for name in adapted}
    assert touched


def test_the_lora_export_on_the_plain_base_makes_the_pipeline_exports_image(
    trained: DistributionMatchingTrainer, flux: Path, tmp_path: Path
) -> None:
    whole = trained.export(tmp_path / "pipeline")
    lora = trained.export(tmp_path / "lora", format="lora", dtype="float32")
    merged = DiffusionPipeline.from_pretrained(whole)
    adapted = DiffusionPipeline.from_pretrained(flux)
    adapted.scheduler = type(merged.scheduler).from_pretrained(lora / "scheduler")
    adapted.load_lora_weights(lora)
    assert float((images(adapted) - images(merged)).abs().max()) < 1e-4


def test_other_tools_formats_know_the_sizes_of_packed_layers(
    trained: DistributionMatchingTrainer, tmp_path: Path
) -> None:
    record = trained.export(tmp_path / "kohya", format="kohya") / "distillation.json"
    assert '"format": "kohya"' in record.read_text()


@pytest.mark.full
def test_the_loss_of_a_student_on_an_int8_base_falls(flux: Path, tmp_path: Path) -> None:
    from stepdistill import ReflowTrainer

    pytest.importorskip("torchao", reason="int8 bases need torchao")
    args = TrainConfig(
        output_dir=str(tmp_path / "run"),
        max_train_steps=200,
        train_batch_size=6,
        learning_rate=3e-3,
        logging_steps=20,
        checkpointing_steps=0,
        disable_progress_bar=True,
        tuning=Tuning(rank=8, base_quantization="int8"),
    )
    data = TinyData((4, 8, 8), "prompt", ("x0", "noise"))
    made = ReflowTrainer(flux, args, data, "reflow")
    made.train()
    lines = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss/student"] for line in lines]
    assert losses[-1] < 0.8 * losses[0]
    lora = made.export(tmp_path / "lora", format="lora", dtype="float32")
    with made.bank["student"].in_pipeline() as quantised:  # type: ignore[attr-defined]
        there = images(quantised)
    plain = DiffusionPipeline.from_pretrained(flux)
    plain.load_lora_weights(lora)
    gap = (images(plain) - there).abs()
    print(
        f"losses {losses[0]:.3f} -> {losses[-1]:.3f}; image gap {gap.mean():.4f}, {gap.max():.4f}"
    )
    assert float(gap.mean()) < 0.02


# ------------------------------------------------------------------------- nf4
def test_nf4_bases_train_adapters_too(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On bitsandbytes' own CPU kernels: only the demand for a GPU is lifted."""
    bnb = pytest.importorskip("bitsandbytes", reason="nf4 bases need bitsandbytes")
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as Stock

    monkeypatch.setattr(Stock, "validate_environment", lambda *args, **kwargs: None)
    monkeypatch.setattr(Stock, "update_device_map", lambda *args: {"": "cpu"})
    monkeypatch.setattr("stepdistill.loading.source.check_quantization", lambda kind: None)
    family = load_family(ModelSource.of(flux, base_quantization="nf4", base_dtype=torch.float32))
    for module in family.net.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # a kernel for multiples of 32 rows
    bank = RoleBank(family, ROLES, Tuning(rank=2, base_quantization="nf4"))
    for name, param in bank.members("student").items():
        if "lora_B" in name:
            param.data.normal_(std=0.1)
    x_t = latents(family)
    assert all(float(g.abs().sum()) > 0 for g in gradients(bank, x_t)[:2])
    with torch.no_grad():
        here, plain = called(family, x_t), called(load_family(flux), x_t)
    assert float((here - plain).norm() / plain.norm()) < 0.2
    assert family.unquantized is not None
    assert not is_quantized(family.unquantized())
