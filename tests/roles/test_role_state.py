"""RoleBank's weights as data: EMA arithmetic, saving, loading; and discriminator heads."""

from __future__ import annotations

import copy

import pytest
import torch
from support.runs import needs_blocks

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.families.features import FeatureBlock, chosen_blocks
from stepdistill.methods.gan import GANConfig
from stepdistill.roles.heads import make_head
from stepdistill.roles.rolebank import RoleBank

ROLES = {
    "teacher": Role(),
    "student": Role(train=True),
    "target": Role(ema_of="student"),
    "disc": Role("head", train=True, features=("mid",)),
}


def build(family, layout: str) -> RoleBank:
    return RoleBank(family, ROLES, Tuning(student=layout, fake=layout, rank=4))


def shake(bank: RoleBank, *roles: str) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in roles:
            for param in bank.members(role).values():
                param += 0.05 * torch.randn(param.shape, generator=generator)


@pytest.mark.sampled(pairs=False, family=("sd3", "edm", "dit"))
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_ema_starts_equal_and_moves_by_one_minus_decay(family, layout) -> None:
    needs_blocks(family)
    bank = build(family, layout)
    start = bank.role_state("student")
    members = bank.members("target")
    assert all(torch.equal(members[name], start[name]) for name in members)
    shake(bank, "student")
    student = bank.members("student")
    bank.ema_update("target", decay=0.9)
    for name, param in members.items():
        assert torch.allclose(param, 0.9 * start[name] + 0.1 * student[name], atol=1e-7)
    bank.ema_update("target", decay=0.0)
    assert all(torch.equal(members[name], student[name]) for name in members)


@pytest.mark.parametrize("layout", ["lora", "full"])
def test_ema_role_never_trains_and_the_followed_role_is_not_moved(make_family, layout) -> None:
    bank = build(make_family("sd3"), layout)
    bank.train_only(bank.trained_roles)
    assert bank.trained_roles == ("student", "disc")
    assert not any(p.requires_grad for p in bank.members("target").values())
    before = bank.role_state("student")
    shake(bank, "target")
    bank.ema_update("target", 0.5)
    assert all(torch.equal(v, before[k]) for k, v in bank.role_state("student").items())


@pytest.mark.sampled(pairs=False, family=("sd3", "edm", "dit"))
@pytest.mark.sampled_in_full(pairs=False)
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_saved_roles_answer_alike_in_a_new_bank(family, layout) -> None:
    needs_blocks(family)
    vae = getattr(family.pipeline, "vae", None)  # kept: one with weight norm can't be copied
    twin = type(family)(copy.deepcopy(family.pipeline, {id(vae): vae}))
    bank, other = build(family, layout), build(twin, layout)
    shake(bank, "student", "target", "disc")
    prompts = [0, 1] if family.conditioning == "label" else ["a", "b"]
    x_t, t = torch.randn(2, *family.sample_shape()), torch.tensor([0.9, 0.1]).double()
    cond = family.encode(prompts)

    def answers(b: RoleBank) -> list[torch.Tensor]:
        with torch.no_grad():
            student = b["student"](x_t, t, cond, features=("mid",))
            target = b["target"](x_t, t, cond)
            return [student.raw, target.raw, b.head("disc", student.features)]

    assert not any(torch.equal(a, b) for a, b in zip(answers(bank), answers(other), strict=True))
    for role in ("student", "target", "disc"):
        other.load_role_state(role, bank.role_state(role))
    assert all(torch.equal(a, b) for a, b in zip(answers(bank), answers(other), strict=True))


def test_saved_state_is_a_copy(make_family) -> None:
    bank = build(make_family("sd"), "lora")
    state = bank.role_state("student")
    shake(bank, "student")
    assert any(not torch.equal(v, state[k]) for k, v in bank.role_state("student").items())


@pytest.mark.full
def test_state_of_another_layout_is_refused(make_family) -> None:
    lora, full = build(make_family("sd"), "lora"), build(make_family("sd"), "full")
    with pytest.raises(ValueError, match="expected the saved tensors of this layout"):
        full.load_role_state("student", lora.role_state("student"))


# ------------------------------------------------------------------------------------------ heads
@pytest.mark.parametrize("shape", [(3, 12, 1, 1), (3, 12, 4, 6), (3, 12, 33, 9)])
def test_map_head_gives_one_logit_at_any_resolution(shape) -> None:
    head = make_head([FeatureBlock("x", 12, "map")])
    assert head([torch.randn(shape)]).shape == (3, 1)


def test_token_head_is_a_mean_over_tokens() -> None:
    head = make_head([FeatureBlock("x", 8, "tokens")])
    x = torch.randn(2, 5, 8)
    each = torch.cat([head([x[:, i : i + 1]]) for i in range(5)], dim=1)
    assert torch.allclose(head([x]), each.mean(1, keepdim=True), atol=1e-6)


def test_one_logit_column_for_each_block_in_order() -> None:
    blocks = [FeatureBlock("a", 8, "tokens"), FeatureBlock("b", 4, "map")]
    head = make_head(blocks)
    features = [torch.randn(2, 3, 8), torch.randn(2, 4, 5, 5)]
    both = head(features)
    alone = [one(f) for one, f in zip(head.heads, features, strict=True)]
    assert torch.equal(both, torch.cat(alone, dim=1))


def test_several_heads_of_a_block_stand_side_by_side() -> None:
    head = make_head([FeatureBlock("a", 8, "tokens"), FeatureBlock("b", 4, "map")], per_block=2)
    features = [torch.randn(2, 3, 8), torch.randn(2, 4, 5, 5)]
    alone = [one(features[i // 2]) for i, one in enumerate(head.heads)]
    assert torch.equal(head(features), torch.cat(alone, dim=1))
    assert len({round(float(logit[0].detach()), 6) for logit in alone}) == 4, "no two are one"


def test_a_bank_has_a_method_s_number_of_heads_on_each_block(make_family) -> None:
    family = make_family("sd")
    gan = GANConfig(weight_g=0.1, blocks=("all",), heads_per_block=4)
    bank = RoleBank(family, {**ROLES, **gan.roles()}, Tuning(student="lora", rank=4))
    blocks = chosen_blocks(("all",), family.feature_blocks())
    assert len(bank.heads["disc"].heads) == 4 * len(blocks)


@pytest.mark.parametrize("layout", ["map", "tokens"])
def test_heads_take_half_precision_features_and_give_their_gradient(layout) -> None:
    head = make_head([FeatureBlock("x", 8, layout)])
    shape = (2, 8, 4, 4) if layout == "map" else (2, 16, 8)
    x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    logits = head([x])
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert x.grad.abs().sum() > 0
