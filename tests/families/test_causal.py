"""Block-causal Wan: later chunks do not leak, the cache is the mask, and SkyReels' class is it."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel

from stepdistill.config.tuning import Tuning
from stepdistill.core.causal import causal_input
from stepdistill.core.method import Role
from stepdistill.families.causal import caching, is_causal, make_causal
from stepdistill.families.wan import WanFamily
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.tiny_video import tiny_wan, wan_transformer

CHUNK, CHUNKS = 2, 3


@pytest.fixture
def clip():
    """(x (2, 4, 6, 4, 8), t (2, 6) of each frame, text, a causal network and the plain one)."""
    torch.manual_seed(0)
    plain = wan_transformer().eval().double().requires_grad_(False)
    net = make_causal(copy.deepcopy(plain), CHUNK)
    x, text = torch.randn(2, 4, CHUNK * CHUNKS, 4, 8).double(), torch.randn(2, 7, 16).double()
    t = torch.tensor([[937.0, 625.0, 0.0], [999.0, 833.0, 625.0]]).repeat_interleave(CHUNK, 1)
    return x, t, text[..., : plain.config.text_dim], net, plain


def call(net, x, t, text):
    tokens = t.double() if t.ndim == 1 else t.double().repeat_interleave(2 * 4, dim=1)
    return net(x, timestep=tokens, encoder_hidden_states=text, return_dict=False)[0]


def test_no_chunk_sees_a_later_one(clip) -> None:
    x, t, text, net, plain = clip
    other = x.clone()
    other[:, :, CHUNK * 2 :] += 1.0
    made, again = call(net, x, t, text), call(net, other, t, text)
    assert torch.equal(made[:, :, : CHUNK * 2], again[:, :, : CHUNK * 2])
    assert not torch.equal(made[:, :, CHUNK * 2 :], again[:, :, CHUNK * 2 :])
    leaks = call(plain, x, t, text) - call(plain, other, t, text)
    assert float(leaks[:, :, :CHUNK].abs().max()) > 1e-3  # the teacher's frames see each other


def test_one_chunk_of_all_frames_is_the_plain_network(clip) -> None:
    x, t, text, _, plain = clip
    whole = make_causal(copy.deepcopy(plain), CHUNK * CHUNKS)
    assert torch.allclose(call(whole, x, t, text), call(plain, x, t, text), atol=1e-12)
    assert whole.state_dict().keys() == plain.state_dict().keys()


def test_cached_chunks_are_the_masked_pass(clip) -> None:
    x, t, text, net, _ = clip
    masked = call(net, x, t, text)
    with caching(net) as state, torch.no_grad():
        for start in range(0, CHUNK * CHUNKS, CHUNK):
            state.start, part = start, slice(start, start + CHUNK)
            state.keeps = False
            before = call(net, x[:, :, part], t[:, start], text)
            state.keeps = True
            made = call(net, x[:, :, part], t[:, start], text)
            assert torch.equal(before, made)  # a call that keeps nothing leaves the cache alone
            assert torch.allclose(made, masked[:, :, part], atol=1e-10)
        state.keeps = True
        with torch.enable_grad(), pytest.raises(AssertionError, match="remembered is a value"):
            call(net, x[:, :, part], t[:, start], text)
    assert torch.equal(call(net, x, t, text), masked)  # and the mask is back


def test_it_is_skyreels_stock_network(clip) -> None:
    x, t, text, net, plain = clip
    config = {k: v for k, v in plain.config.items() if not k.startswith("_")}
    stock = SkyReelsV2Transformer3DModel(**config, num_frame_per_block=CHUNK).double().eval()
    stock.load_state_dict(net.state_dict())
    with torch.no_grad():
        theirs = stock(
            x, timestep=t.double(), encoder_hidden_states=text, enable_diffusion_forcing=True,
            return_dict=False,
        )[0]  # fmt: skip
    assert float((theirs - call(net, x, t, text)).abs().max()) < 1e-5


def test_skyreels_masks_no_chunk_of_one_frame(clip) -> None:
    """Why export refuses chunk 1: the stock class takes 1 for no mask, and every frame sees all."""
    x, t, text, _, plain = clip
    config = {k: v for k, v in plain.config.items() if not k.startswith("_")}
    stock = SkyReelsV2Transformer3DModel(**config, num_frame_per_block=1).double().eval()
    stock.load_state_dict(plain.state_dict())
    framed = {"timestep": t.double(), "enable_diffusion_forcing": True, "return_dict": False}
    with torch.no_grad():
        theirs = stock(x, encoder_hidden_states=text, **framed)[0]
    assert float((theirs - call(plain, x, t, text)).abs().max()) < 1e-5
    by_frames = make_causal(copy.deepcopy(plain), 1)
    assert float((theirs - call(by_frames, x, t, text)).abs().max()) > 1e-3


def test_a_role_asks_for_it_and_only_the_student_is_causal() -> None:
    family = WanFamily(tiny_wan())
    roles = {"teacher": Role(), "student": Role(train=True, extra_inputs=(causal_input(1),))}
    bank = RoleBank(family, roles, Tuning(student="full"))
    assert isinstance(bank.base_of("student"), WanTransformer3DModel)
    assert is_causal(bank.base_of("student"))
    assert not is_causal(bank.base_of("teacher"))
    cond, x = family.encode(["a"]), torch.randn(1, 4, 2, 4, 8)
    t = torch.tensor([[0.9, 0.2]]).double()
    with torch.no_grad():
        pred = bank["student"](x, t, cond)
        first = bank["student"](x[:, :, :1], t[:, :1], cond)
    assert torch.allclose(pred.x0[:, :, :1], first.x0, atol=1e-5)
    sigma = t.view(1, 1, 2, 1, 1).float()
    assert torch.allclose(pred.x0, x - sigma * pred.raw, atol=1e-6)
    with pytest.raises(ValueError, match="expected tuning 'full' with extra inputs"):
        RoleBank(WanFamily(tiny_wan()), roles, Tuning(student="lora"))
    with pytest.raises(ValueError, match="expected extra inputs the stock network has"):
        RoleBank(WanFamily(tiny_wan(boundary_ratio=0.875)), roles, Tuning(student="full"))
