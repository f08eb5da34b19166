# Licensed under the Apache License, Version 2.0.
"""Score gradients for threestudio: one guidance class for SDS, VSD, CSD, CSM, NFSD, BSD and others.

Copy this file to custom/stepdistill/guidance.py of a threestudio checkout (v0.2.3), with an
__init__.py beside it that says `from . import guidance`, and name it in a configuration:

    system:
      guidance_type: stepdistill-score-guidance
      guidance:
        pretrained_model_name_or_path: stabilityai/stable-diffusion-2-1-base
        kind: vsd                                # sds csd csm nfsd bsd recon dreammat
        guidance_scale: 7.5                      # g of null + g (cond - null); null: the kind's own
        max_step_percent: [5000, 0.98, 0.5, 5001]
      loss: {lambda_vsd: 1.0, lambda_lora: 1.0}  # of the other kinds: lambda_sds
      optimizer:
        params:
          guidance: {lr: 0.0001}                 # vsd alone: its LoRA and camera embedding

The gradient is a line of coefficients over noise predictions at x_t: e_c (prompt), e_u (the prompt
processor's negative prompt), e_0 (the empty prompt), e_f (vsd's fake), e (the drawn noise). Sources
and formulas: stepdistill/losses/score.py, whose figures these are. vsd's fake is a LoRA on the same
UNet, told the camera as class labels (arXiv:2305.16213, released code).

Differs from threestudio's own classes: `guidance_scale` is g in every kind (its SDS counts
g = guidance_scale + 1); prompts without perp-neg. Needs diffusers, peft and threestudio.
"""

# Shapes: B batch, h, w latent, H, W image, N tokens, D width.

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import threestudio
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.embeddings import TimestepEmbedding
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from threestudio.utils.base import BaseModule
from threestudio.utils.misc import C
from torch import Tensor, nn

FAKE = "fake"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LATE = 200  # nfsd: above this timestep the null prediction holds more than the noise
NO_CAMERA_SHARE = 0.1  # of the fake's updates


def _guided(g: float) -> dict[str, Any]:
    return {"cond": g, "uncond": 1 - g}


# kind -> (guidance, weighting, coefficients of (configuration, g, t (B,), number)); `number` reads
# one that may be [start_step, v0, v1, end_step].
Number = Callable[[Any], float]
KINDS: dict[str, tuple[float, str, Callable[[Any, float, Tensor, Number], dict[str, Any]]]] = {
    "sds": (100.0, "sds", lambda c, g, t, number: {**_guided(g), "noise": -1.0}),
    "vsd": (7.5, "sds", lambda c, g, t, number: {**_guided(g), "fake": -1.0}),
    "csd": (
        1.0,
        "sds",
        lambda c, g, t, number: {
            "cond": 1.0,
            "empty": number(c.negative_weight) - 1.0,
            "uncond": -number(c.negative_weight),
        },
    ),
    "csm": (1.0, "sds", lambda c, g, t, number: {"cond": 1.0, "empty": -1.0}),
    "nfsd": (
        7.5,
        "sds",
        lambda c, g, t, number: {"cond": g, "empty": 1.0, "uncond": -g - (t > LATE).float()},
    ),
    "bsd": (15.0, "alpha", lambda c, g, t, number: {"cond": g, "uncond": -g}),
    "recon": (50.0, "ism", lambda c, g, t, number: {**_guided(g), "noise": -1.0}),
    "dreammat": (
        1.0,
        "sds",
        lambda c, g, t, number: dict(
            zip(("cond", "uncond", "empty", "noise"), map(number, c.coefficients), strict=True)
        ),
    ),
}
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sds": lambda alpha, sigma: sigma**2,
    "uniform": lambda alpha, sigma: torch.ones_like(alpha),
    "fantasia3d": lambda alpha, sigma: alpha * sigma**2,
    "ism": lambda alpha, sigma: sigma / alpha,
    "alpha": lambda alpha, sigma: alpha,
}


