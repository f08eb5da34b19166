"""ScoreGuidance: its gradient reaches a renderer, its teacher stays, its fake learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from support.runs import fingerprint
from torch import Tensor, nn

from stepdistill.families.registry import family_for
from stepdistill.losses.score_options import GRADIENT_KINDS, ScoreGradientConfig
from stepdistill.particles.guidance import ScoreGuidance
from stepdistill.particles.options import FakeConfig
from stepdistill.particles.side_inputs import SideInputs
from stepdistill.particles.voxels import VoxelScene, orbit, turntable
from stepdistill.testing.tiny import TINY, unet
from stepdistill.testing.tiny_parts import TEXT_WIDTH

CAMERA = orbit(torch.tensor([0.0, 1.0]), torch.tensor([0.1, -0.2]))


def loaded(name: str = "sd") -> Any:
    pipeline = TINY[name]()
    return family_for(type(pipeline).__name__)(pipeline)


def guided(kind: str = "vsd", family: Any = None, **more: Any) -> ScoreGuidance:
    options = {"negative_prompt": "ugly"} if kind == "nfsd" else {}
    fake = FakeConfig(rank=2, learning_rate=1e-2)
    config = ScoreGradientConfig(kind=kind)
    return ScoreGuidance(family or loaded(), ["a cat"], config, fake=fake, **options, **more)


def rendered(size: int = 16) -> nn.Parameter:
    return nn.Parameter(0.3 * torch.randn(2, 3, size, size, generator=torch.manual_seed(0)))


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_every_gradient_reaches_a_renderer_and_leaves_the_teacher(kind) -> None:
    guidance, pixels = guided(kind), rendered(20)  # another size than the model's
    before = fingerprint(guidance.net.state_dict(), skip_adapters=True)
    guidance(pixels, 0).backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0
    fit = guidance.fit_fake(0)
    assert (fit is None) == (kind != "vsd")
    assert fingerprint(guidance.net.state_dict(), skip_adapters=True) == before


def test_pixels_have_a_graph_to_their_latents_where_they_have_one_themselves() -> None:
    """The autoencoder is frozen: data encoded for a cache or a batch builds none."""
    family = loaded()
    assert not family.latents(torch.zeros(1, 3, 16, 16)).requires_grad
    assert family.latents(torch.zeros(1, 3, 16, 16, requires_grad=True)).requires_grad


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux", "pixart", "wan", "dit"])
def test_other_families_are_guided_alike(family) -> None:
    prompt = 3 if family == "dit" else "a cat"
    guidance = ScoreGuidance(loaded(family), [prompt], ScoreGradientConfig(kind="vsd"))
    latents = torch.randn(2, *guidance.shape, generator=torch.manual_seed(0)).requires_grad_()
    guidance.of_latents(latents, 0).backward()
    assert bool(latents.grad.abs().sum() > 0)
    assert guidance.fit_fake(0) is not None


@pytest.mark.full
def test_the_fake_learns_what_it_is_shown() -> None:
    """Zeros: at the draws of step 0 again, its loss has fallen."""
    guidance = guided()
    guidance.of_latents(torch.zeros(4, *guidance.shape), 0)
    first, *_, again = [guidance.fit_fake(step) for step in (0, 1, 2, 3, 4, 5, 6, 7, 0)]
    assert again < 0.97 * first


@pytest.mark.full
def test_draws_are_keyed_by_seed_and_step_and_the_state_goes_on() -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))

    def grads(guidance: ScoreGuidance, steps: range) -> list[Tensor]:
        made = []
        for step in steps:
            x = latents.clone().requires_grad_()
            guidance.of_latents(x, step).backward()
            guidance.fit_fake(step)
            made.append(x.grad)
        return made

    whole = guided(seed=3)
    all_of = grads(whole, range(4))
    first, second = guided(seed=3), guided(seed=3)
    grads(first, range(2))
    second.load_state_dict(first.state_dict())
    for one, other in zip(grads(second, range(2, 4)), all_of[2:], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(grads(guided(seed=4), range(1))[0], all_of[0])


@pytest.mark.full
def test_a_camera_is_told_to_the_fake_alone_through_a_stock_unet_s_class_labels() -> None:
    guidance = guided(camera=True)
    seen: list[tuple[bool, Any]] = []
    guidance.net.register_forward_pre_hook(
        lambda net, args, kwargs: seen.append(
            (net.class_embedding is not None, kwargs.get("class_labels"))
        ),
        with_kwargs=True,
    )
    inputs = SideInputs(camera=CAMERA)
    guidance(rendered(), 0, inputs).backward()
    guidance.fit_fake(0)
    assert guidance.net.class_embedding is None
    (teacher, labels_of_teacher), (fake, _), (fitted, _) = seen
    assert (teacher, fake, fitted) == (False, True, True)
    assert labels_of_teacher is None
    before = {n: p.clone() for n, p in guidance.embedding.named_parameters()}
    guidance.fit_fake(1)
    moved = [n for n, p in guidance.embedding.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)
    assert {"camera.linear_1.weight", "camera.linear_2.bias"} <= {*guidance.state_dict()}


def test_another_camera_is_another_score_of_the_fake() -> None:
    guidance = guided(camera=True)
    fake = guidance._asked("fake", SideInputs(camera=CAMERA))
    other = guidance._asked("fake", SideInputs(camera=CAMERA.flip(0)))
    x_t, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5).double()
    cond = guidance.family.encode(["a cat", "a cat"])
    with torch.no_grad():
        assert not torch.allclose(fake(x_t, t, cond).eps, other(x_t, t, cond).eps)


@pytest.mark.full
def test_the_fake_with_its_camera_is_a_stock_unet_of_projected_class_labels() -> None:
    """class_embed_type "projection" of 16 numbers: the same weights give the same answer."""
    guidance, (x_t, t) = guided(camera=True), (torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7]))
    cond = guidance.family.encode(["a cat", "a dog"])
    stock = unet(
        TEXT_WIDTH, class_embed_type="projection", projection_class_embeddings_input_dim=16
    ).eval()
    stock.class_embedding.load_state_dict(guidance.embedding.state_dict())
    rest = stock.load_state_dict(loaded().net.state_dict(), strict=False)
    assert all(name.startswith("class_embedding.") for name in rest.missing_keys)
    model_t = guidance.family.path.model_time(t.double())
    with torch.no_grad():  # an untrained LoRA adds nothing
        made = guidance._asked("fake", SideInputs(camera=CAMERA))(x_t, t.double(), cond)
        labels = CAMERA.flatten(1)
        answer = stock(x_t, model_t.float(), cond["prompt_embeds"], class_labels=labels).sample
    torch.testing.assert_close(made.raw, answer)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["vsd", "csd"])
def test_dreammat_s_controlnet_of_22_channels_steers_teacher_and_fake(kind) -> None:
    """A stock ControlNetModel with a changed last layer, as training leaves it; the null passes
    get the same control."""
    family = loaded()
    controlnet = ControlNetModel.from_unet(family.net, conditioning_channels=22)
    guidance = guided(kind, family, controlnet=controlnet, camera=kind == "vsd")
    latents = torch.randn(2, *guidance.shape, generator=torch.manual_seed(0))
    control = torch.rand(2, 22, 16, 16, generator=torch.manual_seed(1))

    def grad(control: Tensor | None) -> Tensor:
        x = latents.clone().requires_grad_()
        guidance.of_latents(x, 0, SideInputs(CAMERA, control)).backward()
        return x.grad

    plain = grad(None)
    torch.testing.assert_close(grad(control), plain)  # zero convolutions: no residual yet
    ends = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
    for one in [*ends, controlnet.controlnet_cond_embedding.conv_out]:
        nn.init.normal_(one.weight, std=0.3)
    changed = grad(control)
    assert float((changed - plain).abs().max()) > 1e-4
    assert not torch.allclose(grad(1 - control), changed)
    guidance.fit_fake(0)
    with pytest.raises(ValueError, match=r"^control: expected images \(B, 22, H, W\) .* 3, 16, 16"):
        guidance.of_latents(latents, 0, SideInputs(None, control[:, :3]))


def test_what_can_t_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^camera: expected a UNet2DConditionModel"):
        guided(family=loaded("sd3"), camera=True)
    with pytest.raises(ValueError, match=r"^camera: expected camera-to-world .* got \(2, 3, 4\)"):
        SideInputs(camera=CAMERA[:, :3])
    with pytest.raises(ValueError, match=r"^prompts: expected one or more"):
        ScoreGuidance(loaded(), [], ScoreGradientConfig())
    with pytest.raises(ValueError, match=r"^nfsd: expected a negative prompt"):
        ScoreGuidance(loaded(), ["a"], ScoreGradientConfig(kind="nfsd"))


def test_a_voxel_grid_is_seen_from_where_the_camera_is() -> None:
    """One bright voxel off the axis: right of the middle in front, left of it from behind."""
    scene = VoxelScene(9, torch.manual_seed(0))
    with torch.no_grad():
        scene.grid[:, 0] = -30.0
        scene.grid[0, 0, 4, 4, 7] = 30.0  # z, y, x
        scene.grid[:, 1:] = 10.0
        front, behind = scene(orbit(torch.tensor([0.0, torch.pi]), torch.zeros(2)), 16, 16)
        above = scene(orbit(torch.zeros(1), torch.tensor([0.4])), 16, 16)[0]
    ys, xs = torch.meshgrid(*[torch.arange(16.0)] * 2, indexing="ij")

    def middle(image: Tensor) -> tuple[float, float]:
        light = image[0] + 1
        return float((light * xs).sum() / light.sum()), float((light * ys).sum() / light.sum())

    (x, y), (x_behind, _) = middle(front), middle(behind)
    assert x > 10
    assert x + x_behind == pytest.approx(15, abs=0.2)
    assert y == pytest.approx(7.5, abs=0.2)
    assert middle(above)[1] == pytest.approx(7.5, abs=0.6)  # looking at the origin
    assert turntable(scene, 3, 8).shape == (3, 3, 8, 8)


def test_an_empty_grid_is_black_and_a_solid_one_its_colour() -> None:
    scene = VoxelScene(6, torch.manual_seed(0))
    with torch.no_grad():
        scene.grid[:, 0], scene.grid[:, 1:] = -40.0, 20.0
        assert float(scene(CAMERA, 8, 8).max()) == pytest.approx(-1)
        scene.grid[:, 0] = 40.0
        assert float(scene(CAMERA, 8, 8)[:, :, 4, 4].min()) > 0.99


def test_a_scene_is_optimised_through_the_renderer() -> None:
    """Its density and its colour get gradients from every camera."""
    scene, guidance = VoxelScene(8, torch.manual_seed(0)), guided("sds")
    guidance(scene(CAMERA, *guidance.size), 0, SideInputs(camera=CAMERA)).backward()
    grad = scene.grid.grad
    assert grad is not None
    assert bool((grad.abs().sum((0, 2, 3, 4)) > 0).all())
