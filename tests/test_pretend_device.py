"""Whole runs on the pretend device: every method and family is placed right and never waits.

Construction, batches, losses, backward, clipping, AdamW, averages, log lines and checkpoints of the
real trainer. What may read the device stands in READERS, what can't run there in two tables below.
`-m every` runs every case of a method on every family, which takes an hour; `-m full` every method
with a transformer told prompts and one told labels, and every family; by default a fixed sample
meets every trainer, both layouts, both ways and each kind of network. That no family's call waits
is shown of all in tests/families.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from rewards.test_clip import save_tiny
from rewards.test_preference import save_pick
from safetensors.torch import save_file
from support.covering import covering
from support.runs import (
    METHOD_CASES,
    OF_PIXELS,
    TWO_EXPERTS,
    UNFIT_IMAGELESS,
    WITH_HEADS,
    build_trainer,
    learned_network,
    teacher_dir,
)
from torch import Tensor

from stepdistill.families.experts import Experts
from stepdistill.families.registry import FAMILIES
from stepdistill.losses.pixels import PixelOptions
from stepdistill.losses.rewards import CLIPOptions, LPIPSOptions
from stepdistill.methods import METHODS
from stepdistill.monitoring.logs import RunLog
from stepdistill.monitoring.validation import Validator
from stepdistill.rewards.base import FrozenScorer
from stepdistill.rewards.clip import CLIPScorer
from stepdistill.rewards.features import PixelFeatures
from stepdistill.rewards.perceptual import LPIPSScorer
from stepdistill.rewards.preference import (
    AestheticOptions,
    AestheticScorer,
    PickOptions,
    PickScorer,
)
from stepdistill.testing.pretend_device import PretendDeviceError, pretend_device
from stepdistill.testing.tiny import TINY, TINY_FAMILY
from stepdistill.training.batches import BatchMaker
from stepdistill.training.snapshots import Resumable

# All that may read the device: none of it is called at every step, but for which rows are which of
# two experts', once a call of a network that takes seconds.
READERS = (RunLog.write, Validator.run, Resumable.save, BatchMaker._keep, Experts.high_rows)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "half": {
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "ema_decay": 0.9,
    },
}
# Tiny families that have no place there, and why.
EXCUSED = {
    "lumina2": "Diffusers' forward itself copies the number of words of each prompt to the host",
}
# Those whose stock text encoding reads values, once a prompt: their encoders stay on the CPU.
ENCODED_ON_CPU = {
    **dict.fromkeys(
        (
            *("pixart", "pixart_sigma", "stable_audio"),
            *(name for name in TINY if name.startswith("wan")),
        ),
        "T5's attention mask is looked at: is it all ones?",
    ),
    **dict.fromkeys(("flux2", "flux2_dev"), "the text model's mask is looked at: all ones?"),
    "qwen_image": "the words of a prompt are cut out by its mask",
    "z_image": "the words of a prompt are cut out by its mask",
    **dict.fromkeys(
        ("qwen_image_edit", "qwen_image_edit_2511"),
        "Qwen2.5-VL reads how many patches an image has",
    ),
    "ace_step": "its condition encoder counts the reference sounds",
}
UNCHECKPOINTED = {"dmd2_r1": "an exact R1 differentiates twice, through no recomputed block"}
Cell = tuple[str, str, str, str]  # a case of a method, a tiny family, a layout, a way

# Of every case and family the first layout and way that fit, from another of the four on each time.
FOUR = list(product(("lora", "full"), WAYS))
CELLS: list[Cell] = []
for turn, (case, family) in enumerate(product(METHOD_CASES, sorted(set(TINY) - set(EXCUSED)))):
    turned = [FOUR[(turn + turn // 4 + i) % 4] for i in range(4)]
    fitting = [(case, family, *one) for one in turned if METHOD_CASES[case].fits(family, one[0])]
    CELLS += fitting[:1]


def met(cell: Cell) -> set[Any]:
    """A trainer, a layout, a way, and a kind of network."""
    case, family, layout, way = cell
    return {METHODS[METHOD_CASES[case].method].trainer, layout, way} | {family} & {*KINDS}


def cost(cell: Cell) -> int:
    """UNets have most layers; half precision, with all that goes with it, asks every one twice."""
    _, family, _, way = cell
    return 2 * (TINY_FAMILY[family].net_name == "unet") + (family != "dit") + (way == "half")


KINDS = ("sd", "sd3", "dit", "edm")  # of networks
SAMPLE = covering(CELLS, met, cost)

IN_FULL = {
    *SAMPLE,
    *covering(CELLS, lambda cell: {METHOD_CASES[cell[0]].method, cell[1]}, cost),
}


def test_the_sample_meets_every_trainer_and_kind_of_network() -> None:
    cases, families, layouts, ways = ({cell[i] for cell in SAMPLE} for i in range(4))
    trainers = {METHODS[METHOD_CASES[case].method].trainer for case in cases}
    assert trainers == {cls.trainer for cls in METHODS.values()}
    assert {METHOD_CASES[case].method for case, *_ in IN_FULL} == set(METHODS)
    assert families >= set(KINDS)
    assert (layouts, ways) == ({"lora", "full"}, set(WAYS))
    assert {family for _, family, *_ in CELLS} >= set(FAMILIES) - set(EXCUSED)
    assert set(EXCUSED) | set(ENCODED_ON_CPU) <= set(TINY)


def test_every_method_meets_every_family_that_is_not_excused() -> None:
    left = set(product(METHODS, TINY)) - {(METHOD_CASES[c].method, f) for c, f, *_ in CELLS}
    no_null = {f for f in TINY if not TINY_FAMILY[f].has_null}  # to guide away from
    alike = {
        METHOD_CASES[c].method for c, family, *_ in CELLS if family == "wan" and c not in WITH_HEADS
    }
    headless = set(METHODS) - alike
    sound = {f for f in TINY if TINY_FAMILY[f].output == "audios"}
    unfit = {*product(["lora_guidance"], no_null), *product(headless, TWO_EXPERTS)}
    unfit |= {*product(OF_PIXELS, sound)} | UNFIT_IMAGELESS
    assert left == {*product(METHODS, EXCUSED), *unfit}


@pytest.mark.cells("case family layout way", CELLS, SAMPLE, IN_FULL)
def test_a_step(case, family, layout, way, tmp_path, tmp_path_factory) -> None:
    options = dict(WAYS[way])
    if case in UNCHECKPOINTED:
        options["gradient_checkpointing"] = False
    run_step(case, family, layout, tmp_path, tmp_path_factory, **options)


def run_step(case, family, layout, tmp_path, tmp_path_factory, scorers=None, **options) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    steps = METHOD_CASES[case].one_step
    options = {"max_train_steps": steps, "offload_encoders": family in ENCODED_ON_CPU, **options}
    with pretend_device(READERS) as device:
        trainer = build_trainer(case, teacher, layout, tmp_path / "run", scorers=scorers, **options)
        assert trainer.device == device
        trainer.train()
        bank = trainer.bank
        weights = [p for role in bank.roles for p in bank.members(role).values()]
        moments = [
            value
            for state in trainer.optimizer.state.values()
            for name, value in state.items()
            if name.startswith("exp_avg")
        ]
        assert moments
        assert all(value.is_meta for value in (*weights, *bank.parameters(), *moments))


@pytest.mark.full
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in KINDS else [pytest.mark.every])
        for name in sorted(set(FAMILIES) - set(EXCUSED))
    ],
)
def test_a_validation(family, tmp_path, tmp_path_factory) -> None:
    """Of dmd2, whose fake is measured too, against the teacher's samples."""
    prompt = "1" if TINY_FAMILY[family].conditioning == "label" else "a cat"
    asked = {"validation_steps": 1, "validation_prompts": [prompt], "num_validation_images": 1}
    asked |= {"validation_teacher_steps": 2}
    run_step("dmd2", family, "lora", tmp_path, tmp_path_factory, **WAYS["half"], **asked)
    assert (tmp_path / "run" / "validation" / "step-1.png").is_file()


