"""What a distillation method is: roles it needs, phases that train them, a sampler for use.

A method is pure algorithm. It sees `nets["teacher"](x_t, t, cond)` and draws from `ctx`; it holds
no optimiser, device, precision, pipeline or adapter. A new method is one file: a Config, roles(),
phases() with their losses, sampler().
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import ConfigDict
from torch import Tensor

from stepdistill.core.abilities import Abilities
from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.options import Data, Options
from stepdistill.core.path import NoisePath, PredictionType
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import snapped_grid
from stepdistill.core.types import Batch, Losses


@dataclass(frozen=True)
class Role:
    """What a method needs of a network, not how it is stored.

    source: "teacher" starts at the teacher's weights; "head" is a discriminator head.
    train: whether some phase trains it. A frozen teacher-sourced role is the teacher itself.
    ema_of: the role it follows by `nets.ema_update`; a decay never applied is a snapshot.
    extra_inputs: inputs the stock network lacks: "w" (guidance embedding), "s" (end of a jump).
    as_flow: read the output as velocity at (x, num_train_timesteps * t), whatever the teacher
        predicted (InstaFlow's raw set-up).
    features: blocks a head reads, by the family's names ("mid" exists everywhere, ("all",) is all).
    heads_per_block: logits of each of these blocks, every one by a head of its own.
    reads: the scorer, a PixelNet, whose blocks they are in place of the family's.
    """

    source: Literal["teacher", "head"] = "teacher"
    train: bool = False
    ema_of: str | None = None
    extra_inputs: tuple[str, ...] = ()
    as_flow: bool = False
    features: tuple[str, ...] = ()
    heads_per_block: int = 1
    reads: str = ""


class Scorer(Protocol):
    """A frozen judge of images, differentiable in them: a reward or a perceptual distance.

    Called with images (B, 3, H, W) in [-1, 1] and what to judge them by: B prompts (a reward,
    higher is better) or B reference images (a distance, lower is better). Returns (B,) float32.
    """

    def __call__(self, images: Tensor, by: Tensor | Sequence[str]) -> Tensor: ...


class PixelNet(Scorer, Protocol):
    """A scorer whose hidden states heads read, differentiable in the images (rewards.features)."""

    @property
    def blocks(self) -> Mapping[str, Any]:
        """Feature name -> families.features.FeatureBlock; "mid" is one."""
        ...

    def features(self, images: Tensor, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Hidden states of these blocks, or of "all", of images (B, 3, H, W) in [-1, 1]: maps
        (B, D, H, W), tokens (B, N, D)."""
        ...


@dataclass(frozen=True)
class ScorerSpec:
    """Which scorer a method wants and its options, the user's as they were given.

    kind: a name in rewards.SCORERS. option: of the method, under which `options` are given; errors
    about one of them begin with it.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    option: str = ""


class Nets(Protocol):
    """The networks by role, as a method sees them (a RoleBank, or analytic teachers in tests)."""

    def __getitem__(self, role: str) -> Denoiser: ...

    def head(self, role: str, features: Mapping[str, Tensor]) -> Tensor:
        """(B, K) logits of a discriminator's heads on captured features."""
        ...

    def images(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], unclamped, of latents (B, C, *S); keeps the graph."""
        ...

    def scorer(self, name: str) -> Scorer:
        """The scorer that `Method.scorers` asked for by that name."""
        ...

    def ema_update(self, role: str, decay: float) -> None:
        """role <- decay * role + (1 - decay) * the role it follows."""
        ...

    def mix(self, role: str, other: str, share: float) -> None:
        """role <- (1 - share) * role + share * other, of a pair in `Method.mixed_roles`."""
        ...

    def carrying(self, role: str, other: str, share: float) -> Nets:
        """These networks, but that `role`, which has no adapter, carries a share of other's.

        Args: other: `Method.carried_role`; at share 1 any role, however it is stored, which then
            stands in the place of `role`.
        """
        ...


Loss = Callable[[Nets, Batch, Ctx], Losses]


@dataclass(frozen=True)
class Phase:
    """A loss and the roles it trains; one optimiser update for each of `repeat` repeats.

    reads_x0, reads_real: whether the loss reads batch.x0, batch.real; others are not encoded.
    """

    name: str
    loss: Loss
    trains: tuple[str, ...]
    repeat: int = 1
    reads_x0: bool = True
    reads_real: bool = True


@dataclass(frozen=True)
class Setting:
    """What a method may know of the model: facts, never the model itself.

    shift: resolution shift of the teacher's own time grid (1 on a VP table).
    own: (number of steps, shift) -> the sampler that the teacher's own scheduler is, where it is
        known; ValueError where the scheduler can't take so many steps.
    owned: (lowest, highest) time that the networks are meant for: less than [0, 1] of one expert.
    """

    path: NoisePath
    kind: PredictionType = "eps"
    shift: float = 1.0
    own: Callable[[int, float], SamplerSpec] | None = None
    owned: tuple[float, float] = (0.0, 1.0)

    def own_sampler(self, num_steps: int) -> SamplerSpec:
        """The teacher's own, its visited times the only ones; the uniform grid where no scheduler
        is known. Errors: ValueError where it can't take so many steps."""
        if self.own is not None:
            return self.own(num_steps, self.shift)
        times = snapped_grid(self.path, num_steps, self.shift)
        return SamplerSpec(times, "ode", trained_times=times, keeps_scheduler=True)


@dataclass(frozen=True)
class FakeFit:
    """How a method calls the fake score that it fits to the student's samples.

    teacher, fake: guidance of each in the student's gradient; means where it is drawn anew.
    fitted: guidance of the prediction that is fitted (1 in all but SiD-LSG).
    last_step: whether it is fitted to what the sampler's last step alone makes.
    """

    teacher: float
    fake: float = 1.0
    fitted: float = 1.0
    last_step: bool = False


class MethodConfig(Options):
    """Base of every method's Config: unknown keys are errors, values are checked once."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def unfit(cls, options: Mapping[str, Any], model: Abilities) -> dict[str, tuple[Any, str]]:
        """Options that such a model can't have -> (what suits it, why), of a method's file or a
        recipe; a user's own are refused where they are checked."""
        return {}

    def changed(self, *names: str) -> tuple[str, ...]:
        """Those of these options that have another value than by default. (Which were given says
        nothing: a resolved config, as a run saves it, gives all.)"""
        defaults = {
            name: type(self).model_fields[name].get_default(call_default_factory=True)
            for name in names
        }
        return tuple(name for name in names if getattr(self, name) != defaults[name])


C = TypeVar("C", bound=MethodConfig)
Status = Literal["derived", "checked on analytic teachers", "trained on real data here"]
# Batch fields that each kind of data fills.
FIELDS: Mapping[Data, frozenset[str]] = {
    "prompts": frozenset({"cond"}),
    "images": frozenset({"cond", "x0"}),
    "pairs": frozenset({"cond", "x0", "noise"}),
    "preferences": frozenset({"cond", "x0", "rejected"}),
    "lowres": frozenset({"cond", "x0", "easier"}),
}
# Those that a teacher, prompts and images of any kind give, so that methods can be compared.
COMMON_DATA: tuple[Data, ...] = ("prompts", "images", "pairs")


class Method(ABC, Generic[C]):
    """One distillation algorithm, and all that others must know of it.

    name: the key in METHODS, of its file or entry point. paper: its source. Config: its options.
    status: how far it was tried.
    aliases: users' other names for it, in small letters with underscores, each with the options
        that it stands for.
    trainer: the name of the trainer class that serves it.
    guidance_options: the options that say how its losses guide the teacher, each a number g, a
        range of g or a switch. The first that is set to a number or a range counts. All of these
        have to be 1 where the model has no null condition.
    data: what it learns from by default: prompts, images, the teacher's noise-image pairs,
        preferences (of two images of a prompt, x0 was chosen over `rejected`), or lowres (images
        with two low resolutions of each, one of them `easier`).
    needs_image: whether it is for models that read an image beside the prompt alone.
    serves_part: whether its times keep to `Setting.owned`: one expert of two is trained by such
        methods alone.
    steps: the step counts it is meant for. one_student: whether one training serves all of them.
    steps_option: the option that sets how many steps a student takes.
    any_student: whether a student of another architecture than the teacher's makes sense.
    needs_rewards: whether its own losses are nothing without the run's rewards.
    settings_file: its file in configs/methods that ends in a few-step student, if not NAME.yaml.
    digits: how students of the demo's digits are trained; none: by the common settings.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    guidance_options: ClassVar[tuple[str, ...]] = ()
    status: ClassVar[Status] = "derived"
    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    trainer: ClassVar[str] = "DistillationTrainer"
    data: ClassVar[Data] = "prompts"
    serves_part: ClassVar[bool] = False
    steps: ClassVar[tuple[int, ...]] = (1, 2, 4)
    one_student: ClassVar[bool] = False
    steps_option: ClassVar[str] = "num_steps"
    any_student: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = False
    needs_image: ClassVar[bool] = False
    settings_file: ClassVar[str] = ""
    digits: ClassVar[tuple[Recipe, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What stands on a method is not said of the methods derived from it."""
        super().__init_subclass__(**kwargs)
        for fact in ("status", "aliases", "settings_file", "digits"):
            if fact not in vars(cls):
                setattr(cls, fact, vars(Method)[fact])

    def __init__(self, config: C, setting: Setting) -> None:
        self.config = config
        self.setting = setting
        if setting.owned != (0.0, 1.0) and not self.serves_part:
            raise ValueError(
                "expert: expected both, or a method that keeps to one's times, as dmd2 does, got "
                f"one with {self.name}. Leave --expert out, or name such a method."
            )

    @classmethod
    def for_steps(cls, num_steps: int) -> dict[str, Any]:
        """The options of a student of that many steps."""
        several = isinstance(cls.Config.model_fields[cls.steps_option].default, tuple)
        return {cls.steps_option: [num_steps] if several else num_steps}

    @classmethod
    def guidance_of(cls, config: MethodConfig) -> tuple[float, float]:
        """(lowest, highest) guidance g of the teacher, null + g (cond - null); (1, 1) is none."""
        for value in (getattr(config, name) for name in cls.guidance_options):
            if isinstance(value, tuple):
                return value
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value), float(value)
        return 1.0, 1.0

    @classmethod
    def options_at(cls, guidance: float) -> dict[str, Any]:
        """Options that hold the teacher's guidance at one number: what is off by default is off."""
        defaults = {name: cls.Config.model_fields[name].default for name in cls.guidance_options}
        ranges = {n: [guidance] * 2 for n, v in defaults.items() if isinstance(v, tuple)}
        off = {name: value for name, value in defaults.items() if not value}
        return {**dict.fromkeys(defaults, guidance), **ranges, **off}

    @classmethod
    def guided_by(
        cls, options: Mapping[str, Any], guidance: float | Sequence[float]
    ) -> dict[str, Any]:
        """What to lay over `options` for a teacher that is guided at g, or over a range of g.

        Where a range is wanted and one number given (or the other way round), it is its two ends
        (its middle). Nothing is changed where `options` guide the teacher by none, or by an option
        that is off by default: both are laws of the method's own, as CD's and SNOOPI's.
        """
        ends = [float(g) for g in ([guidance] if isinstance(guidance, int | float) else guidance)]
        if ends == [1.0]:
            return cls.options_at(1.0)
        fields = cls.Config.model_fields
        for name in cls.guidance_options:
            default = fields[name].default
            value = options.get(name, default)
            if value is None or isinstance(value, bool):
                continue
            held = value if isinstance(value, list | tuple) else [value]
            if default is None or all(g == 1.0 for g in held):
                return {}
            middle = sum(ends) / len(ends)
            return {name: [ends[0], ends[-1]] if isinstance(default, tuple) else middle}
        return {}

    @property
    def teacher_guidance(self) -> float:
        """Guidance of the teacher whose distribution (or trajectory) the student ends at.

        What it is validated against. That told to the sampler, or the middle of what the losses
        guide the teacher by; a method whose fixed point is another teacher says so here.
        """
        w = self.sampler().w
        return 0.5 * sum(self.guidance_of(self.config)) if w is None else w + 1.0

    @property
    def reads_null(self) -> str:
        """The option by which a network is called under the null condition alone; "" for none."""
        return ""

    @property
    def skip_layers(self) -> tuple[str, ...]:
        """Blocks that the teacher's null passes leave out (`Denoiser.skipping`)."""
        return ()

    @property
    def mixed_roles(self) -> Sequence[tuple[str, str]]:
        """(role, other) whose weights are mixed (`Nets.mix`), so have to be stored alike."""
        return ()

    @property
    def carried_role(self) -> str:
        """The role whose adapter others carry a share of (`Nets.carrying`); "" for none."""
        return ""

    @property
    def forward_mode(self) -> bool:
        """Whether its losses differentiate a network in forward mode (a JVP)."""
        return False

    @property
    def fake_fit(self) -> FakeFit | None:
        """How the fake score is called and fitted; None where no such network is."""
        return None

    @property
    def needs(self) -> frozenset[str]:
        """Batch fields the losses read, checked against the dataset before step 1.

        "real" is x0 that a discriminator alone reads: the run may have a source of its own for it.
        """
        return FIELDS[self.data]

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """Every role the phases call, by its fixed name."""

    def scorers(self) -> dict[str, ScorerSpec]:
        """Judges of images the losses call by `nets.scorer(name)`; most methods need none."""
        return {}

    @abstractmethod
    def phases(self, step: int) -> Sequence[Phase]:
        """The updates that make up student step `step`, in order."""

    @property
    def part_starts(self) -> tuple[int, ...]:
        """The first student step of each part of a run that has phases of its own, from 0 on."""
        return (0,)

    def check_length(self, max_steps: int) -> None:
        """Errors: ValueError for a run of max_steps student updates with stages that never come."""
        self.sampler_at(0, max_steps)

    def check_student(self, begins_as_teacher: bool) -> None:
        """Errors: ValueError for options that leave nothing to learn for a student that begins with
        the teacher's weights, or else for one that doesn't (of other sizes, or trained before)."""

    def resets(self, step: int, max_steps: int) -> tuple[str, ...]:
        """Trained roles whose optimiser state is cleared before student step `step`.

        Averages that follow such a role start anew from it. A pure function of the position, so
        that a resumed run resets where the first one did.
        """
        return ()

    def learning_rate_scale(self, step: int, max_steps: int, role: str) -> float:
        """Factor on a role's learning rate at student step `step`; pure, as `resets` is."""
        return 1.0

    def after(self, nets: Nets, step: int) -> None:
        """Work at the end of a student step: EMA targets, schedules."""
        return

    @abstractmethod
    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """How the student is sampled; with num_steps, at that many steps of its trained grid."""

    def sampler_at(self, step: int, max_steps: int, num_steps: int | None = None) -> SamplerSpec:
        """The sampler of a student after `step` of max_steps updates, the run stopped there.

        `sampler` is that of a finished run; a method whose grid changes while it trains gives the
        one of the last update. Before any update that is the finished run's, too. Pure.
        """
        return self.sampler(num_steps)

    def state_dict(self) -> dict[str, Tensor]:
        """Buffers to save with a checkpoint; empty for methods without state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{self.name}: expected no saved state, got {sorted(state)}.")
