"""The threestudio guidance: their contract on a stub of their registry, and our gradients' figures.

threestudio needs CUDA extensions; what the class touches of it is stood in for here: `register`,
`BaseModule` (a nested Config, `configure`) and `C`.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.runs import teacher_dir
from torch import Tensor, nn

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.types import Cond
from stepdistill.families.registry import load_family
from stepdistill.losses.score import score_grad
from stepdistill.losses.score_options import GRADIENT_KINDS, ScoreGradientConfig, annealed
from stepdistill.roles.rolebank import RoleBank

FILE = Path(__file__).parents[2] / "pipelines" / "threestudio_score_guidance.py"
REGISTRY: dict[str, Any] = {}


class BaseModule(nn.Module):
    @dataclass
    class Config:
        weights: Any = None

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.cfg, self.device = self.Config(**cfg), torch.device("cpu")
        self.configure()


def _register(name: str) -> Any:
    def add(cls: Any) -> Any:
        REGISTRY[name] = cls
        return cls

    return add


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


@pytest.fixture(scope="module")
def guidance_class() -> Any:
    """The class as their registry finds it by name."""
    stubs = {
        "threestudio": _module("threestudio", register=_register),
        "threestudio.utils": _module("threestudio.utils"),
        "threestudio.utils.base": _module("threestudio.utils.base", BaseModule=BaseModule),
        "threestudio.utils.misc": _module(
            "threestudio.utils.misc",
            C=lambda v, epoch, step: annealed(tuple(v) if isinstance(v, list) else v, step),
        ),
    }
    spec: Any = importlib.util.spec_from_file_location("threestudio_score_guidance", FILE)
    module: Any = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
        spec.loader.exec_module(module)
    return REGISTRY["stepdistill-score-guidance"]


@pytest.fixture
def make(guidance_class, tmp_path_factory) -> Any:
    def made(kind: str, family: str = "sd", **cfg: Any) -> Any:
        folder = str(teacher_dir(family, tmp_path_factory))
        return guidance_class(
            {
                "pretrained_model_name_or_path": folder,
                "kind": kind,
                "half_precision_weights": False,
                **cfg,
            }
        )

    return made


BATCH = {
    "elevation": torch.zeros(2),
    "azimuth": torch.zeros(2),
    "camera_distances": torch.ones(2),
    "c2w": torch.eye(4).repeat(2, 1, 1),
    "mvp_mtx": torch.eye(4).repeat(2, 1, 1),
    "height": 16,
    "width": 16,
    "light_positions": torch.zeros(2, 3),
}


def prompts(make_text: Tensor) -> Any:
    """prompt_utils whose rows are cat(COND, UNCOND)."""
    return SimpleNamespace(
        use_perp_neg=False, get_text_embeddings=lambda *angles: make_text.clone()
    )


def text_of(guidance: Any) -> Tensor:
    shape = guidance.frozen.empty.shape[1:]
    return torch.randn(4, *shape, generator=torch.manual_seed(0))


def rgb() -> Tensor:
    return torch.rand(2, 20, 20, 3, generator=torch.manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_their_call_returns_their_keys_and_a_gradient_through_the_autoencoder(kind, make) -> None:
    guidance, image = make(kind), rgb()
    out = guidance(image, prompts(text_of(guidance)), **BATCH, rgb_as_latents=False)
    losses = {name for name in out if name.startswith("loss_")}
    assert losses == ({"loss_vsd", "loss_lora"} if kind == "vsd" else {"loss_sds"})
    assert {"grad_norm", "min_step", "max_step"} == {*out} - losses
    sum(out[name] for name in losses).backward()
    assert float(image.grad.abs().sum()) > 0
    trained = [p for p in guidance.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    assert len(trained) == (4 + 2 * len(guidance.frozen.lora_of) if kind == "vsd" else 0)
    assert guidance.frozen.pipe.unet.class_embedding is None


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sd_v"])
@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_its_figures_are_the_package_s(kind, family, make, tmp_path_factory) -> None:
    """The same coefficients, weights and special cases as losses/score.py."""
    guidance = make(kind, family)
    ours = load_family(teacher_dir(family, tmp_path_factory))
    bank = RoleBank(ours, {"teacher": Role()}, Tuning())
    text, draws = text_of(guidance), torch.manual_seed(2)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=draws) for _ in range(2))
    t = torch.tensor([150, 700])
    camera = torch.eye(4).view(1, 16).repeat(2, 1)
    theirs = guidance.gradient(latents, t, noise, text, text[:2], camera)
    cond, uncond = (Cond({"prompt_embeds": half}) for half in text.chunk(2))
    empty = ours.null(2)
    from_empty = kind in ("csd", "csm")
    fake = bank["teacher"]
    if kind == "vsd":  # an untrained LoRA changes nothing, so its answer is the camera's alone
        with guidance._as_fake():
            e_f = guidance._eps(*_noised(guidance, latents, noise, t), text[:2], camera)
        plain = guidance._eps(*_noised(guidance, latents, noise, t), text[:2])
        sigma = guidance._coeffs(t)[1]
        theirs = theirs + sigma**2 * (e_f - plain)
    grad = score_grad(
        bank["teacher"],
        latents,
        ours.path.time_of(t),
        noise,
        cond,
        empty if from_empty else uncond,
        ScoreGradientConfig(kind=kind),
        fake=fake,
        negative=uncond,
        empty=empty,
    )
    torch.testing.assert_close(theirs, grad, rtol=2e-4, atol=2e-4)


def _noised(guidance: Any, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = guidance._coeffs(t)
    return alpha * latents + sigma * noise, t


@pytest.mark.full
def test_the_fake_learns_by_loss_lora_and_the_base_stays(make) -> None:
    guidance = make("vsd", lora_cfg_training=False)
    utils = prompts(text_of(guidance))
    base = {
        name: p.clone()
        for name, p in guidance.frozen.pipe.unet.named_parameters()
        if ".fake." not in name
    }
    optimizer = torch.optim.AdamW(guidance.parameters(), lr=1e-2)

    def loss_now() -> float:
        torch.manual_seed(7)
        rows = text_of(guidance)[:1].repeat(16, 1, 1), torch.eye(4).view(1, 16).repeat(16, 1)
        with torch.no_grad():
            return float(guidance.fake_loss(torch.zeros(16, 4, 8, 8), *rows))

    before, start = loss_now(), {n: p.clone() for n, p in guidance.named_parameters()}
    for _ in range(10):
        loss = guidance(torch.zeros(2, 8, 8, 4), utils, **BATCH, rgb_as_latents=True)["loss_lora"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss_now() < before
    names = [name for name, p in guidance.named_parameters() if torch.equal(p, start[name])]
    assert not names
    after = dict(guidance.frozen.pipe.unet.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in base.items())
    assert {"lora_layers.0", "camera_embedding.linear_1.weight"} <= {*guidance.state_dict()}


def test_numbers_of_four_move_on_with_update_step(make) -> None:
    guidance = make("sds", max_step_percent=[5000, 0.98, 0.5, 5001], grad_clip=[0, 2.0, 8.0, 1000])
    assert (guidance.min_step, guidance.max_step, guidance.grad_clip) == (20, 980, 2.0)
    guidance.update_step(0, 5001)
    assert (guidance.max_step, guidance.grad_clip) == (500, 8.0)


def test_latents_rendered_directly_skip_the_autoencoder(make) -> None:
    guidance = make("sds")
    latents = torch.randn(2, 20, 20, 4, generator=torch.manual_seed(0)).requires_grad_()
    out = guidance(latents, prompts(text_of(guidance)), **BATCH, rgb_as_latents=True)
    out["loss_sds"].backward()
    assert float(latents.grad.abs().sum()) > 0


def test_what_can_t_be_done_is_said(make) -> None:
    with pytest.raises(ValueError, match=r"^kind: expected one of sds, .* got 'sdss'"):
        make("sdss")
    with pytest.raises(ValueError, match=r"^weighting_strategy: expected one of sds, .* got 'x'"):
        make("sds", weighting_strategy="x")
    guidance = make("vsd")
    utils = prompts(text_of(guidance))
    with pytest.raises(ValueError, match=r"^camera_condition_type: expected extrinsics with c2w"):
        guidance(rgb(), utils, **{**BATCH, "c2w": None})
    utils.use_perp_neg = True
    with pytest.raises(ValueError, match=r"^prompt_processor\.use_perp_neg: expected false"):
        guidance(rgb(), utils, **BATCH)
