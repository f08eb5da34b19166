"""RoleBank: one base, many roles. Layouts, switching and the gradients that depend on it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from support.runs import NETWORKS, needs_blocks
from torch import Tensor

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.path import FlowPath
from stepdistill.core.types import Cond
from stepdistill.families.family import Family
from stepdistill.roles.rolebank import BASE, RoleBank

ROLES = {"teacher": Role(), "student": Role(train=True), "fake": Role(train=True)}
LAYOUTS = [("lora", "lora"), ("full", "full"), ("lora", "full"), ("full", "lora")]


def build(family: Family, student: str = "lora", fake: str = "lora", roles=ROLES, **tuning):
    """A bank whose trained roles have moved off the teacher, by the same amounts every time."""
    bank = RoleBank(family, roles, Tuning(student=student, fake=fake, rank=4, **tuning))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in sorted(bank.trained_roles):
            for param in bank.members(role).values():
                param += 0.05 * torch.randn(param.shape, generator=generator)
    return bank


_LENT: dict[str, RoleBank] = {}


@pytest.fixture
def lent(request, family) -> RoleBank:
    """A bank with two adapters that tests of one family share: they only read it."""
    name = request.node.callspec.params["family"]
    if name not in _LENT:
        _LENT[name] = build(family)
    return _LENT[name]


def inputs(family: Family, bsz: int = 2) -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn(bsz, *family.sample_shape(), generator=generator)
    prompts = [0, 3] if family.conditioning == "label" else ["a cat", "two dogs"]
    return x_t, torch.tensor([1.0, 0.25]).double(), family.encode(prompts[:bsz])


def grads(bank: RoleBank, role: str) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in bank.members(role).items()
    }


def equal(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    """Same names, same gradients; where one has none (nothing reads that output) so has the other.

    At least nine in ten have one.
    """
    both = [(a[k], b[k]) for k in a if a[k] is not None and b.get(k) is not None]
    alike = set(a) == set(b) and all((a[k] is None) == (b[k] is None) for k in a)
    return alike and len(both) > 0.9 * len(a) and all(torch.equal(x, y) for x, y in both)


# ------------------------------------------------------------------------------------------ layouts
@pytest.mark.sampled("lora-full")
@pytest.mark.parametrize(("student", "fake"), LAYOUTS)
def test_each_layout_stores_what_it_says(make_family, student, fake) -> None:
    bank = build(make_family("sd"), student, fake)
    copies = {r for r, layout in (("student", student), ("fake", fake)) if layout == "full"}
    assert set(bank.nets) == {BASE, *copies}
    adapters = {name for m in bank._tuner_layers for name in m.lora_A}
    assert adapters == {"student", "fake"} - copies


@pytest.mark.sampled(pairs=False, family=NETWORKS)
def test_a_second_adapter_does_not_wrap_the_first(make_family, request, lent) -> None:
    plain_family = make_family(request.node.callspec.params["family"])
    plain = sum(
        f".{name}".endswith(tuple(f".{t}" for t in plain_family.lora_targets))
        for name, _ in plain_family.net.named_modules()
    )
    bank = lent
    names = [name for name, _ in bank.nets[BASE].named_modules()]
    assert not any("base_layer.base_layer" in name for name in names)
    assert len(bank._tuner_layers) == plain
    assert all(set(layer.lora_A) == {"student", "fake"} for layer in bank._tuner_layers)


@pytest.mark.sampled(pairs=False, family=NETWORKS)
def test_members_bear_stock_names(lent) -> None:
    bank = lent
    assert set(bank.members("student")) == set(bank.members("fake"))
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in bank.members("student"))
    assert bank.members("teacher") == {}


def test_rank_and_alpha_set_the_scale(make_family) -> None:
    bank = build(make_family("sd"), alpha=6.0, fake_rank=2)
    for layer in bank._tuner_layers:
        assert layer.r == {"student": 4, "fake": 2}
        assert layer.scaling == {"student": 1.5, "fake": 3.0}


@pytest.mark.sampled(pairs=False, family=NETWORKS)
@pytest.mark.sampled_in_full(pairs=False)
@pytest.mark.parametrize(("student", "fake"), LAYOUTS)
def test_teacher_is_the_untouched_base_bit_for_bit(family, student, fake) -> None:
    untouched = copy.deepcopy(family.net)
    bank = build(family, student, fake)
    x_t, t, cond = inputs(family)
    with torch.no_grad():
        expected = family.forward(untouched, x_t, family.path.model_time(t), cond)
        outs = {role: bank[role](x_t, t, cond).raw for role in ROLES}
    assert torch.equal(outs["teacher"], expected)
    for a, b in (("student", "teacher"), ("fake", "teacher"), ("student", "fake")):
        assert (outs[a] - outs[b]).abs().max() > 1e-4, (a, b)


@pytest.mark.sampled(pairs=False, family=NETWORKS)
@pytest.mark.sampled_in_full(pairs=False)
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_roles_start_at_the_teacher(family, layout) -> None:
    bank = RoleBank(family, ROLES, Tuning(student=layout, fake=layout, rank=4))
    x_t, t, cond = inputs(family)
    with torch.no_grad():
        teacher = bank["teacher"](x_t, t, cond).raw
        assert torch.equal(bank["student"](x_t, t, cond).raw, teacher)
        assert torch.equal(bank["fake"](x_t, t, cond).raw, teacher)


def test_half_precision_base_keeps_float32_adapters(make_family) -> None:
    family = make_family("sd")
    family.net.to(torch.bfloat16)
    bank = build(family)
    assert {p.dtype for p in bank.members("student").values()} == {torch.float32}
    x_t, t, cond = inputs(family)
    pred = bank["student"](x_t, t, cond)
    assert (pred.raw.dtype, pred.x0.dtype) == (torch.bfloat16, torch.float32)
    pred.x0.square().mean().backward()
    assert all(p.grad is not None for p in bank.members("student").values())


# ---------------------------------------------------------------------------------------- switching
@pytest.mark.sampled(pairs=False, family=NETWORKS)
@pytest.mark.sampled_in_full(pairs=False)
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_calls_of_other_roles_before_backward_change_no_gradient(family, layout) -> None:
    alone = build(family, layout, roles={"student": Role(train=True)})
    x_t, t, cond = inputs(family)
    alone["student"](x_t, t, cond).raw.square().mean().backward()
    expected = grads(alone, "student")

    prompt_free = type(family)(family.pipeline)  # the same weights, without adapters
    for layer_name, layer in list(prompt_free.net.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            prompt_free.net.set_submodule(layer_name, layer.get_base_layer())
    bank = build(prompt_free, layout, layout)
    bank.load_role_state("student", alone.role_state("student"))
    loss = bank["student"](x_t, t, cond).raw.square().mean()
    with torch.no_grad():
        bank["teacher"](x_t, t, cond)
    bank["fake"](x_t, t, cond)
    loss.backward()
    assert equal(grads(bank, "student"), expected)
    assert all(g is None for g in grads(bank, "fake").values())


def test_use_never_touches_requires_grad(make_family) -> None:
    bank = build(make_family("sd"))
    bank.train_only(("fake",))
    before = {name: p.requires_grad for name, p in bank.named_parameters()}
    for role in ("student", None, "fake"):
        with bank.use(role):
            assert {name: p.requires_grad for name, p in bank.named_parameters()} == before
    assert {name: p.requires_grad for name, p in bank.named_parameters()} == before


def test_use_restores_the_role_after_an_error(make_family) -> None:
    bank = build(make_family("sd"))

    def fail() -> None:
        with bank.use("student"), bank.use("fake"):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert bank._active is None
    assert all(layer.disable_adapters for layer in bank._tuner_layers)


@pytest.mark.sampled("full-lora")
@pytest.mark.parametrize(("student", "fake"), LAYOUTS)
def test_train_only_is_exact(make_family, student, fake) -> None:
    bank = build(make_family("sd"), student, fake)
    for roles in (("student",), ("fake",), ("student", "fake"), ()):
        bank.train_only(roles)
        wanted = {id(p) for role in roles for p in bank.members(role).values()}
        assert {id(p) for p in bank.parameters() if p.requires_grad} == wanted


def test_train_mode_does_not_drop_labels(make_family) -> None:
    family = make_family("dit")
    bank = build(family)
    x_t, t, cond = inputs(family)
    x_t, t, cond = x_t.repeat(16, 1, 1, 1), t.repeat(16), cond.repeat(16)
    with torch.no_grad():
        before = bank["student"](x_t, t, cond).raw
        bank.train()
        assert torch.equal(bank["student"](x_t, t, cond).raw, before)


# ------------------------------------------------------------------------- gradient checkpointing
def mixed_loss(bank: RoleBank, family: Family) -> Tensor:
    """student -> fake, gradients through both, with teacher calls between forward and backward."""
    x_t, t, cond = inputs(family)
    x0 = bank["student"](x_t, t, cond).raw
    middle = ("mid",) if family.feature_blocks() else ()
    out = bank["fake"](x0, t, cond, features=middle)
    with torch.no_grad():
        bank["teacher"](x_t, t, cond)
    return out.raw.square().mean() + sum(out.features[name].square().mean() for name in middle)


@pytest.mark.sampled(pairs=False, family=NETWORKS)
@pytest.mark.sampled_in_full(pairs=False)
@pytest.mark.parametrize(("student", "fake"), LAYOUTS)
def test_checkpointing_changes_no_gradient(family, student, fake) -> None:
    bank = build(family, student, fake)
    mixed_loss(bank, family).backward()
    expected = {role: grads(bank, role) for role in ("student", "fake")}
    bank.zero_grad()
    bank.enable_gradient_checkpointing()
    calls: list[str] = []
    for module in bank["fake"]._net.modules():
        module.register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    loss = mixed_loss(bank, family)
    forward_calls = len(calls)
    loss.backward()
    assert len(calls) > forward_calls  # blocks did run again in backward
    for role, before in expected.items():
        after = grads(bank, role)
        assert set(after) == set(before)
        for name in before:
            if before[name] is None:  # Qwen-Image's last block puts out text that nothing reads
                assert after[name] is None, (role, name)
                continue
            assert torch.allclose(after[name], before[name], rtol=1e-4, atol=1e-7), (role, name)
    assert bank._active is None


# --------------------------------------------------------------------------------------- autocast
@pytest.mark.full
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_a_call_without_gradients_leaves_later_gradients_whole(make_family, layout) -> None:
    """Autocast caches the weight casts of a no_grad call; reused, they would carry no graph."""
    family = make_family("sd")
    roles = {**ROLES, "disc": Role("head", train=True, features=("mid",))}
    bank = build(family, layout, layout, roles=roles)
    x_t, t, cond = inputs(family)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            bank.head("disc", bank["student"](x_t, t, cond, features=("mid",)).features)
        pred = bank["student"](x_t, t, cond, features=("mid",))
        loss = pred.raw.float().square().mean() + bank.head("disc", pred.features).float().sum()
    loss.backward()
    for role in ("student", "disc"):
        missing = [name for name, grad in grads(bank, role).items() if grad is None]
        assert missing == [], role


# --------------------------------------------------------------------------- features, as_flow, w
@pytest.mark.sampled("dit-False", "edm-True", "flux-False", "sd3-True")
@pytest.mark.sampled_in_full(pairs=False)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_alone_are_those_of_a_whole_call(family, checkpointing) -> None:
    """Same values and gradients, by a network that stops behind the last block it reads."""
    needs_blocks(family)
    bank = build(family)
    if checkpointing:
        bank.enable_gradient_checkpointing()
    x_t, t, cond = inputs(family)
    x_t.requires_grad_()
    names = tuple(family.feature_blocks())[:2]  # "mid" and the first block
    called: list[int] = []
    for module in bank["student"]._net.modules():
        module.register_forward_hook(lambda *_: called.append(1))

    def read(alone: bool) -> tuple[list[Tensor], Tensor, dict[str, Tensor | None], int]:
        called.clear()
        role = bank["student"]
        found = (
            role.features(x_t, t, cond, names)
            if alone
            else role(x_t, t, cond, features=names).features
        )
        calls = len(called)
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        features = [found[name] for name in names]
        sum(f.square().mean() for f in features).backward()
        to_x, to_weights = x_t.grad, grads(bank, "student")
        x_t.grad = None
        bank.zero_grad(set_to_none=True)
        return features, to_x, to_weights, calls

    whole, x_whole, weights_whole, all_calls = read(alone=False)
    alone, x_alone, weights_alone, calls = read(alone=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, alone, strict=True))
    assert torch.equal(x_whole, x_alone)
    for name, grad in weights_whole.items():
        assert (grad is None) == (weights_alone[name] is None), name
        assert grad is None or torch.equal(grad, weights_alone[name]), name
    assert 0 < calls < all_calls
    assert bank._active is None


@pytest.mark.sampled(pairs=False, family=NETWORKS)
def test_features_are_of_the_conditional_half(family, lent) -> None:
    needs_blocks(family)
    bank = lent
    x_t, t, cond = inputs(family)
    names = tuple(family.feature_blocks())
    with torch.no_grad():
        w = torch.full((2,), 2.0) if family.embeds_guidance else None
        plain = bank["student"](x_t, t, cond, w=w, features=names).features
        told = (family.null(2), 3.0) if family.has_null else ()
        guided = bank["student"](x_t, t, cond, *told, features=names).features
        null = bank["student"](x_t, t, family.null(2), features=names).features
    for name in names:
        assert guided[name].shape == plain[name].shape
        assert torch.allclose(guided[name], plain[name], atol=1e-4), name
    if family.has_null:
        assert (null["mid"] - plain["mid"]).abs().max() > 1e-3


@pytest.mark.sampled(family=NETWORKS)
def test_all_blocks_are_each_place_once(family) -> None:
    """A head on "all" reads every block, a transformer's middle one not twice."""
    needs_blocks(family)
    roles = {"teacher": Role(), "disc": Role("head", train=True, features=("all",))}
    bank = build(family, roles=roles)
    places = {block.module for block in family.feature_blocks().values()}
    features = bank["teacher"].features(*inputs(family), ("all",))
    assert len(features) == len(places)
    assert bank.head("disc", features).shape == (2, len(places))


