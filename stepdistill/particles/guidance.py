"""ScoreGuidance: a loss of images whose gradient is a score gradient, for any renderer.

    guidance = ScoreGuidance("MODEL", ["a red chair"], ScoreGradientConfig(kind="vsd"), max_steps=N)
    for step in range(N):
        loss = guidance(renderer(camera), step, SideInputs(camera=camera))  # images in [-1, 1]
        ...                                                  # backward, and the renderer's update
        guidance.fit_fake(step)                              # vsd alone; else it does nothing

The teacher is frozen; vsd's fake is a LoRA on it with an optimiser of its own. Draws are keyed by
seed and step, so that a resumed run repeats them.
"""

# Shapes: B batch, C channels, *S spatial, H, W in px.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor
from torch.nn import functional as F

from stepdistill.config.tuning import Tuning
from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Role
from stepdistill.families.family import Family
from stepdistill.families.registry import load_family
from stepdistill.loading.source import ModelSource
from stepdistill.losses.score import denoising_loss, gradient_times, score_grad, summed_surrogate
from stepdistill.losses.score_options import ScoreGradientConfig
from stepdistill.particles.options import FakeConfig
from stepdistill.particles.side_inputs import SideInputs, Told, camera_embedding, check_control
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.optimizers import load_optimizer_tensors, optimizer_tensors


