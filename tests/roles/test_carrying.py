"""A share of one role's adapter on another's network; weights of one role mixed into another."""

from __future__ import annotations

import pytest
import torch
from support.runs import THOROUGH

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.roles.rolebank import RoleBank

ROLES = {"teacher": Role(), "student": Role(train=True), "fake": Role(train=True)}


def build(family, layout: str = "lora") -> RoleBank:
    bank = RoleBank(family, ROLES, Tuning(student=layout, fake=layout, rank=4, alpha=3.0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in ("student", "fake"):
            for param in bank.members(role).values():
                param += 0.05 * torch.randn(param.shape, generator=generator)
    return bank


@pytest.mark.sampled(family=THOROUGH)
def test_a_network_carries_a_share_and_is_itself_again(family) -> None:
    bank = build(family)
    prompts = [0, 1] if family.conditioning == "label" else ["a", "b"]
    x_t, t = torch.randn(2, *family.sample_shape()), torch.tensor([0.9, 0.1]).double()
    cond = family.encode(prompts)

    def answer(nets, role):
        return nets[role](x_t, t, cond).raw

    with torch.no_grad():
        plain, fake = answer(bank, "teacher"), answer(bank, "fake")
        assert torch.equal(answer(bank.carrying("teacher", "fake", 1.0), "teacher"), fake)
        half = answer(bank.carrying("teacher", "fake", 0.3), "teacher")
        assert torch.equal(answer(bank.carrying("teacher", "fake", 0.3), "fake"), fake)
        assert torch.equal(answer(bank, "fake"), fake)
        assert torch.equal(answer(bank, "teacher"), plain)
        # B is linear: the same adapter with 0.3 B.
        for name, param in bank.members("fake").items():
            if "lora_B" in name:
                param *= 0.3
        assert torch.allclose(half, answer(bank, "fake"), atol=1e-5)
    assert not torch.allclose(half, plain, atol=1e-4)
    assert not torch.allclose(half, fake, atol=1e-4)


@pytest.mark.parametrize("layout", ["lora", "full"])
def test_mixing_moves_the_one_by_a_share_and_the_other_not(make_family, layout) -> None:
    bank = build(make_family("sd3"), layout)
    before = {role: bank.role_state(role) for role in ROLES}
    bank.mix("fake", "student", 0.0)
    assert all(torch.equal(v, before["fake"][k]) for k, v in bank.role_state("fake").items())
    bank.mix("fake", "student", 0.25)
    for name, value in bank.role_state("fake").items():
        wanted = 0.75 * before["fake"][name] + 0.25 * before["student"][name]
        assert torch.allclose(value, wanted, atol=1e-6)
    for role in ("teacher", "student"):
        assert all(torch.equal(v, before[role][k]) for k, v in bank.role_state(role).items())