@dataclass
class _Frozen:
    """What is no parameter of the guidance: threestudio neither trains nor saves it."""

    pipe: Any
    empty: Tensor  # (1, N, D)
    lora_of: Any = ()  # the layers that vsd's LoRA is on


@threestudio.register("stepdistill-score-guidance")
class ScoreGuidance(BaseModule):
    """Called by a threestudio system with its renders; see the file's docstring."""

    @dataclass
    class Config(BaseModule.Config):
        # Any where none is a value: OmegaConf reads these annotations.
        pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-2-1-base"
        kind: str = "vsd"
        guidance_scale: Any = None
        weighting_strategy: Any = None
        negative_weight: Any = 0.5
        coefficients: Any = (1.05, (0, -1.0, -0.5, 2000), (0, 0.0, -0.5, 2000), 0.0)
        inversion_steps: int = 10
        min_step_percent: Any = 0.02
        max_step_percent: Any = 0.98
        grad_clip: Any = None
        view_dependent_prompting: bool = True
        camera_condition_type: str = "extrinsics"
        half_precision_weights: bool = True
        lora_rank: int = 4
        lora_cfg_training: bool = True

    cfg: Config

    def configure(self) -> None:
        """Load the frozen pipeline. Errors: ValueError for a kind or weighting that is none."""
        for option, names in (("kind", KINDS), ("weighting_strategy", WEIGHTS)):
            value = getattr(self.cfg, option)
            if value is not None and value not in names:
                raise ValueError(f"{option}: expected one of {', '.join(names)}, got {value!r}.")
        self.weights_dtype = torch.float16 if self.cfg.half_precision_weights else torch.float32
        pipe = StableDiffusionPipeline.from_pretrained(
            self.cfg.pretrained_model_name_or_path,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            torch_dtype=self.weights_dtype,
        ).to(self.device)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False)
        with torch.no_grad():
            empty, _ = pipe.encode_prompt("", self.device, 1, False)
        pipe.text_encoder = pipe.tokenizer = None  # prompts come encoded
        self.frozen = _Frozen(pipe, empty)
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        self.prediction_type = scheduler.config.prediction_type
        self.alphas_cumprod = scheduler.alphas_cumprod.to(self.device).float()
        self.grad_clip: float | None = None
        self.step = (0, 0)
        if self.cfg.kind == "vsd":
            self._add_fake()
        self.update_step(0, 0)

    def _add_fake(self) -> None:
        """vsd's LoRA and camera embedding: parameters of the guidance, so that they get its lr."""
        unet = self.frozen.pipe.unet
        rank = self.cfg.lora_rank
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=[*LORA_TARGETS]), adapter_name=FAKE
        )
        lora = [p for name, p in unet.named_parameters() if f".{FAKE}." in name]
        for param in lora:
            param.data = param.data.float()
            param.requires_grad_(True)
        self.lora_layers = nn.ParameterList(lora)
        width = unet.time_embedding.linear_2.out_features
        self.camera_embedding = TimestepEmbedding(16, width).to(self.device)
        self.frozen.lora_of = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]
        self._set_fake(False)

    def _set_fake(self, active: bool) -> None:
        # By peft's own flag: disable_adapters would also turn requires_grad off before backward,
        # and the LoRA would never learn.
        for layer in self.frozen.lora_of:
            layer._disable_adapters = not active
        self.frozen.pipe.unet.class_embedding = self.camera_embedding if active else None

    @contextmanager
    def _as_fake(self) -> Iterator[None]:
        self._set_fake(True)
        try:
            yield
        finally:
            self._set_fake(False)

    def _number(self, value: Any) -> float:
        return float(C(value if isinstance(value, (int, float)) else [*value], *self.step))

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Numbers given as [start_step, v0, v1, end_step] move on."""
        self.step = (epoch, global_step)
        steps = self.num_train_timesteps
        self.min_step = int(steps * self._number(self.cfg.min_step_percent))
        self.max_step = int(steps * self._number(self.cfg.max_step_percent))
        clip = self.cfg.grad_clip
        self.grad_clip = None if clip is None else self._number(clip)

    # ------------------------------------------------------------------ networks
    def _coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), (B, 1, 1, 1), of t (B,) table entries."""
        alpha_bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _eps(self, x_t: Tensor, t: Tensor, text: Tensor, camera: Tensor | None = None) -> Tensor:
        """Noise prediction (B, 4, h, w), float32. Args: text: (B, N, D). camera: (B, 16)."""
        dtype = self.weights_dtype
        out = self.frozen.pipe.unet(
            x_t.to(dtype), t, encoder_hidden_states=text.to(dtype), class_labels=camera
        ).sample.float()
        if self.prediction_type == "epsilon":
            return out
        alpha, sigma = self._coeffs(t)
        return alpha * out + sigma * x_t

    def get_latents(self, rgb: Tensor, rgb_as_latents: bool = False) -> Tensor:
        """(B, 4, h, w) with graph, of (B, C, H, W) in [0, 1] (or latents, which are resized)."""
        vae, side = self.frozen.pipe.vae, int(self.frozen.pipe.unet.config.sample_size)
        if rgb_as_latents:
            return F.interpolate(rgb, (side, side), mode="bilinear", align_corners=False)
        side *= 2 ** (len(vae.config.block_out_channels) - 1)
        sized = F.interpolate(rgb, (side, side), mode="bilinear", align_corners=False)
        coded = vae.encode((2 * sized - 1).to(self.weights_dtype)).latent_dist.sample()
        return coded.float() * vae.config.scaling_factor

    def _inverted(self, x: Tensor, t: Tensor) -> Tensor:
        """x_t by DDIM steps upwards under the empty prompt (csm)."""
        text, count = self.frozen.empty.expand(len(x), -1, -1), self.cfg.inversion_steps
        now, clean = t, x
        for i in range(1, count + 1):
            later = t if i == count else ((t + 1) * i / count).round().long().clamp_min(1) - 1
            alpha, sigma = self._coeffs(later)
            if i == 1:  # no network was trained at clean data: the prediction at the step's end
                eps = self._eps(alpha * x, later, text)
            else:
                a, s = self._coeffs(now)
                eps = self._eps(x, now, text)
                clean = (x - s * eps) / a
            x, now = alpha * clean + sigma * eps, later
        return x

    @torch.no_grad()
    def gradient(
        self,
        latents: Tensor,
        t: Tensor,
        noise: Tensor,
        text: Tensor,
        fake_text: Tensor | None = None,
        camera: Tensor | None = None,
    ) -> Tensor:
        """The score gradient (B, 4, h, w), float32.

        Args: text: (2 B, N, D), conditional rows first, as threestudio gives it. fake_text: (B, N,
            D), and camera: (B, 16), of vsd's fake.
        """
        kind, bsz = self.cfg.kind, len(latents)
        own_g, own_weight, coefficients = KINDS[kind]
        g = own_g if self.cfg.guidance_scale is None else float(self.cfg.guidance_scale)
        wanted = coefficients(self.cfg, g, t, self._number)
        alpha, sigma = self._coeffs(t)
        x_t = self._inverted(latents, t) if kind == "csm" else alpha * latents + sigma * noise
        texts = dict(zip(("cond", "uncond"), text.chunk(2), strict=True))
        texts["empty"] = self.frozen.empty.expand(bsz, -1, -1).to(text)
        names = [name for name in texts if name in wanted]
        many = x_t.repeat(len(names), 1, 1, 1), t.repeat(len(names))
        made = self._eps(*many, torch.cat([texts[name] for name in names])).chunk(len(names))
        terms = {"noise": noise, **dict(zip(names, made, strict=True))}
        if kind == "vsd":
            with self._as_fake():
                terms["fake"] = self._eps(x_t, t, fake_text, camera)

        def scaled(name: str) -> Tensor:
            c = wanted[name]
            return (c.view(-1, 1, 1, 1) if isinstance(c, Tensor) else c) * terms[name]

        grad = sum(scaled(name) for name in wanted)
        if kind == "bsd":  # the min-norm point of both directions, sample by sample
            smooth = terms["uncond"]
            gap = smooth - grad
            square = gap.square().sum((1, 2, 3), keepdim=True).clamp_min(1e-30)
            share = ((gap * smooth).sum((1, 2, 3), keepdim=True) / square).clamp(0, 1)
            grad = smooth - share * gap
        weight = "ism" if kind == "recon" else self.cfg.weighting_strategy or own_weight
        grad = (WEIGHTS[weight](alpha, sigma) * grad).nan_to_num()
        return grad if self.grad_clip is None else grad.clamp(-self.grad_clip, self.grad_clip)

    # ---------------------------------------------------------------------- call
    def forward(
        self,
        rgb: Tensor,
        prompt_utils: Any,
        elevation: Tensor,
        azimuth: Tensor,
        camera_distances: Tensor,
        mvp_mtx: Tensor | None = None,
        c2w: Tensor | None = None,
        rgb_as_latents: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """loss_sds, or loss_vsd and loss_lora; grad_norm, min_step, max_step.

        Args: rgb: (B, H, W, C) in [0, 1]. elevation, azimuth, camera_distances: (B,). mvp_mtx, c2w:
            (B, 4, 4).
        Errors: ValueError for perp-neg prompts, or vsd without the camera that it is told.
        """
        if getattr(prompt_utils, "use_perp_neg", False):
            raise ValueError(
                "prompt_processor.use_perp_neg: expected false, got true. Turn it off."
            )
        latents = self.get_latents(rgb.permute(0, 3, 1, 2), rgb_as_latents).float()
        bsz, angles = len(latents), (elevation, azimuth, camera_distances)
        text = prompt_utils.get_text_embeddings(*angles, self.cfg.view_dependent_prompting)
        t = torch.randint(self.min_step, self.max_step + 1, (bsz,), device=self.device)
        t = t.clamp(0, self.num_train_timesteps - 1)
        fake_text, camera = None, None
        if self.cfg.kind == "vsd":
            camera = {"extrinsics": c2w, "mvp": mvp_mtx}.get(self.cfg.camera_condition_type)
            if camera is None:
                raise ValueError(
                    "camera_condition_type: expected extrinsics with c2w, or mvp with mvp_mtx, got "
                    f"{self.cfg.camera_condition_type!r} without it."
                )
            camera = camera.reshape(bsz, 16).float()
            fake_text = prompt_utils.get_text_embeddings(*angles, False).chunk(2)[0]
        grad = self.gradient(latents, t, torch.randn_like(latents), text, fake_text, camera)
        target = (latents - grad).detach()
        loss = 0.5 * F.mse_loss(latents, target, reduction="sum") / bsz  # d / d latents = grad / B
        result = {
            "loss_vsd" if self.cfg.kind == "vsd" else "loss_sds": loss,
            "grad_norm": grad.norm(),
            "min_step": self.min_step,
            "max_step": self.max_step,
        }
        if fake_text is not None and camera is not None:
            result["loss_lora"] = self.fake_loss(latents.detach(), fake_text, camera)
        return result

    def fake_loss(self, latents: Tensor, text: Tensor, camera: Tensor) -> Tensor:
        """Mean squared error of the fake's noise prediction, at any timestep."""
        t = torch.randint(0, self.num_train_timesteps, (len(latents),), device=self.device)
        noise = torch.randn_like(latents)
        alpha, sigma = self._coeffs(t)
        if self.cfg.lora_cfg_training and random.random() < NO_CAMERA_SHARE:
            camera = torch.zeros_like(camera)
        with self._as_fake():
            return F.mse_loss(self._eps(alpha * latents + sigma * noise, t, text, camera), noise)
