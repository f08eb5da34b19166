"""What an iteration asks of its networks: no call twice, guidance in one batch, no waiting.

Counted on two updates of every method with a tiny Stable Diffusion; the second is looked at.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.runs import METHOD_CASES, build_trainer, teacher_dir
from torch import Tensor

from stepdistill import DistributionMatchingTrainer, TrainConfig
from stepdistill.methods import METHODS
from stepdistill.roles.role_denoiser import RoleDenoiser

BSZ = 2
# (adapter or "base", rows, with gradients) of each call of one iteration at batch 2, in order.
TEACHER = ("base", 2 * BSZ, False)  # guided: both conditions in one batch
SEES = ("base features", BSZ, True)  # the frozen teacher's alone, under a head that trains
SEES_BOTH = ("base features", 2 * BSZ, True)  # samples, and images under others' prompts
FEATURES = ("fake features", BSZ, True)
CALLS: dict[str, list[tuple[str, int, bool]]] = {
    "dmd2": [
        ("student", BSZ, True), ("fake", BSZ, False), TEACHER, ("fake", BSZ, True),
        ("student", BSZ, False), ("fake", BSZ, True),
    ],
    "dmd": [
        ("student", BSZ, True), ("fake", BSZ, False), TEACHER, ("student", BSZ, True),
        ("fake", BSZ, True),
    ],
    "dmd2_gan": [
        ("student", BSZ, True), ("fake", BSZ, False), TEACHER, FEATURES,
        ("fake", BSZ, True), FEATURES, FEATURES,
    ],
    "dmd2_two_sources": [
        ("student", BSZ, True), ("fake", BSZ, False), TEACHER, FEATURES,
        ("fake", BSZ, True), FEATURES, FEATURES,
        ("student", BSZ, False), ("fake", BSZ, True), FEATURES, FEATURES,
    ],
    # The teacher carries the fake's adapter: guided below the student's step, then plain.
    "dmd2_later": [
        ("student", BSZ, True), ("fake carried", 2 * BSZ, False), ("fake carried", BSZ, False),
        ("fake", BSZ, False), ("fake", BSZ, True),
    ],
    "f_distill": [
        ("student", BSZ, True), ("fake", BSZ, True), TEACHER,
        ("fake", BSZ, True), FEATURES, FEATURES,
    ],
    "disback": [("student", BSZ, True), ("fake", BSZ, False), TEACHER, ("fake", BSZ, True)],
    "tdm": [
        ("student", BSZ, True), ("fake", BSZ, False), TEACHER, ("fake", BSZ, True),
        ("student", BSZ, False), ("fake", BSZ, True),
    ],
    "ladd": [
        ("student", BSZ, True), SEES, SEES_BOTH, SEES, ("student", BSZ, False), SEES_BOTH, SEES,
    ],
    "add": [("student", BSZ, True), TEACHER],
    "sana_sprint": [
        TEACHER, ("student", BSZ, True), ("student", BSZ, False), ("student", BSZ, True), SEES,
        SEES_BOTH, SEES,
    ],
    "vsd": [("student", BSZ, True), ("fake", 2 * BSZ, False), TEACHER, ("fake", BSZ, True)],
    "tscd": [("student", BSZ, True), TEACHER, ("target", BSZ, False)],
    "pcm": [
        ("student", BSZ, False), TEACHER, ("student", BSZ, False), SEES, SEES,
        ("student", BSZ, True), TEACHER, ("student", BSZ, False), SEES,
    ],
    "ctm": [
        ("student", BSZ, True), ("target", BSZ, True), TEACHER, TEACHER,
        ("target", BSZ, False), ("target", BSZ, False),
    ],
    "ctm_gan": [
        ("student", BSZ, False), ("target", BSZ, False), SEES, SEES,
        ("student", BSZ, True), ("target", BSZ, True), TEACHER,
        ("target", BSZ, False), ("target", BSZ, False), SEES,
    ],
    "lcm": [("student", BSZ, True), TEACHER, ("student", BSZ, False)],
    "cd": [("student", BSZ, True), TEACHER, ("target", BSZ, False)],
    "ect": [("student", BSZ, True), ("student", BSZ, False)],
    "tcm": [("student", BSZ, True), ("student", BSZ, False), ("reference", BSZ, False)],
    "boot": [("student", BSZ, False), TEACHER, ("student", BSZ, True)],
    "boot_heun": [("student", BSZ, False), TEACHER, TEACHER, ("student", BSZ, True)],
    "scott": [
        ("student", BSZ, True), TEACHER, TEACHER, ("target", BSZ, False), SEES, SEES, SEES,
    ],
    # The sample that rewards judge is the anchor's, or one step's of the student's own sampler.
    "feedback": [("student", BSZ, True), ("reference", BSZ, False)],
    # A reward sees a sample of four steps, and its gradient goes through the last.
    "lcm_reward": [
        ("student", BSZ, True), TEACHER, ("student", BSZ, False),
        *[("student", BSZ, False)] * 3, ("student", BSZ, True),
    ],
    "meanflow": [TEACHER, ("student", BSZ, True), ("student", BSZ, False)],
    "rcm": [
        TEACHER, ("student", BSZ, True), ("student", BSZ, False),
        ("student", BSZ, True), ("fake", BSZ, False), TEACHER, ("fake", BSZ, True),
    ],
    "progressive": [("target", BSZ, False), ("target", BSZ, False), ("student", BSZ, True)],
    "reflow": [("student", BSZ, True)],
    "scale_distill": [("base", BSZ, False), ("student", BSZ, True)],  # not guided
    "scale_distill_images": [("student", BSZ, True)],
    "reflow_distill": [("student", BSZ, True)],
    "rfpp": [("student", BSZ, True)],
    "slimflow": [("student", BSZ, True)],
    "slimflow_distill": [("student", BSZ, True), ("student", BSZ, True), ("base", BSZ, False)],
}  # fmt: skip
COUNTED = {METHOD_CASES[case].method for case in CALLS}
# Where a tensor is read into Python: numbers that are drawn, or follow from options, on the host.
HOST = {
    ("context.py", "shared_randint"),
    ("context.py", "shared_rand"),
    ("times.py", "uniform_grid"),
    ("times.py", "_snapped"),
    ("rollout.py", "draw_times"),
    ("warm_start.py", "warm_start_loss"),
    ("halving.py", "trailing_grid"),
    ("slimflow.py", "trained_times"),
    ("order.py", "_permutation"),
    ("path.py", "renoise"),  # on the CPU alone
    ("consistency.py", "_sampler"),
    ("grid.py", "visit"),
    # Pictures are prepared for their encoder on the host, once each.
    ("beside.py", "pictures"),
    ("encoded.py", "image_key"),
    ("image_processor.py", "preprocess"),
    ("image_processor.py", "pt_to_numpy"),
}
# Samples that are ranked are drawn without a graph; the step that is learnt from is asked again.
ASKED_AGAIN = ("online_preference",)
READS = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "cpu", "numpy")


@dataclass
class Iteration:
    """One iteration: calls as in CALLS, the inputs they saw, and where tensors were read."""

    calls: list[tuple[str, int, bool]] = field(default_factory=list)
    inputs: list[tuple[int, str, str]] = field(default_factory=list)
    reads: set[tuple[str, str]] = field(default_factory=set)


def digest(*tensors: Tensor | None) -> str:
    made = hashlib.sha256()
    for value in tensors:
        if value is not None:
            made.update(bytes(value.detach().contiguous().flatten().view(torch.uint8)))
    return made.hexdigest()


@contextmanager
def observed(monkeypatch: pytest.MonkeyPatch, seen: Iteration) -> Iterator[None]:
    """Within: `seen` fills."""
    raw, features = RoleDenoiser.raw, RoleDenoiser.features

    def note(self: Any, kind: str, x_t: Tensor, *told: Tensor | None) -> None:
        with monkeypatch.context() as unread:
            for name, own in originals.items():
                unread.setattr(Tensor, name, own)
            read = digest(x_t, *told)
        carried = " carried" if hasattr(self._activate, "keywords") else ""  # of a share
        role = (self._adapter or "base") + carried
        seen.calls.append((role + kind, len(x_t), torch.is_grad_enabled()))
        seen.inputs.append((id(self._net), role, read))

    def call(self: Any, x_t: Tensor, t: Tensor, cond: Any, w: Any, names: Any) -> Any:
        note(self, "", x_t, t, w, *cond.tensors.values())
        return raw(self, x_t, t, cond, w, names)

    def call_features(self: Any, x_t: Tensor, t: Tensor, cond: Any, names: Any) -> Any:
        note(self, " features", x_t, t, *cond.tensors.values())
        return features(self, x_t, t, cond, names)

    def reading(own: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            code = sys._getframe(1).f_code
            seen.reads.add((code.co_filename.rpartition("/")[2], code.co_name))
            return own(tensor, *args, **kwargs)

        return read

    originals = {name: getattr(Tensor, name) for name in READS}
    with monkeypatch.context() as patch:
        patch.setattr(RoleDenoiser, "raw", call)
        patch.setattr(RoleDenoiser, "features", call_features)
        for name, own in originals.items():
            patch.setattr(Tensor, name, reading(own))
        yield


def iteration(case: str, monkeypatch: Any, tmp_path: Any, factory: Any) -> Iteration:
    """The last of two updates, or of more."""
    families = ("sd3", "sd", "flux_kontext")
    family = next(name for name in families if METHOD_CASES[case].fits(name, "lora"))
    trainer: Any = build_trainer(
        case, teacher_dir(family, factory), "lora", tmp_path / "run",
        logging_steps=100, checkpointing_steps=0,
    )  # fmt: skip
    seen, update = Iteration(), trainer._update

    def watched(*args: Any) -> None:
        if trainer.step + 1 < trainer.args.max_train_steps:
            return update(*args)
        with observed(monkeypatch, seen):
            return update(*args)

    trainer._update = watched
    trainer.train()
    return seen


@pytest.mark.full
# Methods without a row above are held to the rest alone.
@pytest.mark.parametrize("case", [*CALLS, *(name for name in METHODS if name not in COUNTED)])
def test_an_iteration_calls_its_networks_so(case, monkeypatch, tmp_path, tmp_path_factory) -> None:
    seen = iteration(case, monkeypatch, tmp_path, tmp_path_factory)
    assert seen.calls == CALLS.get(case, seen.calls)
    if case not in ASKED_AGAIN:
        assert len(set(seen.inputs)) == len(seen.inputs), "a network was asked the same twice"
    assert seen.reads <= HOST, "reading a tensor would wait for the device"


class Pictures:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.zeros(3, 16, 16), "prompt": f"picture {index}"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("rollout", "encoded"),
    [("pure_noise", {"fake": 2 * BSZ}), ("data", {"student": BSZ, "fake": 2 * BSZ})],
)
def test_images_are_encoded_for_losses_that_read_them(
    rollout, encoded, tmp_path, tmp_path_factory
) -> None:
    args = TrainConfig(
        output_dir=str(tmp_path / "run"), train_batch_size=BSZ, max_train_steps=1,
        checkpointing_steps=0, cache_latents=False, disable_progress_bar=True,
    )  # fmt: skip
    options = {"num_steps": 1, "critic_steps": 2, "gan": {"weight_g": 1e-2}, "rollout": rollout}
    trainer: Any = DistributionMatchingTrainer(
        teacher_dir("sd3", tmp_path_factory), args, Pictures(), method="dmd2", method_config=options
    )
    counts: Counter[str] = Counter()
    update, latents = trainer._update, trainer.family.latents

    def watched(phase: Any, *more: Any) -> None:
        def encode(images: Tensor) -> Tensor:
            counts[phase.name] += len(images)
            made: Tensor = latents(images)
            return made

        trainer.family.latents = encode
        update(phase, *more)

    trainer._update = watched
    trainer.train()
    assert counts == encoded
