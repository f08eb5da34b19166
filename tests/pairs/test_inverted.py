"""Real images inverted to noise: the closed form of a Gaussian teacher, and the way back."""

# Shapes: B batch, C channels, H, W.

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image
from support.runs import teacher_dir
from torch import Tensor

from stepdistill.core.path import FlowPath, NoisePath, VEPath, VPPath, expand
from stepdistill.core.solvers import ode_invert, ode_solve
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond
from stepdistill.pairs.dataset import PairDataset
from stepdistill.pairs.files import MANIFEST
from stepdistill.pairs.inverted import invert_pairs
from stepdistill.pairs.teacher import make_pairs
from stepdistill.testing.analytic import GaussianTeacher, MixtureTeacher

STD, G = 0.5, 2.0
PATHS: dict[str, tuple[NoisePath, Any]] = {
    "flow": (FlowPath(), "flow"),
    "vp": (VPPath.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2), "eps"),
    "ve": (VEPath(), "x0"),
}


def conds(bsz: int) -> tuple[Cond, Cond]:
    """Means 1, 2, ... and their null 0: guided by G the mean is G times the mean."""
    mean = torch.arange(1, bsz + 1).double().view(-1, 1, 1, 1).expand(bsz, 1, 2, 2).clone()
    return Cond({"mean": mean}), Cond({"mean": torch.zeros_like(mean)})


def exact_noise(path: NoisePath, x0: Tensor, mean: Tensor) -> Tensor:
    """x_1 on the exact trajectory, alpha mu + sqrt(V) (x0 - mu) / std, in units of the prior."""
    one = torch.ones(len(x0), dtype=torch.float64)
    alpha, sigma = (expand(c, x0) for c in path.coeffs(one))
    x_1 = alpha * mean + (alpha**2 * STD**2 + sigma**2).sqrt() * (x0 - mean) / STD
    return x_1 / path.prior(torch.ones(()))


@pytest.mark.parametrize(("name", "gain"), [("flow", 3.5), ("ve", 2.5), ("vp", 1.8)])
def test_inverted_noise_is_the_closed_form(name, gain):
    """Second order where tau is even in t; on VP the first step in tau is the root of that in t."""
    path, kind = PATHS[name]
    cond, null = conds(4)
    x0 = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    expected = exact_noise(path, x0, G * cond["mean"])
    errors = []
    for num_steps in (50, 100):
        teacher = GaussianTeacher(path, STD, kind)
        found = ode_invert(teacher, x0, cond, null, G, uniform_grid(num_steps))
        errors.append(float((found - expected).abs().max() / expected.abs().max()))
    assert errors[1] < 3e-3, errors
    assert errors[0] / errors[1] > gain, errors


@pytest.mark.full
@pytest.mark.parametrize("name", PATHS)
def test_sampling_from_it_gives_the_image_back(name):
    """On a mixture of two points' neighbourhoods, so the trajectories are curved."""
    path, kind = PATHS[name]
    means = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    teacher = MixtureTeacher(path, means, STD, kind=kind)
    x0 = teacher.sample(8, torch.Generator().manual_seed(1)).double()
    cond, _ = conds(8)
    times = uniform_grid(250)
    back = ode_solve(teacher, ode_invert(teacher, x0, cond, times=times), cond, times=times)
    assert float((back - x0).abs().max()) < 3e-2
    fewer = ode_solve(teacher, torch.zeros_like(x0), cond, times=times)
    assert float((fewer - x0).abs().max()) > 0.5, "another noise, another image"


def test_the_network_is_never_asked_where_it_was_not_trained():
    path = VEPath()
    asked: list[float] = []

    class Spy(GaussianTeacher):
        def raw(self, x_t: Tensor, t: Tensor, *rest: Any) -> Any:
            asked.append(float(path.coeffs(t)[1][0]))
            return super().raw(x_t, t, *rest)

    cond, _ = conds(2)
    ode_invert(Spy(path, STD, "x0"), torch.zeros(2, 1, 2, 2), cond, times=uniform_grid(20))
    assert min(asked) >= path.sigma_min
    assert max(asked) == pytest.approx(80.0)


