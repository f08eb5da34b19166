"""Stage two of YONOS-SR: the decoder learns what one step of the frozen student leaves out.

The student's own steps make latents from noise and the low-resolution image, without gradients; the
decoder, and nothing else, is tuned on
    l1 |D(z) - image| + perceptual d(D(z), image) + gan relu-hinge of a PatchGAN on D(z),
on what it will be given in use, not on encoded images. The export is the student's own, byte for
byte, but for the autoencoder's folder.
Source: Noroozi et al. 2024, arXiv:2401.17258 (which losses; their weights are ours); Isola et al.
2017, arXiv:1611.07004 (PatchGAN); Lim & Ye 2017, arXiv:1705.02894 (hinge).
"""

# Shapes: B batch, C channels, *S of latents, H, W in px.

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.config.decoder import DecoderOptions
from stepdistill.config.tuning import Tuning
from stepdistill.core.context import Ctx
from stepdistill.core.method import Role, Scorer, ScorerSpec
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.stopping import stop_if_orphaned
from stepdistill.data.degradation import Degradation, check_factor
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.source import fitted
from stepdistill.data.stream import stream
from stepdistill.families.family import Family
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.families.size import size_fits
from stepdistill.loading.safe_files import read_tensors
from stepdistill.losses.adversarial import discriminator_loss, generator_loss
from stepdistill.rewards import build_scorers, check_scorers
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.files import EXPORT_RECORD, json_sha256, read_json
from stepdistill.storage.folders import LEDGER, fault_of, refuse_foreign, replacing, write_folder
from stepdistill.storage.optimizers import load_optimizer_tensors, optimizer_tensors
from stepdistill.training.batches import BatchMaker

SAVE_SECONDS = 60.0
Tell = Callable[[int, dict[str, float]], None]


