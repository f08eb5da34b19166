"""Blocks that recompute themselves: every argument reaches them, and inputs stay as they were."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor, nn

from stepdistill.roles.checkpointing import (
    checkpoint_blocks,
    checkpointed_blocks,
    uncheckpoint_blocks,
)
from stepdistill.testing.parity import LIMIT, check_family
from stepdistill.testing.tiny import TINY
from stepdistill.testing.tiny_parts import seeded


def recompute(net: nn.Module) -> None:
    checkpoint_blocks(net, lambda: lambda: (nullcontext(), nullcontext()))


def tiny_chroma() -> ChromaTransformer2DModel:
    """Double and single blocks that get an attention mask."""
    with seeded(0):
        return ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ).eval()


def chroma_gradients(net: nn.Module) -> dict[str, Tensor]:
    """Output and gradients of a call of two rows, of which one has padded text."""
    generator, text, image = torch.Generator().manual_seed(1), 6, 4
    x_t = torch.randn(2, image, 16, generator=generator).requires_grad_()
    mask = torch.ones(2, text + image)
    mask[0, 2:text] = 0
    out = net(
        x_t,
        encoder_hidden_states=torch.randn(2, text, 16, generator=generator),
        timestep=torch.tensor([0.5, 0.7]),
        img_ids=torch.zeros(image, 3),
        txt_ids=torch.zeros(text, 3),
        attention_mask=mask,
    ).sample
    net.zero_grad()
    out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x_t": x_t.grad, **grads}


def test_chroma_s_single_blocks_keep_their_mask() -> None:
    """Diffusers 0.42's own checkpointing loses it: 0.02 in the output, 0.96 in a gradient."""
    net = tiny_chroma()
    plain = chroma_gradients(net)
    recompute(net)
    again = chroma_gradients(net)
    assert plain.keys() == again.keys()
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []


def test_the_blocks_are_run_twice_and_then_once_again() -> None:
    net = tiny_chroma()
    runs: list[int] = []
    for block in net.single_transformer_blocks:
        block.norm.register_forward_hook(lambda *_: runs.append(1))
    for wrapped, expected in ((False, 2), (True, 4), (False, 2)):
        if wrapped:
            recompute(net)
        elif runs:
            uncheckpoint_blocks(net)
        runs.clear()
        chroma_gradients(net)
        assert len(runs) == expected


def test_a_deep_copy_runs_its_own_weights() -> None:
    net = tiny_chroma()
    recompute(net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for param in twin.transformer_blocks.parameters():
            param.add_(0.1)
    assert not torch.equal(chroma_gradients(net)["out"], chroma_gradients(twin)["out"])


@pytest.mark.parametrize("by_block", [False, True])
def test_inputs_changed_in_place_are_refused(by_block) -> None:
    """Recomputed from another input than its own, a block's gradients would be wrong."""

    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1) if by_block else x).sin()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(2, 2)])

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.blocks[0](x=x)
            if not by_block:
                x.add_(1)
            return out

    net = Net()
    recompute(net)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        net(torch.ones(1, 2)).sum().backward()


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a network of blocks, got Linear"):
        recompute(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["sd", "flux", "lumina2", "unet2d"])
def test_at_least_the_blocks_that_diffusers_recomputes(name, make_family) -> None:
    family, theirs = make_family(name), []

    def note(block: Any, *args: Any, **kwargs: Any) -> Any:
        theirs.append(getattr(block, "__self__", block))
        return block(*args, **kwargs)

    family.net.enable_gradient_checkpointing(note)
    cond = family.encode(["a"] if family.conditioning == "prompt" else [0])
    family.forward(family.net, torch.zeros(1, *family.sample_shape()), torch.tensor([0.5]), cond)
    ours = {id(block) for block in checkpointed_blocks(family.net)}
    assert theirs
    assert [type(block).__name__ for block in theirs if id(block) not in ours] == []


def test_the_check_finds_a_lost_argument(monkeypatch) -> None:
    def losing(forward: Any, *args: Any, encoder_attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    def lossy(net: nn.Module, _contexts: Any) -> None:
        for block in checkpointed_blocks(net):
            block.forward = partial(losing, block.forward)

    monkeypatch.setattr("stepdistill.roles.rolebank.checkpoint_blocks", lossy)
    found = [name for name, value in check_family(TINY["pixart"]()) if not value < LIMIT]
    assert found == ["checkpointing: output and gradients"]


def test_the_check_leaves_the_network_as_it_was() -> None:
    pipeline = TINY["sd3"]()
    net = pipeline.transformer
    modules, values = dict(net.named_modules()), {n: v.clone() for n, v in net.state_dict().items()}
    check_family(pipeline)
    assert dict(net.named_modules()) == modules
    assert not hasattr(net, "peft_config")
    for block in net.transformer_blocks:
        assert block.forward == type(block).forward.__get__(block)
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
