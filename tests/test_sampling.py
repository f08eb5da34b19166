"""The few-step sampler: images depend on (seed, index, prompt) and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.roles.rolebank import RoleBank
from stepdistill.sampling import keyed_noise, sample_images, sample_latents, to_pil

PROMPTS = ["a cat", "a dog", "a cat"]
SPEC = SamplerSpec(uniform_grid(2), "renoise")


def student(family):
    bank = RoleBank(family, {"teacher": Role(), "student": Role(train=True)}, Tuning(rank=2))
    generator = torch.Generator().manual_seed(1)
    for param in bank.members("student").values():
        param.data += 0.05 * torch.randn(param.shape, generator=generator)
    return bank["student"]


def prompts(family, count: int = 3):
    return [3, 5, 3][:count] if family.conditioning == "label" else PROMPTS[:count]


# And those that pad or mask prompts of different lengths.
@pytest.mark.sampled("dit", "edm", "sd3", "flux", "wan_i2v")
def test_image_does_not_depend_on_its_batch(family) -> None:
    net, asked = student(family), prompts(family)
    together = sample_latents(net, family, SPEC, asked, seed=4)
    for i, prompt in enumerate(asked):
        alone = sample_latents(net, family, SPEC, [prompt], seed=4, first_index=i)
        assert (alone[0] - together[i]).abs().max() < 1e-4 * together.abs().max()


@pytest.mark.sampled("dit", "edm", "sd3")
def test_same_prompt_other_index_or_seed_is_another_image(family) -> None:
    net, asked = student(family), prompts(family)
    latents = sample_latents(net, family, SPEC, asked, seed=4)
    assert (latents[0] - latents[2]).abs().max() > 0.1
    other = sample_latents(net, family, SPEC, asked, seed=5)
    assert (latents - other).abs().flatten(1).amax(dim=1).min() > 0.1
    assert torch.equal(latents, sample_latents(net, family, SPEC, asked, seed=4))


@pytest.mark.full
def test_batch_size_leaves_images_alone(make_family) -> None:
    family = make_family("sd_v")
    net = student(family)
    one, many = (
        sample_images(net, family, SPEC, PROMPTS, seed=4, batch_size=size) for size in (1, 8)
    )
    assert len(one) == len(many) == 3
    for a, b in zip(one, many, strict=True):
        assert a.size == (16, 16)
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


def test_one_step_is_the_students_x0(make_family) -> None:
    family = make_family("sd_v")
    net, spec = student(family), SamplerSpec((1.0,), "renoise")
    noise = keyed_noise(family.sample_shape(), 4, [0])
    with torch.no_grad():
        x0 = net(noise, torch.ones(1).double(), family.encode(["a cat"])).x0
    assert torch.allclose(sample_latents(net, family, spec, ["a cat"], seed=4), x0)


def test_guidance_of_the_spec_reaches_the_network(make_family) -> None:
    family = make_family("sd_v")
    net = student(family)
    noise = keyed_noise(family.sample_shape(), 4, [0])
    cond, null, t = family.encode(["a cat"]), family.null(1), torch.ones(1).double()
    with torch.no_grad():
        expected = net(noise, t, cond, null, 5.0).x0
    spec = SamplerSpec((1.0,), "ode", guidance=5.0)
    got = sample_latents(net, family, spec, ["a cat"], seed=4)
    assert (got - expected).abs().max() < 1e-5
    assert (got - net(noise, t, cond).x0).abs().max() > 1e-3


@pytest.mark.full
def test_size_in_pixels(make_family) -> None:
    family = make_family("sd_v")
    assert sample_images(student(family), family, SPEC, ["a"], height=24, width=8)[0].size == (
        8,
        24,
    )
    with pytest.raises(ValueError, match="multiple of"):
        sample_latents(student(make_family("sd_v")), family, SPEC, ["a"], height=15)


def test_keyed_noise_is_normal_and_keyed() -> None:
    noise = keyed_noise((4, 32, 32), 0, range(8))
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1.0) < 0.02
    assert torch.equal(noise[3:4], keyed_noise((4, 32, 32), 0, [3]))
    assert not torch.equal(noise, keyed_noise((4, 32, 32), 0, range(8), step=0))


def test_to_pil_rounds_and_clamps() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert np.asarray(to_pil(images)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_pil(images[:, :1])[0].mode == "L"