# ------------------------------------------------------------------------------------- pair sets
class Images(torch.utils.data.Dataset):
    """Ten images of one grey each, so that their latents are easy to tell."""

    def __init__(self, first: float = 0.0) -> None:
        self.first = first

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "prompt": "x" * (index + 1),
            "image": torch.full((3, 2, 2), self.first + index / 10),
        }


def make(folder, images=None, num_pairs=10, **options):
    calls: list[int] = []

    def encode(prompts):
        calls.append(len(prompts))
        mean = torch.tensor([float(len(p)) for p in prompts]).view(-1, 1, 1, 1)
        return Cond({"mean": mean.expand(-1, 1, 2, 2).clone()})

    made = invert_pairs(
        GaussianTeacher(FlowPath(), STD, "flow"),
        encode,
        lambda bsz: Cond({"mean": torch.zeros(bsz, 1, 2, 2)}),
        lambda x: x[:, :1],
        images or Images(),
        folder,
        num_pairs,
        shape=(1, 2, 2),
        model="analytic",
        batch_size=3,
        shard_size=4,
        progress=False,
        **{"guidance": G, **options},
    )
    return made, calls


def test_a_pair_is_an_image_and_its_own_noise(tmp_path):
    dataset, _ = make(tmp_path)
    assert len(dataset) == 10
    for index in range(10):
        item = dataset[index]
        assert item["prompt"] == "x" * (index + 1)
        torch.testing.assert_close(item["x0"], torch.full((1, 2, 2), index / 10))
        expected = (item["x0"] - G * (index + 1)) / STD
        torch.testing.assert_close(item["noise"], expected, rtol=1e-3, atol=1e-3)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["settings"]["solver"] == "heun, real images inverted"


@pytest.mark.full
def test_a_resumed_set_is_the_same_and_other_images_are_refused(tmp_path):
    make(tmp_path / "whole")
    make(tmp_path / "part")
    (tmp_path / "part" / "shard-00001.safetensors").unlink()
    _, calls = make(tmp_path / "part")
    assert calls == [3, 1], "the missing shard alone"
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "part" / path.name).read_bytes()
    with pytest.raises(ValueError, match="prompts_hash"):
        make(tmp_path / "part", Images(first=0.5))
    with pytest.raises(ValueError, match="from 1 to 10, the number of images, got 11"):
        make(tmp_path / "other", num_pairs=11)


@pytest.mark.full
def test_command_inverts_a_folder_for_a_stock_teacher(tmp_path, tmp_path_factory):
    model = teacher_dir("sd_v", tmp_path_factory)
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (40, 32), (80 * index, 100, 50)).save(folder / f"{index}.png")
    lines = [{"file_name": f"{i}.png", "text": f"grey {i}"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options: dict[str, Any] = {"resolution": 32, "num_steps": 4, "batch_size": 2}
    make_pairs(str(model), None, tmp_path / "pairs", invert=folder, **options)
    dataset = PairDataset(tmp_path / "pairs")
    assert [dataset[i]["prompt"] for i in range(3)] == ["grey 0", "grey 1", "grey 2"]
    noise = torch.stack([dataset[i]["noise"] for i in range(3)])
    assert noise.isfinite().all()
    assert not torch.equal(noise[0], noise[1])
    (folder / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images that can be read, got .*2\.png"):
        make_pairs(str(model), None, tmp_path / "bad", invert=folder, **options)
    with pytest.raises(ValueError, match=r"--prompts_file .* or --invert .*, got neither"):
        make_pairs(str(model), None, tmp_path / "none", num_pairs=2)
    with pytest.raises(ValueError, match="--num_pairs with --prompts_file"):
        make_pairs(str(model), folder / "metadata.jsonl", tmp_path / "none")
