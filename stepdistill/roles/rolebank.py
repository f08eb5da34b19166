"""RoleBank: who owns which weights. The only place that knows adapters, copies, EMA and snapshots.

One frozen base serves as the teacher (adapters off). A trained role is an adapter on that base,
named after the role ("lora"), or a copy of its own ("full"). Switching roles only sets which
adapter is active; `requires_grad` changes in `train_only` alone, once per phase, before forwards.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stepdistill.config.tuning import Tuning
from stepdistill.core.denoiser import Denoiser, Prediction
from stepdistill.core.method import Nets, PixelNet, Role, Scorer
from stepdistill.families.causal import Causal, causal_state
from stepdistill.families.family import Family
from stepdistill.families.features import FeatureBlock, chosen_blocks
from stepdistill.families.vae import decode_latents
from stepdistill.loading.quantization import check_base
from stepdistill.loading.stored_tensors import StoredTensors
from stepdistill.roles.carrying import Carrying
from stepdistill.roles.checkpointing import Contexts, checkpoint_blocks, no_contexts
from stepdistill.roles.heads import make_head
from stepdistill.roles.role_denoiser import RoleDenoiser, forget_graphless_casts
from stepdistill.roles.role_weights import copy_into, local_tensor, to_cpu
from stepdistill.roles.student_net import new_student

BASE = "base"
STUDENT_BASE = "student_base"


class RoleBank(nn.Module):
    """All networks of a run, by role. Implements `core.method.Nets`.

    Args:
        family: adapter around the loaded teacher pipeline; its denoiser becomes the frozen base.
        roles: what the method needs. tuning: how trained roles store their weights.
        scorers: frozen judges of images by the method's names for them.
        decoder: a small autoencoder that makes the images they judge; None means the family's.
        student_base: a frozen network of the teacher's architecture below a LoRA student's adapter,
            in place of the teacher's own.
    Errors: ValueError for a role that follows an unknown one, extra inputs with LoRA, a feature
        block the family lacks, or a denoiser that already carries adapters.
    """

    def __init__(
        self,
        family: Family,
        roles: Mapping[str, Role],
        tuning: Tuning,
        scorers: Mapping[str, Scorer] | None = None,
        decoder: Any = None,
        student_base: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # Frozen helpers stay outside the module tree: no optimiser or wrapper has to know them.
        self._scorers, self._decoder = dict(scorers or {}), (decoder,)
        self.family, self.roles, self.tuning = family, dict(roles), tuning
        self.nets = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self._adapter_of: dict[str, str | None] = {}  # role -> adapter name on its net
        self._net_of: dict[str, str] = {}  # role -> key of self.nets
        self._active: str | None = None
        self._share = 1.0  # of the active adapter's strength
        self._watcher: Callable[[str, Prediction], None] | None = None
        self._check()
        changes = tuning.student_changes
        other = None if changes is None else new_student(family, changes)
        for role in self._stored("full"):  # copies first: the base must still be plain
            like = other if self.is_student(role) else None
            extra_inputs = self._origin(role).extra_inputs
            self.nets[role] = family.copy_net(extra_inputs, like).float()
            self._net_of[role], self._adapter_of[role] = role, None
        self.nets[BASE] = family.net.requires_grad_(False)
        if student_base is not None:
            self.nets[STUDENT_BASE] = student_base.requires_grad_(False)
        for role in self._stored("lora"):
            elsewhere = student_base is not None and self.is_student(role)
            self._net_of[role] = STUDENT_BASE if elsewhere else BASE
            self._adapter_of[role] = role
            self._add_adapter(role)
        for role, spec in self.roles.items():
            if spec.source == "head":
                chosen = [*chosen_blocks(spec.features, self._blocks(role)).values()]
                self.heads[role] = make_head(chosen, spec.heads_per_block)
            elif role not in self._net_of:
                self._net_of[role], self._adapter_of[role] = BASE, None
        self._tuner_layers = [m for m in self.nets.modules() if isinstance(m, BaseTunerLayer)]
        self.rebind()
        for role, spec in self.roles.items():
            if spec.ema_of is not None:
                self.ema_update(role, decay=0.0)
        self._denoisers = {
            role: RoleDenoiser(
                family,
                self.base_of(role),
                self._adapter_of[role],
                self.use,
                self._origin(role).as_flow,
                features=changes is None or not self.is_student(role),
                see=partial(self._seen, role),
            )
            for role, spec in self.roles.items()
            if spec.source != "head"
        }
        self.eval()
        self._activate(None)
        self.train_only(self.trained_roles)

    # ------------------------------------------------------------- building
    def _check(self) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in self.family.net.modules()):
            raise ValueError(
                f"{self.family.name}: expected a plain denoiser, got one with adapters on it. "
                "Fuse them first (pipeline.fuse_lora, then unload_lora_weights), or load it again."
            )
        check_base(self.family.net, self.tuning.base_quantization, self._stored("full"))
        for role, spec in self.roles.items():
            if spec.ema_of is not None and spec.ema_of not in self.roles:
                raise ValueError(
                    f"role {role!r}: expected ema_of a role of this method, got {spec.ema_of!r}."
                )
            blocks = self._blocks(role)
            unknown = sorted(set(spec.features) - set(blocks) - {"all"})
            if unknown:
                raise ValueError(
                    f"role {role!r}: expected feature blocks of {spec.reads or self.family.name} "
                    f"({', '.join(blocks)}), got {unknown}."
                )
            if spec.extra_inputs and self.tuning.layout(role, spec.ema_of) == "lora":
                raise ValueError(
                    f"role {role!r}: expected tuning 'full' with extra inputs {spec.extra_inputs} "
                    "(an adapter has no place for new weights), got 'lora'. "
                    f"Set --tuning.{role} full, or turn off what asks for them."
                )

    def _blocks(self, role: str) -> Mapping[str, FeatureBlock]:
        """The blocks that a head may read: of the family's networks, or of a pixel network."""
        if not (reads := self.roles[role].reads):
            return self.family.feature_blocks()
        return cast(PixelNet, self._scorers[reads]).blocks

    def _origin(self, role: str) -> Role:
        """The role whose network this one copies: itself, or what its EMA follows."""
        spec = self.roles[role]
        return spec if spec.ema_of is None else self.roles[spec.ema_of]

    def is_student(self, role: str) -> bool:
        """Whether the role has the student's architecture: the student and what follows it."""
        return "student" in (role, self.roles[role].ema_of)

    def _stored(self, layout: str) -> list[str]:
        """Teacher-sourced roles with weights of their own in that layout, trained ones first."""
        roles = [
            role
            for role, spec in self.roles.items()
            if spec.source == "teacher" and (spec.train or spec.ema_of is not None)
        ]
        roles.sort(key=lambda role: self.roles[role].ema_of is not None)
        return [r for r in roles if self.tuning.layout(r, self.roles[r].ema_of) == layout]

    def _add_adapter(self, role: str) -> None:
        rank, scale = self.tuning.lora(self.roles[role].ema_of or role)
        alpha: Any = int(scale) if scale == int(scale) else scale  # peft types it int, takes both
        targets = self.tuning.target_modules or self.family.lora_targets
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
        net = self.base_of(role)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Already found a `peft_config`"
            )  # several, on purpose
            inject_adapter_in_model(config, net, adapter_name=role)
        for name, param in net.named_parameters():
            if f".{role}." in name:
                param.data = param.data.float()

    def base_of(self, role: str) -> nn.Module:
        """The network that computes the role: of an adapter, the frozen one it sits on."""
        return self.nets[self._net_of[role]]

    def rebind(self) -> None:
        """Look the roles' parameters up anew, after a caller replaced them in their modules."""
        named = {net: dict(module.named_parameters()) for net, module in self.nets.items()}
        self._members = {role: self._collect(role, named) for role in self.roles}

    def _collect(
        self, role: str, named: Mapping[str, dict[str, nn.Parameter]]
    ) -> dict[str, nn.Parameter]:
        """The role's own parameters by stock name; empty for the plain teacher.

        Args: named: the parameters of each of `nets`, gone through once for all roles.
        """
        if role in self.heads:
            return dict(self.heads[role].named_parameters())
        adapter = self._adapter_of[role]
        if adapter is not None:
            return {
                name.replace(f".{role}.", "."): param
                for name, param in named[self._net_of[role]].items()
                if f".{role}." in name
            }
        if self._net_of[role] == BASE:
            return {}
        return named[self._net_of[role]]

    # -------------------------------------------------------- Nets protocol
    @property
    def trained_roles(self) -> tuple[str, ...]:
        return tuple(role for role, spec in self.roles.items() if spec.train)

    def __getitem__(self, role: str) -> Denoiser:
        return self._denoisers[role]

    def __contains__(self, role: str) -> bool:
        return role in self.roles

    @contextmanager
    def watched(self, see: Callable[[str, Prediction], None]) -> Iterator[None]:
        """Within: `see` is told of each prediction, with its role."""
        self._watcher = see
        try:
            yield
        finally:
            self._watcher = None

    def _seen(self, role: str, pred: Prediction) -> None:
        if self._watcher is not None:
            self._watcher(role, pred)

    def head(self, role: str, features: Mapping[str, Tensor]) -> Tensor:
        """(B, K) logits: of each block that is read, a column per head on it."""
        names = chosen_blocks(self.roles[role].features, self._blocks(role))
        logits: Tensor = self.heads[role]([features[name] for name in names])
        forget_graphless_casts()
        return logits

    def images(self, latents: Tensor) -> Tensor:
        """See Nets.images; in the VAE's own precision, as half overflows in some.

        Of videos, the middle frame; of sound, waves (B, A, T).
        """
        (decoder,) = self._decoder
        with torch.autocast(latents.device.type, enabled=False):
            images = decode_latents(decoder, latents) if decoder else self.family.images(latents)
        return images[:, :, images.shape[2] // 2] if images.ndim == 5 else images

    @property
    def judged_by_vae(self) -> bool:
        """Whether scorers see what the family's own autoencoder makes."""
        return bool(self._scorers) and self._decoder == (None,)

    def scorer(self, name: str) -> Scorer:
        """See Nets.scorer."""
        return self._scorers[name]

    @torch.no_grad()
    def ema_update(self, role: str, decay: float) -> None:
        """role <- decay * role + (1 - decay) * followed role; decay 0 copies."""
        followed = self.roles[role].ema_of
        assert followed is not None, f"role {role!r} follows nobody"
        self.mix(role, followed, 1.0 - decay)

    @torch.no_grad()
    def mix(self, role: str, other: str, share: float) -> None:
        """See Nets.mix."""
        mine, theirs = self._members[role], self._members[other]
        source = [local_tensor(theirs[name].data) for name in mine]
        torch._foreach_lerp_([local_tensor(p.data) for p in mine.values()], source, share)

    def carrying(self, role: str, other: str, share: float) -> Nets:
        """See Nets.carrying."""
        if share == 1.0:
            stands_in = self._denoisers[other].seen_by(partial(self._seen, role))
            return Carrying(self, role, stands_in)
        adapter = self._adapter_of[other]
        assert adapter is not None, f"role {other!r} has no adapter"
        assert self._adapter_of[role] is None, f"role {role!r} has an adapter of its own"
        carried = partial(self.use, share=share)
        return Carrying(self, role, self._denoisers[role].under(adapter, carried))

    # ------------------------------------------------------------ switching
    @property
    def active(self) -> str | None:
        """The adapter that the base answers with now; None means plain."""
        return self._active

    def _activate(self, adapter: str | None, share: float = 1.0) -> None:
        # Private peft flags on purpose: the public set_adapter also flips requires_grad. Written
        # past Module.__setattr__, which looks for weights first: a recomputed block switches twice.
        flags: dict[str, Any] = {"_disable_adapters": adapter is None}
        for layer in self._tuner_layers:
            vars(layer).update(flags if adapter is None else flags | {"_active_adapter": [adapter]})
        if share != self._share:
            for name, part in ((self._active, 1.0), (adapter, share)):
                self._scale(name, part)
        self._active, self._share = adapter, share

    def _scale(self, adapter: str | None, share: float) -> None:
        """Give an adapter that share of its strength, as peft computes it."""
        for layer in self._tuner_layers:
            if adapter in layer.scaling:
                layer.scaling[adapter] = layer.lora_alpha[adapter] / layer.r[adapter] * share

    @contextmanager
    def use(self, adapter: str | None, share: float = 1.0) -> Iterator[None]:
        """Within: the base answers with that share of an adapter, or plain. Never touches
        requires_grad."""
        before = self._active, self._share
        if (adapter, share) != before:
            self._activate(adapter, share)
        try:
            yield
        finally:
            if (adapter, share) != before:
                self._activate(*before)

    def train_only(self, roles: Sequence[str]) -> None:
        """Set requires_grad on exactly these roles' parameters; once per phase, before forwards."""
        for role, members in self._members.items():
            for param in members.values():
                param.requires_grad_(role in roles)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward, each block under the role it was run with forward, and
        behind the chunks that it saw then."""

        def contexts(causal: Causal | None) -> Callable[[], Contexts]:
            role, share = self._active, self._share
            if causal is None:
                return lambda: (nullcontext(), self.use(role, share))
            as_now = causal.as_now()

            @contextmanager
            def both() -> Iterator[None]:
                with self.use(role, share), as_now():
                    yield

            return lambda: (nullcontext(), both())

        for net in self.nets.values():
            checkpoint_blocks(net, partial(contexts, causal_state(net)))
        for net in self.family.side_parts.values():  # in the graph where x_t is
            checkpoint_blocks(net, no_contexts)

    def train(self, mode: bool = True) -> RoleBank:
        """Stays in eval mode: train mode would drop class labels and activations at random."""
        return super().train(False)

    # --------------------------------------------------------------- weights
    def members(self, role: str) -> dict[str, nn.Parameter]:
        """The role's own parameters by stock name (adapter infix removed)."""
        return self._members[role]

    def stored(self, role: str) -> Mapping[str, Tensor]:
        """What a checkpoint holds of the role: its weights, and the buffers of own copies."""
        if role in self.heads:
            return self.heads[role].state_dict()
        return self.nets[role].state_dict() if role in self.nets else dict(self._members[role])

    def role_state(self, role: str) -> dict[str, Tensor]:
        """Whole CPU copies of what the role stores; in shards, call on every process."""
        return to_cpu(self.stored(role))

    def load_role_state(self, role: str, state: Mapping[str, Tensor] | StoredTensors) -> None:
        """Copy saved weights in. Errors: ValueError naming missing and unexpected tensors."""
        copy_into(self.stored(role), state, f"role {role!r}")