class PatchGAN(nn.Module):
    """Logits (B, 1, h, w) of patches of images (B, 3, H, W): pix2pix's discriminator, 70 px of an
    image each, or of fewer where the image is small. Groups are normed, not batches."""

    def __init__(self, side: int, width: int = 64) -> None:
        super().__init__()
        strides = [2] * max(1, min(3, side.bit_length() - 4)) + [1]
        layers: list[nn.Module] = []
        inner = 3
        for i, stride in enumerate(strides):
            outer = width * min(2**i, 8)
            norm = [nn.GroupNorm(8, outer)] if i else []
            layers += [nn.Conv2d(inner, outer, 4, stride, 1), *norm, nn.LeakyReLU(0.2)]
            inner = outer
        self.net = nn.Sequential(*layers, nn.Conv2d(inner, 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


def tune_decoder(options: DecoderOptions, tell: Tell = lambda step, logs: None) -> Path:
    """The student's export with a tuned decoder, in options.output_dir; an equal call that was cut
    off goes on, with the same draws.

    Args: tell: called with each step and its losses.
    Errors: ValueError for a student of another kind, images that can't be made smaller so, or an
        output_dir with anything else in it; before a weight is loaded.
    """
    source, out = Path(options.student), Path(options.output_dir)
    record = read_json(source / EXPORT_RECORD, ("run", "times", "kind"))
    rule = _degradation(options, record)
    refuse_foreign(out, "output_dir")
    judges = _judges(options)
    check_scorers(judges, {})
    facts = teacher_facts(str(source))
    data = ImageFolderDataset(
        options.train_data_dir, options.resolution, plain=rule.prompt is not None
    )
    data.degradation = rule
    family = load_family(str(source))
    size_fits(options.resolution, family)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family.pipeline.to(device)
    size = (family.image_size(options.resolution), family.size_multiple, family.px_beside)
    work = _Work(options, family, fitted(data, *size), record, device)
    work.judge = build_scorers(judges, {}, device).get("judge")
    part = out.with_name(out.name + ".part")
    call = {
        "options": options.model_dump(mode="json", exclude={"output_dir"}),
        "of": facts.pipeline,
    }
    work.run(part, json_sha256([call, record["run_sha256"]]), tell)
    with replacing(out, "output_dir") as aside:
        shutil.copytree(source, aside, ignore=shutil.ignore_patterns(LEDGER, "vae"))
        family.pipeline.vae.save_pretrained(aside / "vae", safe_serialization=True)
        record["decoder"] = call["options"]
        (aside / EXPORT_RECORD).write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(part, ignore_errors=True)
    return out


def _degradation(options: DecoderOptions, record: dict[str, Any]) -> Degradation:
    """Errors: ValueError where neither the call nor the student's run says one."""
    trained_with = (record["run"].get("data") or {}).get("degradation")
    rule = options.degradation
    if rule.factor is None and trained_with is not None:
        rule = Degradation(**trained_with)
    if rule.factor is None or record["times"] is None:
        got = "none" if rule.factor is None else "a student of its model's own scheduler"
        raise ValueError(
            f"student: expected the export of a run on --data.degradation.factor, got {got}. Say "
            "--degradation.factor, or export such a student."
        )
    check_factor(rule, options.resolution)
    return rule


def _judges(options: DecoderOptions) -> dict[str, ScorerSpec]:
    if options.network is None or not options.perceptual:
        return {}
    if options.network == "lpips":
        return {"judge": ScorerSpec("lpips")}
    return {"judge": ScorerSpec("features", {"network": options.network})}


class _Work:
    """The decoder in work, with what trains it."""

    judge: Scorer | None = None

    def __init__(
        self,
        options: DecoderOptions,
        family: Family,
        data: Any,
        record: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.options, self.family, self.data, self.device = options, family, data, device
        times = tuple(record["times"])
        self.spec = SamplerSpec(times, record["kind"])
        self.student = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
        self.batches = BatchMaker(family, device, options.resolution)
        vae = family.pipeline.vae
        parts = {"decoder": vae.decoder, "post_quant_conv": getattr(vae, "post_quant_conv", None)}
        self.decoder = nn.ModuleDict({k: v for k, v in parts.items() if v is not None})
        self.decoder.requires_grad_(True)
        self.average = {k: v.detach().clone() for k, v in self.decoder.state_dict().items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            side = min(family.image_size(options.resolution))
            self.patches = PatchGAN(side).to(device)
        rates = (options.learning_rate, options.discriminator_learning_rate)
        self.optimizers = [
            torch.optim.Adam(net.parameters(), lr=rate, betas=(0.5, 0.9))
            for net, rate in zip((self.decoder, self.patches), rates, strict=True)
        ]

    def run(self, part: Path, call: str, tell: Tell) -> None:
        """All updates, from where `part` stands; the average is the decoder then."""
        options, begin = self.options, self._resumed(part, call)
        batches = stream(self.data, options.train_batch_size, options.seed, start=begin)
        saved = time.monotonic()
        for step in range(begin, options.max_train_steps):
            stop_if_orphaned()
            tell(step + 1, self._update(next(batches), step))
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save(part, call, step + 1)
                saved = time.monotonic()
        self.decoder.load_state_dict(self.average)
        self.decoder.requires_grad_(False)

    def _update(self, raw: dict[str, Any], step: int) -> dict[str, float]:
        options, (ours, theirs) = self.options, self.optimizers
        wanted = raw["image"].to(self.device)
        batch = self.batches(raw, with_x0=False)
        ctx = Ctx(options.seed, step, options.max_train_steps, "decoder", device=self.device)
        noise = ctx.randn((batch.bsz, *batch.shape))
        fresh = [ctx.randn(tuple(noise.shape)) for _ in self.spec.times[1:]]
        with torch.no_grad():
            latents = sample_x0(
                self.student, self.spec, noise, batch.cond, fresh_noise=lambda i: fresh[i]
            )
        images = self.family.images(latents)
        absolute = (images - wanted).abs().mean()
        total, logs = options.l1 * absolute, {"l1": absolute}
        if self.judge is not None:
            logs["perceptual"] = self.judge(images, wanted).mean()
            total = total + options.perceptual * logs["perceptual"]
        adversarial = options.gan > 0 and step >= options.gan_start
        if adversarial:
            self.patches.requires_grad_(False)
            logs["gan"] = generator_loss(self.patches(images), "hinge")
            total = total + options.gan * logs["gan"]
        ours.zero_grad()
        total.backward()
        ours.step()
        with torch.no_grad():
            decay = min(options.ema_decay, (1 + step) / (10 + step))
            for name, value in self.decoder.state_dict().items():
                self.average[name].lerp_(value, 1.0 - decay)
        if adversarial:
            self.patches.requires_grad_(True)
            loss = discriminator_loss(self.patches(wanted), self.patches(images.detach()), "hinge")
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            logs["discriminator"] = loss
        return {name: float(value.detach()) for name, value in logs.items()}

    def _save(self, part: Path, call: str, step: int) -> None:
        tensors = {
            "decoder": {k: v.contiguous() for k, v in self.decoder.state_dict().items()},
            "average": self.average,
            "patches": self.patches.state_dict(),
            "decoder_moments": optimizer_tensors(self.optimizers[0]),
            "patches_moments": optimizer_tensors(self.optimizers[1]),
        }
        state = {"step": step, "call": call}
        write_folder(part, {k: v for k, v in tensors.items() if v}, {"state": state})

    def _resumed(self, part: Path, call: str) -> int:
        """The step to go on at; 0 where there is nothing whole, or of another call."""
        if fault_of(part) is not None:
            return 0
        state = read_json(part / "state.json", ("step", "call"))
        if state["call"] != call:
            return 0
        self.decoder.load_state_dict(read_tensors(part / "decoder.safetensors"))
        average = read_tensors(part / "average.safetensors")
        self.average = {name: value.to(self.device) for name, value in average.items()}
        self.patches.load_state_dict(read_tensors(part / "patches.safetensors"))
        for optimizer, name in zip(self.optimizers, ("decoder", "patches"), strict=True):
            if (file := part / f"{name}_moments.safetensors").is_file():
                load_optimizer_tensors(optimizer, read_tensors(file))
        return int(state["step"])
