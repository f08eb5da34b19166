"""`stepdistill particles`: an optimisation for each gradient, beside the teacher's own samples.

The demo's digits are judged as its students are: against held-out real ones, in the features of a
small network, with one particle for each of their prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.config.tuning import Tuning
from stepdistill.core.context import Ctx
from stepdistill.core.method import Role
from stepdistill.core.solvers import ode_solve
from stepdistill.core.times import uniform_grid
from stepdistill.demo.classifier import DigitClassifier, train_classifier
from stepdistill.demo.data import DIGIT_NAMES, load_digit_splits, prompt_for
from stepdistill.demo.metrics import PREVIEWS_PER_CLASS, Judge, Row
from stepdistill.demo.teacher import RECORD, TeacherConfig, load_or_train_teacher, quiet_loading
from stepdistill.evaluation.samples import Samples
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.loading.source import ModelSource
from stepdistill.losses.score_options import GradientSettings, ScoreGradientConfig
from stepdistill.particles.options import (
    FakeConfig,
    ParticleConfig,
    ParticleOptions,
    parse_gradient,
)
from stepdistill.particles.report import FILES, Shown, figures, grid, write_report
from stepdistill.particles.run import Made, optimise
from stepdistill.particles.voxels import turntable
from stepdistill.reporting.bars import bar
from stepdistill.reporting.values import counted
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.folders import refuse_written_on
from stepdistill.storage.owner import owned
from stepdistill.storage.ranks import process_state

VIEWS = 12  # of a turntable
LARGE = 4  # times the teacher's images: the size of its second line
# Of the demo's digits, where nothing else is said: small networks learn fast, and at the teacher's
# own distribution (guidance 1) vsd has a recall to keep.
DIGIT_GRADIENTS = ("sds:1", "sds:7.5", "vsd:1")
DIGITS: dict[str, Any] = {
    "fake": FakeConfig(rank=16, learning_rate=2e-3),
    "learning_rate": 0.1,
    "max_steps": 400,
    "batch_size": 128,
}
DIGIT_SCENES: dict[str, Any] = {
    "fake": DIGITS["fake"],
    "num_particles": 1,
    "max_steps": 600,
    "learning_rate": 0.05,
}
MAX_T = (0.5, 0.98, 0.5, 1.0)  # largest time over the share of steps done: ProlificDreamer's stages
PROMPTS = [prompt_for(k) for k in range(len(DIGIT_NAMES))]
ROUND_DIGITS = (0, 8)  # that look alike from all around
GUIDED = 7.5  # what the teacher's second row is sampled at


@dataclass(frozen=True)
class Setup:
    """What the command works on. judge: of the digits, where all their prompts are asked for.
    classifier: of theirs, that reads the views of scenes."""

    source: ModelSource
    prompts: Sequence[Any]
    gradient: GradientSettings
    config: ParticleConfig
    judge: Judge | None = None
    classifier: DigitClassifier | None = None

    @property
    def each(self) -> list[Any]:
        """The prompt of each particle."""
        return [p for p in self.prompts for _ in range(self.config.num_particles)]


def run_particles(options: ParticleOptions) -> Path:
    """Optimise, judge and write the report, whose path is returned.

    Errors: ValueError for wrong options, before a weight is loaded.
    """
    out = Path(options.output_dir)
    digits = _is_digits(options)
    texts = options.gradients
    if digits and "gradients" not in options.model_fields_set:
        texts = DIGIT_GRADIENTS
    wanted = [parse_gradient(text) for text in texts]
    labels = [kind if g is None else f"{kind}-{g:g}" for kind, g in wanted]
    if not any((out / label).is_dir() for label in labels):
        refuse_written_on(out, FILES, "output_dir")
    quiet_loading()
    with owned(out, "output_dir"):
        setup = _digits(options, out) if digits else _own(options)
        device = process_state().device
        known_by = setup.source.identity()
        shown: list[Shown] = []
        for (kind, g), label in zip(wanted, labels, strict=True):
            settings = setup.gradient.model_dump()
            gradient = ScoreGradientConfig(**settings, kind=kind, guidance=g)
            name = kind if g is None else f"{kind}, guidance {g:g}"
            with bar(total=setup.config.max_steps, desc=label, unit="step") as shown_bar:

                def tell(step: int, _loss: float, shown_bar: Any = shown_bar) -> None:
                    shown_bar.update(step - shown_bar.n)

                where = (setup.source, setup.prompts, gradient, setup.config, out / label)
                made = optimise(*where, teacher=known_by, device=device, tell=tell)
            shown += _rows(setup, name, made)
        return write_report(
            out,
            f"Particles: {', '.join(texts)}",
            [*_references(setup, options.teacher_steps, device), *shown],
            _facts(setup, options),
            _note(setup),
            "particles" if options.parameters != "voxels" else "a turn around the scene",
        )


def _is_digits(options: ParticleOptions) -> bool:
    """Whether the teacher is the demo's: none is named, or one that it made."""
    folder = options.pretrained_model_name_or_path
    return folder is None or (Path(folder) / RECORD).is_file()


