"""Tiny pipelines: small, deterministic, savable, and reached by every LoRA target."""

from __future__ import annotations

import pytest
import torch
from support.runs import NETWORKS, needs_blocks
from torch import nn

from stepdistill.families.registry import FAMILIES, load_family
from stepdistill.testing.tiny import TINY, tiny_sd, tiny_sd3


def prompts_of(family):
    return [0, 3] if family.conditioning == "label" else ["a cat", "two dogs"]


def test_every_family_has_a_tiny_pipeline() -> None:
    assert set(FAMILIES) <= set(TINY)


@pytest.mark.sampled(family=NETWORKS)
def test_denoisers_stay_small(family) -> None:
    limit = 300_000 if family.name == "z_image" else 100_000  # its time embedding has 280,000
    assert sum(p.numel() for p in family.net.parameters()) <= limit


def test_seed_decides_every_weight() -> None:
    first, again, other = tiny_sd(seed=1), tiny_sd(seed=1), tiny_sd(seed=2)
    for name in ("unet", "vae", "text_encoder"):
        a, b, c = (dict(getattr(p, name).named_parameters()) for p in (first, again, other))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(not torch.equal(a[key], c[key]) for key in a)


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    tiny_sd()
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.sampled("dit", "edm", "flux", "sd", "sd3", "wan", "unet2d", "pixart")
@pytest.mark.parametrize("name", [*sorted(TINY), "sd3_t5"])
def test_save_and_reload_keep_the_network_output(name, tmp_path) -> None:
    pipeline = tiny_sd3(with_t5=True) if name == "sd3_t5" else TINY[name]()
    pipeline.save_pretrained(tmp_path)
    again = load_family(tmp_path)
    before = type(again)(pipeline)
    x = torch.randn(2, *before.sample_shape())
    t = torch.tensor([999.0, 20.0])
    with torch.no_grad():
        out, out_again = (f.forward(f.net, x, t, f.encode(prompts_of(f))) for f in (before, again))
    assert out.std() > 1e-3  # a dead network would agree with anything
    weights, read = before.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(weights[name], read[name]) for name in weights.keys() | read.keys())
    assert (out - out_again).abs().max() < 2e-6  # a last bit, by where the weights lie in memory


@pytest.mark.sampled(family=NETWORKS)
def test_every_lora_target_names_a_module(family) -> None:
    names = [n for n, m in family.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for target in family.lora_targets:
        assert any(n == target or n.endswith("." + target) for n in names), target


@pytest.mark.sampled(family=NETWORKS)
def test_feature_blocks_name_modules_and_widths(family) -> None:
    from stepdistill.families.features import capture

    needs_blocks(family)
    blocks = family.feature_blocks()
    assert "mid" in blocks
    x = torch.randn(2, *family.sample_shape())
    with torch.no_grad(), capture(family.net, blocks) as found:
        family.forward(family.net, x, torch.tensor([9.0, 9.0]), family.encode(prompts_of(family)))
    for name, block in blocks.items():
        axis = 1 if block.layout == "map" else 2
        assert found[name].ndim == (4 if block.layout == "map" else 3)
        assert found[name].shape[axis] == block.dim, name