class ScoreGuidance:
    """Score gradients of a teacher's prompts, for images or latents that have a graph.

    Args:
        teacher: folder, Hub id, ModelSource, or a loaded Family (of which the denoiser gets vsd's
            adapter).
        prompts: texts (or class labels); a call's `rows` choose among them.
        config: which gradient. fake: vsd's LoRA. max_steps: that times are annealed over.
        camera: whether the fake is told SideInputs.camera. controlnet: a loaded stock ControlNet
            whose residuals teacher and fake get of SideInputs.control; control_scale: times that.
        resolution: px that images are brought to; None: the model's own size.
    Errors: ValueError for a prompt or network that the gradient can't do without.
    """

    def __init__(
        self,
        teacher: str | Path | ModelSource | Family,
        prompts: Sequence[Any],
        config: ScoreGradientConfig,
        *,
        max_steps: int = 1,
        negative_prompt: str | None = None,
        fake: FakeConfig = FakeConfig(),  # noqa: B008 - frozen
        camera: bool = False,
        controlnet: Any = None,
        control_scale: float = 1.0,
        resolution: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not prompts:
            raise ValueError("prompts: expected one or more, got none.")
        if config.kind == "nfsd" and negative_prompt is None:
            raise ValueError("nfsd: expected a negative prompt, got none. Give negative_prompt.")
        self.family = family = teacher if isinstance(teacher, Family) else load_family(teacher)
        self.config, self.fake, self.max_steps, self.seed = config, fake, max_steps, seed
        self.device, self.size = torch.device(device), family.image_size(resolution)
        self.shape = family.sample_shape(resolution, resolution)
        roles = {"teacher": Role()}
        if config.kind == "vsd":
            roles["fake"] = Role(train=True)
        family.pipeline.to(self.device)
        self.embedding: TimestepEmbedding | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # adapter and projection begin at random
            self.bank = RoleBank(family, roles, Tuning(fake="lora", rank=fake.rank))
            self.net = self.bank.base_of("teacher")
            if camera and "fake" in roles:
                self.embedding = camera_embedding(self.net).to(self.device)
        if "fake" in roles:
            trained = [*self.bank.members("fake").values()]
            trained += [] if self.embedding is None else self.embedding.parameters()
            self.optimizer = torch.optim.AdamW(trained, lr=fake.learning_rate)
        self._controlnet, self._scale = controlnet, control_scale
        if controlnet is not None:
            controlnet.to(self.device).eval().requires_grad_(False)
        with torch.no_grad():
            self._cond = family.encode(prompts).to(self.device)
            self._null = family.null(1).to(self.device)
            negative = None if negative_prompt is None else family.encode([negative_prompt])
            self._negative = None if negative is None else negative.to(self.device)
        self._last: tuple[Tensor, Tensor, SideInputs] | None = None

    def latents(self, images: Tensor) -> Tensor:
        """(B, C, *S) with graph, of images (B, 3, H, W) in [-1, 1] of any size."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        return self.family.latents(images)

    def __call__(
        self,
        images: Tensor,
        step: int,
        inputs: SideInputs = SideInputs(),  # noqa: B008 - frozen
        rows: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Scalar whose gradient is the score gradient over B, of images (B, 3, H, W) in [-1, 1]
        that have a graph; see `of_latents`."""
        return self.of_latents(self.latents(images), step, inputs, rows)

    def of_latents(
        self,
        latents: Tensor,
        step: int,
        inputs: SideInputs = SideInputs(),  # noqa: B008 - frozen
        rows: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The same of latents (B, C, *S). Args: rows: which prompt each sample has, (B,); none
        means the first of all, or where there are B prompts, each its own."""
        bsz = len(latents)
        if rows is None:
            rows = range(bsz) if self._cond.bsz == bsz else [0] * bsz
        index = torch.as_tensor(rows)
        self._last = latents.detach(), index, inputs
        ctx = self._ctx("score", step)
        t = gradient_times(self.family.path, ctx.rand(bsz), self.config, step, self.max_steps)
        grad = score_grad(
            self._asked("teacher", inputs),
            latents,
            t,
            ctx.randn(tuple(latents.shape)),
            self._cond.index(index),
            self._null.repeat(bsz),
            self.config,
            fake=self._asked("fake", inputs) if self.optimizer is not None else None,
            negative=None if self._negative is None else self._negative.repeat(bsz),
            step=step,
        )
        return summed_surrogate(latents, grad)

    def fit_fake(self, step: int) -> float | None:
        """vsd's fake is updated on the samples of the last call; its loss, None where there is no
        fake. Source: arXiv:2305.16213, Algorithm 1."""
        if self.optimizer is None or self._last is None:
            return None
        latents, index, inputs = self._last
        loss = torch.zeros(())
        for repeat in range(self.fake.updates):
            ctx = self._ctx("fake", step, repeat)
            eps = ctx.randn(tuple(latents.shape))
            path = self.family.path
            # At all times: the score of what is optimised is wanted wherever its gradient is.
            t = path.snap(0.02 + 0.96 * ctx.rand(len(latents)))
            seen = inputs
            if inputs.camera is not None and ctx.shared_rand() < self.fake.blind_share:
                seen = replace(inputs, camera=torch.zeros_like(inputs.camera))
            fake = self._asked("fake", seen)
            pred = fake(path.add_noise(latents, eps, t), t, self._cond.index(index))
            loss = denoising_loss(pred, latents, eps)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        return float(loss.detach())

    def _asked(self, role: str, inputs: SideInputs) -> Denoiser:
        """The role, told what it may be told of a call's inputs."""
        denoiser = self.bank[role]
        if inputs.control is not None and self._controlnet is not None:
            check_control(self._controlnet, inputs.control)
        elif inputs.camera is None or self.embedding is None:
            return denoiser
        embedding = self.embedding if role == "fake" else None
        return Told(denoiser, self.net, inputs, embedding, self._controlnet, self._scale)

    def _ctx(self, phase: str, step: int, repeat: int = 0) -> Ctx:
        return Ctx(self.seed, step, self.max_steps, phase, repeat, device=self.device)

    # ------------------------------------------------------------------- state
    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: the fake's weights and its optimiser's state, as CPU copies."""
        if self.optimizer is None:
            return {}
        return {
            **{f"fake.{name}": value for name, value in self.bank.role_state("fake").items()},
            **{f"camera.{n}": v for n, v in self._camera_state().items()},
            **{f"adam.{name}": value for name, value in optimizer_tensors(self.optimizer).items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Errors: ValueError for the state of another fake."""
        if self.optimizer is None:
            return

        def part(begins: str) -> dict[str, Tensor]:
            return {n[len(begins) :]: v for n, v in state.items() if n.startswith(begins)}

        self.bank.load_role_state("fake", part("fake."))
        if self.embedding is not None:
            self.embedding.load_state_dict(part("camera."))
        load_optimizer_tensors(self.optimizer, part("adam."))

    def _camera_state(self) -> dict[str, Tensor]:
        return {} if self.embedding is None else self.embedding.state_dict()