def test_as_flow_tells_the_network_a_thousand_t(make_family) -> None:
    family = make_family("sd")
    roles = {"teacher": Role(), "student": Role(train=True, as_flow=True)}
    bank = build(family, roles=roles)
    x_t, t, cond = inputs(family)
    pred = bank["student"](x_t, t, cond)
    assert isinstance(pred.path, FlowPath)
    assert pred.kind == "flow"
    with bank.use("student"):
        raw = family.forward(family.net, x_t, 1000 * t, cond)
    assert torch.equal(pred.raw, raw)
    assert torch.allclose(pred.x0, x_t - t.float().view(-1, 1, 1, 1) * raw)
    assert bank["teacher"](x_t, t, cond).kind == "eps"


def test_guidance_embedding_needs_a_full_student(make_family) -> None:
    roles = {"student": Role(train=True, extra_inputs=("w",)), "target": Role(ema_of="student")}
    with pytest.raises(ValueError, match=r"--tuning.student full"):
        build(make_family("sd"), "lora", roles=roles)
    family = make_family("sd")
    bank = build(family, "full", roles=roles)
    x_t, t, cond = inputs(family)
    low, high = (bank["student"](x_t, t, cond, w=torch.full((2,), w)).raw for w in (0.0, 6.0))
    assert (low - high).abs().max() > 1e-4
    high.square().mean().backward()
    assert bank.members("student")["time_embedding.cond_proj.weight"].grad.abs().sum() > 0
    assert "time_embedding.cond_proj.weight" in bank.members("target")


# --------------------------------------------------------------------------------------- refusals
def test_refusals_name_the_rule(make_family) -> None:
    family = make_family("sd")
    with pytest.raises(ValueError, match="expected ema_of a role"):
        build(family, roles={"target": Role(ema_of="nobody")})
    with pytest.raises(ValueError, match=r"expected feature blocks of sd \(mid, down.0"):
        build(family, roles={"disc": Role("head", features=("middle",))})
    build(family)
    with pytest.raises(ValueError, match="expected a plain denoiser"):
        build(family)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd"], indirect=True)
def test_switching_writes_flags_alone(family: Family, monkeypatch) -> None:
    """Module.__setattr__ looks for weights first; a network of 800 adapters pays at each block."""
    bank, written = build(family), []
    monkeypatch.setattr(BaseTunerLayer, "__setattr__", lambda *args: written.append(args), False)
    with bank.use("fake"):
        assert all(layer.active_adapter == ["fake"] for layer in bank._tuner_layers)
        assert not any(layer.disable_adapters for layer in bank._tuner_layers)
    assert all(layer.disable_adapters for layer in bank._tuner_layers)
    assert written == []