class TinyScorer(FrozenScorer):
    """A judge with weights, of the kind that a run builds: its autocast asks the device's type."""

    kind = "lpips"
    Options = LPIPSOptions

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Conv2d(3, 4, 3)

    def score(self, images: Tensor, by: Any) -> Tensor:
        assert images.dtype == by.dtype == torch.float32
        return (self.net(images) - self.net(by)).square().mean(dim=(1, 2, 3))


@pytest.mark.full
@pytest.mark.parametrize(
    ("case", "family"),
    [
        ("reflow_lpips", "sd3"),
        ("cd_lpips", "sd"),
        ("rfpp", "sd"),
        ("vsd_clip", "sd3"),
        ("add", "sd3"),
    ],
)
def test_a_loss_of_images(case, family, tmp_path, tmp_path_factory) -> None:
    scorers: dict[str, Any] = {"lpips": TinyScorer()}
    if case == "vsd_clip":
        scorers = {"clip": a_clip(tmp_path)}
    elif case == "add":
        scorers = {"pixels": a_vision_network(tmp_path)}
    run_step(case, family, "lora", tmp_path, tmp_path_factory, scorers, **WAYS["half"])


@pytest.mark.full
def test_an_autoencoder_stays_there_where_its_images_are_judged(tmp_path, tmp_path_factory) -> None:
    """Though encoders are kept on the CPU: each step would wait for its gradient."""
    run_step("lcm_reward", "sd3", "lora", tmp_path, tmp_path_factory, offload_encoders=True)


