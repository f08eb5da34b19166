"""LPIPS against the lpips package on the same weights; its range, gradient, options and errors."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from stepdistill.losses.rewards import LPIPSOptions
from stepdistill.rewards.perceptual import LPIPSScorer

NETS: dict[str, Callable[[], nn.Module]] = {
    "alex": lambda: torchvision.models.alexnet().features,
    "vgg": lambda: torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]),
}


def features_of(backbone: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETS[backbone]()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Random backbones in torchvision's layout."""
    folder = tmp_path_factory.mktemp("backbones")
    for name in NETS:
        state = {f"features.{k}": v for k, v in features_of(name).state_dict().items()}
        if name == "alex":
            save_file({**state, "classifier.1.weight": torch.zeros(2)}, folder / "alex.safetensors")
        else:
            save_file(state, folder / "vgg.safetensors")
    return {path.name: path for path in folder.iterdir()}


def scorer(
    files: dict[str, Path], name: str = "alex.safetensors", **options: object
) -> LPIPSScorer:
    return LPIPSScorer(
        LPIPSOptions(backbone=name.split(".")[0], weights=str(files[name]), **options)  # type: ignore[arg-type]
    ).requires_grad_(False)


def package(backbone: str) -> nn.Module:
    """The library itself on the same random backbone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
    layers = features_of(backbone)
    for block in net.net.children():
        for index, layer in block.named_children():
            layer.load_state_dict(layers[int(index)].state_dict())
    return net


def pair(size: int = 32, bsz: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, bsz, 3, size, size, generator=generator) * 2 - 1
    return a, b


@pytest.mark.full
@pytest.mark.parametrize("name", ["alex.safetensors", "vgg.safetensors"])
def test_equals_the_library_on_the_same_weights(files, name) -> None:
    a, b = pair()
    with torch.no_grad():
        own, theirs = scorer(files, name)(a, b), package(name.split(".")[0])(a, b).flatten()
    assert own.shape == (2,)
    assert float(theirs.min()) > 1e-3
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.full
def test_images_are_read_in_minus_one_to_one(files) -> None:
    """The library told that images are in [0, 1] agrees; untold, it would give another number."""
    a, b = pair()
    net = package("alex")
    with torch.no_grad():
        own = scorer(files)(a, b)
        told = net((a + 1) / 2, (b + 1) / 2, normalize=True).flatten()
        untold = net((a + 1) / 2, (b + 1) / 2).flatten()
    torch.testing.assert_close(own, told, rtol=1e-5, atol=1e-7)
    assert float((own / untold - 1).abs().min()) > 0.05


@pytest.mark.full
def test_zero_on_equal_images_alone(files) -> None:
    a, b = pair()
    with torch.no_grad():
        assert scorer(files)(a, a).tolist() == [0.0, 0.0]
        assert float(scorer(files)(a, b).min()) > 0.0


@pytest.mark.full
def test_every_sample_has_its_own_distance(files) -> None:
    a, b = pair(bsz=3)
    net = scorer(files)
    with torch.no_grad():
        alone = torch.cat([net(a[i : i + 1], b[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(net(a, b), alone, rtol=1e-5, atol=1e-7)


def test_gradient_reaches_the_image_and_descends(files) -> None:
    a, b = pair()
    a.requires_grad_(True)
    net = scorer(files)
    before = net(a, b)
    (grad,) = torch.autograd.grad(before.sum(), a)
    assert bool(grad.isfinite().all())
    slope = float(grad.square().sum())
    step = 1e-3 * slope / float(grad.square().sum().sqrt()) ** 2
    with torch.no_grad():
        after = net(a - step * grad, b)
    drop = float((before.detach() - after).sum())
    assert drop == pytest.approx(step * slope, rel=0.1)
    assert all(p.grad is None for p in net.parameters())


def test_dead_positions_have_gradient_zero_not_nan(files) -> None:
    net = scorer(files)
    first = net.net.net.slice1[0]
    with torch.no_grad():
        first.weight.zero_()
        first.bias.fill_(-1.0)
    a, b = pair()
    a.requires_grad_(True)
    (grad,) = torch.autograd.grad(net(a, b).sum(), a)
    assert float(grad.abs().max()) == 0.0


def test_resize_is_bilinear_and_first(files) -> None:
    a, b = pair(48)
    small = [F.interpolate(x, (32, 32), mode="bilinear", align_corners=False) for x in (a, b)]
    with torch.no_grad():
        torch.testing.assert_close(scorer(files, resize=32)(a, b), scorer(files)(*small))


def test_images_as_large_as_resize_below_keep_their_size(files) -> None:
    """consistency_models: `if x_start.shape[-1] < 256`, then 224."""
    options = {"resize": 32, "resize_below": 48}
    for size, resized in ((40, True), (48, False)):
        a, b = pair(size)
        with torch.no_grad():
            made, small, own = (scorer(files, **o)(a, b) for o in (options, {"resize": 32}, {}))
        assert torch.equal(made, small if resized else own)
        assert float((small / own - 1).abs().min()) > 1e-3
    with pytest.raises(ValueError, match="resize_below: expected resize beside it"):
        LPIPSOptions(resize_below=256)


def test_average_pooling_replaces_max_pooling(files) -> None:
    a, b = pair(64)
    net = scorer(files, pooling="avg")
    kinds = [type(layer) for layer in net.net.net.modules()]
    assert kinds.count(nn.AvgPool2d) == 2
    assert nn.MaxPool2d not in kinds
    with torch.no_grad():
        assert float((net(a, b) / scorer(files)(a, b) - 1).abs().max()) > 1e-2


def test_autocast_does_not_coarsen_it(files) -> None:
    a, b = pair()
    net = scorer(files)
    with torch.no_grad():
        plain = net(a, b)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net(a.to(torch.bfloat16).float(), b), net(a.bfloat16(), b))
            torch.testing.assert_close(net(a, b), plain, rtol=0, atol=0)


def test_weights_of_another_network_are_refused(files) -> None:
    with pytest.raises(ValueError, match=r"expected torchvision's alex weights.*features\.0"):
        LPIPSScorer(LPIPSOptions(backbone="alex", weights=str(files["vgg.safetensors"])))


def test_missing_file_and_package_are_said_by_the_check(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"weights to be a file, got 'nowhere\.safetensors'"):
        LPIPSScorer.check(LPIPSOptions(weights="nowhere.safetensors"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "stepdistill\[rewards\]"'):
        LPIPSScorer.check(LPIPSOptions())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_pickled_file_is_refused_unread(tmp_path, suffix) -> None:
    path = tmp_path / f"vgg{suffix}"
    torch.save({}, path)
    with pytest.raises(
        ValueError, match=r"expected a \.safetensors file.*can run code.*weights: null"
    ):
        LPIPSScorer(LPIPSOptions(weights=str(path)))


def test_an_empty_cache_without_network_names_the_option(monkeypatch, tmp_path) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"no route to host.*weights: PATH"):
        LPIPSScorer(LPIPSOptions(backbone="alex"))


@pytest.mark.parametrize("by", [torch.zeros(2, 3, 16, 16), ["a", "b"]], ids=["size", "text"])
def test_references_of_another_shape_are_refused(files, by) -> None:
    with pytest.raises(ValueError, match="expected references of shape"):
        scorer(files)(pair()[0], by)


def test_numbers_of_images_and_references_must_agree(files) -> None:
    a, b = pair()
    with pytest.raises(ValueError, match=r"B of what they are judged by, got .* and 1"):
        scorer(files)(a, b[:1])