def _config(options: ParticleOptions) -> ParticleConfig:
    return ParticleConfig(**{n: getattr(options, n) for n in ParticleConfig.model_fields})


def _own(options: ParticleOptions) -> Setup:
    """A teacher of the user's and the prompts given."""
    source, folder = options.source, options.pretrained_model_name_or_path
    facts = teacher_facts(source)
    if facts.needs_images or facts.conditioning == "none":
        needs = "an image too" if facts.needs_images else "no prompt"
        raise ValueError(
            "pretrained_model_name_or_path: expected a model that a prompt is enough for, got "
            f"{folder!r}, which reads {needs}."
        )
    if not options.prompt:
        raise ValueError("prompt: expected one or more beside a teacher of yours, got none.")
    labels = facts.conditioning == "label"
    if labels and not all(text.isdecimal() for text in options.prompt):
        raise ValueError(f"prompt: expected class labels of {folder!r}, got {[*options.prompt]}.")
    prompts = [int(text) if labels else text for text in options.prompt]
    return Setup(source, prompts, options.gradient, _config(options))


def _digits(options: ParticleOptions, out: Path) -> Setup:
    """The digits' teacher, made in OUT/teacher where none is named, with what suits it."""
    torch.set_num_threads(1)  # a second thread saves nothing on networks this small
    scenes, given = options.parameters == "voxels", options.model_fields_set
    if "num_particles" in given and not scenes and not options.prompt:
        raise ValueError(
            "num_particles: expected it beside --prompt (without, the digits' teacher gets one for "
            f"each held-out prompt), got {options.num_particles}. Leave it out."
        )
    data = load_digit_splits()
    if options.pretrained_model_name_or_path is not None:
        source = options.source
    else:
        made = load_or_train_teacher(TeacherConfig(), data.train, out / "teacher")
        source = ModelSource(str(made.folder))
    suited = {n: v for n, v in (DIGIT_SCENES if scenes else DIGITS).items() if n not in given}
    config = _config(options).model_copy(update=suited)
    gradient = options.gradient
    if "max_t" not in gradient.model_fields_set:
        start, first, last, end = MAX_T
        steps = config.max_steps
        max_t = (round(start * steps), first, last, round(end * steps))
        gradient = gradient.model_copy(update={"max_t": max_t})
    if options.prompt and not scenes:
        return Setup(source, options.prompt, gradient, config)
    classifier = train_classifier(data.train)
    if scenes:
        prompts = options.prompt or [PROMPTS[k] for k in ROUND_DIGITS]
        return Setup(source, prompts, gradient, config, classifier=classifier)
    judge = Judge(data, classifier)
    one = config.model_copy(update={"num_particles": 1})
    return Setup(source, judge.prompts, gradient, one, judge)