def a_clip(folder: Path) -> FrozenScorer:
    return CLIPScorer(CLIPOptions(model=f"local-dir:{save_tiny(folder)}", pretrained=None))


def an_aesthetic_head(folder: Path) -> FrozenScorer:
    save_file(torch.nn.Linear(8, 1).state_dict(), folder / "head.safetensors")
    options = {"model": f"local-dir:{save_tiny(folder)}", "pretrained": None}
    return AestheticScorer(AestheticOptions(head=str(folder / "head.safetensors"), **options))


def a_pickscore(folder: Path) -> FrozenScorer:
    return PickScorer(PickOptions(model=str(save_pick(folder))))


def an_lpips(folder: Path) -> FrozenScorer:
    with torch.device("meta"):
        layers = torchvision.models.alexnet().features.state_dict()
    values = {f"features.{k}": torch.zeros(v.shape) for k, v in layers.items()}
    save_file(values, folder / "alex.safetensors")
    return LPIPSScorer(LPIPSOptions(backbone="alex", weights=str(folder / "alex.safetensors")))


def a_vision_network(folder: Path) -> FrozenScorer:
    return PixelFeatures(PixelOptions(network=str(learned_network(folder))))


@pytest.mark.parametrize(
    "judge", [a_clip, a_pickscore, an_aesthetic_head, an_lpips, a_vision_network]
)
def test_a_judge_there_scores_in_float32_within_autocast(judge, tmp_path) -> None:
    scorer = judge(tmp_path).requires_grad_(False)
    with pretend_device() as device:
        scorer.to(device)
        images = torch.ones(2, 3, 64, 64, device=device, requires_grad=True)
        prompts = ["a cat", "a dog"]
        by = images.detach() if judge in (an_lpips, a_vision_network) else prompts
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert (images @ images).dtype == torch.bfloat16
            values = scorer(images, by)
        values.sum().backward()
        assert (values.shape, values.dtype, values.is_meta) == ((2,), torch.float32, True)
        assert images.grad is not None
        assert images.grad.is_meta


@pytest.mark.parametrize("fault", ["wait", "side"])
def test_a_method_at_fault_is_named_by_file_and_line(
    fault, tmp_path, tmp_path_factory, monkeypatch
) -> None:
    """A host sync, and a tensor on the host, in a loss of one's own."""
    faults = {
        "wait": (lambda x: x * x.mean().item(), "expected no read of the device"),
        "side": (lambda x: x + torch.ones(x.shape), "expected tensors of one device"),
    }
    wrong, told = faults[fault]
    cls = METHODS["reflow"]
    right = cls.phases

    def phases(self, step):
        (phase,) = right(self, step)

        def loss(nets, batch, ctx):
            wrong(batch.x0)
            return phase.loss(nets, batch, ctx)

        return (type(phase)(phase.name, loss, phase.trains),)

    monkeypatch.setattr(cls, "phases", phases)
    at = f"{__file__}:{wrong.__code__.co_firstlineno}: {told}"
    with pytest.raises(PretendDeviceError, match=at):
        run_step("reflow", "dit", "lora", tmp_path, tmp_path_factory)