def _references(setup: Setup, steps: int, device: torch.device) -> list[Shown]:
    """Real images where there is a judge, and the teacher's own samples, plain and guided."""
    if setup.config.parameters == "voxels":
        return []
    rows: list[Shown] = []
    if setup.judge is not None:
        rows.append(_judged(setup.judge.floor((0,)), {}))
    family = load_family(setup.source)
    bank = RoleBank(family, {"teacher": Role()}, Tuning())
    family.pipeline.to(device)
    size = (setup.config.resolution, setup.config.resolution)
    times = uniform_grid(steps, family.shift_at(*size))
    for g in (1.0, GUIDED) if family.has_null else (1.0,):
        each = setup.each
        noise = Ctx(setup.config.seed, phase="teacher", device=device).randn(
            (len(each), *family.sample_shape(*size))
        )
        parts = []
        for start in range(0, len(each), 64):
            some = family.encode(each[start : start + 64]).to(device)
            null = family.null(some.bsz).to(device)
            rest = (noise[start : start + 64], some, null, g, times)
            parts.append(bank.images(ode_solve(bank["teacher"], *rest)).cpu())
        name = "teacher" + ("" if g == 1.0 else f", guidance {g:g}")
        rows.append(_images_row(setup, "teacher", name, torch.cat(parts), {}))
    return rows


def _rows(setup: Setup, name: str, made: Made) -> list[Shown]:
    """A line of the report; of voxels one a scene, as the teacher sees it and in more pixels."""
    cost = {"ms / step": f"{1000 * made.seconds / made.num_steps:.0f}"}
    if made.images is not None:
        return [_images_row(setup, "student", name, made.images.cpu(), cost)]
    side, rows = made.teacher.image_size(setup.config.resolution)[0], []
    for prompt, scene in zip(setup.each, made.scenes, strict=True):
        small, large = (turntable(scene.cpu(), VIEWS, size) for size in (side, LARGE * side))
        said = {"prompt": str(prompt)}
        if setup.classifier is not None and prompt in PROMPTS:
            label = torch.full((VIEWS,), PROMPTS.index(prompt))
            share = setup.classifier.accuracy(small.mean(1, keepdim=True), label)
            said["views read as it"] = f"{share:.2f}"
        as_large = small.repeat_interleave(LARGE, 2).repeat_interleave(LARGE, 3)
        rows.append(Shown("student", name, [[*as_large], [*large]], {**said, **cost}))
    return rows


def _images_row(setup: Setup, group: str, name: str, images: Tensor, cost: dict[str, str]) -> Shown:
    more = {**figures(images, setup.each), **cost}
    if setup.judge is None:
        return Shown(group, name, grid(images), more)
    grey = images.mean(1, keepdim=True)
    made = Samples(grey.clamp(-1, 1), 0.0, 0.0)
    return _judged(setup.judge.score(name, group, 0, [made]), more)


def _judged(row: Row, more: dict[str, str]) -> Shown:
    pictures = [*row.previews]
    lines = [pictures[i::PREVIEWS_PER_CLASS] for i in range(PREVIEWS_PER_CLASS)]
    said = {
        "Fréchet ↓": row.frechet.text(),
        "recall ↑": row.recall.text(".3f"),
        "class accuracy": f"{row.accuracy.mean:.3f}",
    }
    return Shown(row.group, row.label, lines, {**said, **more})


def _facts(setup: Setup, options: ParticleOptions) -> list[tuple[str, str]]:
    config = setup.config
    return [
        ("teacher", str(setup.source)),
        ("optimised", f"{len(setup.each)} x {config.parameters}"),
        ("updates", f"{counted(config.max_steps, 'step')} of Adam at {config.learning_rate:g}"),
        ("fake of vsd", f"LoRA, rank {config.fake.rank}, at {config.fake.learning_rate:g}"),
        ("teacher's own samples", counted(options.teacher_steps, "step")),
        ("seed", str(options.seed)),
    ]


def _note(setup: Setup) -> str:
    text = (
        "Saturated: values that leave the range of images by more than 5 %, before clamping. "
        "Spread: standard deviation of a pixel among the images of a prompt. "
    )
    if setup.config.parameters == "voxels":
        return (
            "A grid of density and colour, optimised from cameras all around it; below what the "
            "teacher saw, the same in more pixels. Views read as it: share of them that a digit "
            "classifier takes for the prompt's digit."
        )
    if setup.judge is None:
        return text
    return text + (
        "Fréchet distance and recall: against held-out real digits of the same prompts, in "
        "features of a small network trained on others. The first row: real training images."
    )
