"""What can be wrong with a run, said before a weight is loaded and with nothing lost."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
from torch import Tensor

from stepdistill.config.rewards import RewardConfig
from stepdistill.config.run import TrainConfig
from stepdistill.config.tuning import Tuning
from stepdistill.core.causal import chunk_of
from stepdistill.core.method import Method, MethodConfig, Scorer
from stepdistill.core.path import FlowPath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.data.rows import RowStream
from stepdistill.data.source import Source
from stepdistill.data.stream import provided_fields, sample_item
from stepdistill.families.beside import check_images, images_beside
from stepdistill.families.family import Family
from stepdistill.families.registry import TeacherFacts
from stepdistill.loading.source import ModelSource
from stepdistill.rewards import check_scorers
from stepdistill.roles.student_net import check_student_config
from stepdistill.training.rewards import check_kinds, scorers_of
from stepdistill.training.start import student_base_of


def method_fits(
    cls: type[Method[Any]],
    config: MethodConfig,
    teacher: TeacherFacts,
    dataset: Any,
    scorers: Mapping[str, Scorer],
    best_metric: str | None = None,
    gan_dataset: Any = None,
    rewards: Sequence[RewardConfig] = (),
    resolution: int | None = None,
) -> None:
    """Errors: ValueError where the datasets lack a field the method's losses or the rewards read,
    where a scorer they call can't be had (see `rewards.check_scorers`), or where no run of the
    method measures best_metric. Warns of a gan_dataset that no loss reads."""
    method = _quietly(cls, config, teacher)
    if cls.needs_image and not teacher.family.edits_image():
        raise ValueError(
            f"{cls.name}: expected a model that reads an image beside the prompt, as "
            f"StableDiffusionUpscalePipeline, got {teacher.pipeline}. Name one."
        )
    _states_fit(method, dataset)
    specs = scorers_of(method, rewards)
    needs = method.needs | check_kinds(method, rewards, scorers)
    sound_fits(method, resolution, teacher, (dataset, gan_dataset), scorers, rewards)
    spec, as_flow = method.sampler(), method.roles()["student"].as_flow
    if as_flow and best_metric == "trajectory_rmse":
        raise ValueError(
            f"best_metric: expected a metric that {cls.name} measures with this config, got "
            "trajectory_rmse: its student leaves the teacher's trajectory. Name teacher_rmse."
        )
    if spec.trained_times is not None:  # else any step count can be exported
        teacher.family.refuse_one_step(teacher.pipeline, as_flow, spec.num_steps)
    _times_are_taken(spec, teacher)
    if not teacher.has_null:
        _without_guidance(cls, config)
        if method.reads_null:
            raise ValueError(
                f"{cls.name}: expected no option that reads a null condition (the model has none), "
                f"got {method.reads_null}. Leave it out."
            )
    always = frozenset({"cond"} if teacher.conditioning == "none" else ())

    def fields(data: Any) -> frozenset[str]:
        has = provided_fields(data)
        if not teacher.family.reads:
            return always | has
        item, family = sample_item(data), teacher.family
        check_images(family, images_beside(family, item), "train_dataset", batched=False)
        first_frame_alone = family.from_first_frame() and "x0" not in item
        return always | (has - {"x0"} if first_frame_alone else has)

    has = fields(dataset) | {"null"}
    if gan_dataset is None or "real" not in method.needs:
        has |= {"real"} if "x0" in has else set()
        if gan_dataset is not None:
            warnings.warn(
                f"data.gan has no effect: no loss of {cls.name} reads real samples with this "
                "config. Set --method_config.gan.weight_g, or leave it out.",
                stacklevel=5,
            )
    elif {"cond", "x0"} <= (present := fields(gan_dataset)):
        has |= {"real"}
    else:
        raise ValueError(
            f"data.gan: expected real samples (image or x0) with their prompts or labels, got "
            f"{sorted(present)} from {type(gan_dataset).__name__}. Name a source of images: "
            "--data.gan.train_data_dir DIR."
        )
    if not needs <= has:
        hint = {
            "rejected": "Give pairs with a winner: --data.preferences_file FILE, or --data."
            "dataset_name with Pick-a-Pic's columns.",
            "noise": "Make pairs first: stepdistill pairs --config ...",
            "start": "Make the high-noise student's states first: stepdistill pairs HIGH_EXPORT "
            "--prompts_file FILE --pairs_dir DIR, then --data.pairs_dir DIR.",
            "x0": "Train on images: --data.train_data_dir DIR.",
            "easier": "Have two low resolutions of the images made: --data.degradation.factor 4 or "
            "more (2 has no easier one, and needs none with --method_config.target images).",
            "real": "Give the GAN images: --data.gan.train_data_dir DIR, or --data.train_data_dir.",
            "prompts": "A loss that reads text needs items with a prompt.",
        }
        raise ValueError(
            f"{cls.name}: expected batch fields {sorted(needs)}, got {sorted(has)} from "
            f"{type(dataset).__name__}. "
            + next((text for name, text in hint.items() if name in needs - has), "")
        )
    check_scorers(specs, scorers)


def frames_fit(dataset: Any, teacher: TeacherFacts, resolution: int | None) -> None:
    """Errors: ValueError for first frames of another size than the videos; the pipeline would
    stretch them. Sources of ours resize and crop theirs."""
    if teacher.frame_size is None or isinstance(dataset, Source | RowStream):
        return
    image = sample_item(dataset).get("image")
    size = teacher.frame_size if resolution is None else (resolution, resolution)
    if isinstance(image, Tensor) and tuple(image.shape[-2:]) != size:
        got = " x ".join(map(str, image.shape[-2:]))
        raise ValueError(
            f"train_dataset: expected first frames of {size[0]} x {size[1]} px (height, width), "
            f"the size of the model's videos, got {got}. Resize and crop them, or set --resolution."
        )


def _states_fit(method: Method[Any], dataset: Any) -> None:
    """Errors: ValueError where a low-noise expert's states are not of the time that it starts at,
    or states are given to what starts at noise."""
    until = getattr(getattr(dataset, "settings", None), "until", 0.0)
    first = method.sampler().times[0] if method.setting.owned[1] < 1.0 else 0.0
    if until and abs(until - first) > 1e-6:
        wanted = f"states at {first:g}, the low-noise expert's first time" if first else "pairs"
        raise ValueError(
            f"data.pairs_dir: expected {wanted}, got states at {until:g}, where another student's "
            "high-noise expert ended. Make states with the export of a run of the same steps and "
            "shift (stepdistill pairs), or train --expert low."
        )


def _times_are_taken(spec: SamplerSpec, teacher: TeacherFacts) -> None:
    """Warns of a flow sampler whose first time neither a scheduler's file nor the call can say."""
    if spec.keeps_scheduler:
        return
    late = isinstance(teacher.setting.path, FlowPath) and spec.times[0] < 1.0
    stock = getattr(diffusers, teacher.pipeline, None) if late else None
    if stock is not None and "sigmas" not in inspect.signature(stock.__call__).parameters:
        warnings.warn(
            f"the student begins at time {spec.times[0]:g}, which {teacher.pipeline}'s call cannot "
            "be told, so its export will be refused. Begin at 1.",
            stacklevel=5,
        )


def sound_fits(
    method: Method[Any],
    resolution: int | None,
    teacher: TeacherFacts,
    datasets: Sequence[Any],
    scorers: Mapping[str, Scorer],
    rewards: Sequence[RewardConfig] = (),
) -> None:
    """Errors: ValueError where a teacher that makes sound meets images, their size, or what judges
    them. Scorers that are given are called with waves (B, channels, samples)."""
    if teacher.family.output != "audios":
        return
    where, judges = f"{teacher.pipeline}, which makes sound", scorers_of(method, rewards)
    images = [d for d in datasets if d is not None and {"image", "content"} & sample_item(d).keys()]
    if images:
        raise ValueError(
            f"data: expected prompts, pairs or latents (x0) beside {where}, got images from "
            f"{type(images[0]).__name__}. Take a method that needs none: --data.prompts_file FILE."
        )
    if resolution is not None:
        raise ValueError(
            f"resolution: expected none beside {where} of one length, got {resolution}. Leave it "
            "out."
        )
    if seeing := sorted(judges.keys() - scorers.keys()):
        raise ValueError(
            f"{method.name}: expected no judge of images beside {where}, got {seeing}. Turn off "
            "what asks for it, or give a callable of your own: scorers={NAME: CALLABLE}."
        )


def buckets_fit(dataset: Any, gan_dataset: Any, teacher: TeacherFacts) -> None:
    """Errors: ValueError where a dataset in buckets meets a model of one size, or a GAN's own."""
    if not getattr(dataset, "by_ratio", False):
        return
    if teacher.family.one_size:
        raise ValueError(
            f"data.buckets: expected a model of several image sizes, got {teacher.family.name}, "
            "which has one. Leave it out: images are cropped to the model's size."
        )
    if gan_dataset is not None:
        raise ValueError(
            "data.buckets: expected no gan_dataset (its images have one size, so the discriminator "
            "would learn sizes), got one. Leave one of them out."
        )


def roles_fit(
    cls: type[Method[Any]], config: MethodConfig, args: TrainConfig, teacher: TeacherFacts
) -> None:
    """Errors: ValueError for roles that the model, or an adapter on it, cannot have."""
    method, family = _quietly(cls, config, teacher), teacher.family
    student = method.roles()["student"]
    if "w" in student.extra_inputs and not teacher.told_guidance:
        raise ValueError(
            f"{method.name}: expected a model that can be told its guidance, got one of "
            f"{family.name} without that input. Set --method_config.embed_guidance false."
        )
    if student.extra_inputs and args.tuning.layout("student") == "lora":
        raise ValueError(
            f"tuning.student: expected full of a student with extra inputs {student.extra_inputs} "
            "(an adapter has no place for new weights), got lora. Set --tuning.student full, or "
            "turn off what asks for them."
        )
    if chunk_of(student.extra_inputs) and (not family.causal or teacher.num_nets > 1):
        raise ValueError(
            f"{method.name}: expected a text-to-video model of one denoiser (Wan 2.1) for a causal "
            f"student, got {teacher.pipeline}. Set --method_config.chunk 0."
        )
    if "s" in student.extra_inputs and not family.supports_s:
        raise ValueError(
            f"{method.name}: expected a model that can be told where a jump ends, got one of "
            f"{family.name}. Turn off what asks for it (--method_config.end_input false, or .r)."
        )
    judged = any(role.source == "head" and not role.reads for role in method.roles().values())
    reads = "a discriminator's heads" if judged else "skip_layers" if method.skip_layers else ""
    if reads and teacher.num_nets > 1:
        raise ValueError(
            f"{method.name}: expected nothing that names blocks of a model of two denoisers (each "
            f"row of a batch runs one of them), got {reads}. Train one expert a run (--expert high "
            "or low), or turn that off (--method_config.gan.weight_g 0, .skip_layers [])."
        )
    _mixing_fits(method, args)
    quantized, forward = args.tuning.base_quantization, method.forward_mode
    for what, is_so in (
        ("--compile", args.compile),
        (f"--tuning.base_quantization {quantized}", quantized != "none"),
        (f"a model of {family.name}", not family.forward_mode),
    ):
        if forward and is_so:
            raise ValueError(
                f"{method.name}: expected networks that can be differentiated forward (jvp), got "
                f"{what}. Set --method_config.estimator backward."
            )


def run_fits(
    cls: type[Method[Any]], config: MethodConfig, args: TrainConfig, teacher: TeacherFacts
) -> None:
    """Errors: ValueError for a run that is too short for the method's stages, or with nothing to
    learn for its student."""
    method = _quietly(cls, config, teacher)
    method.check_length(args.max_train_steps)
    method.check_student(args.tuning.student_changes is None and not args.init_student_from)


def _mixing_fits(method: Method[Any], args: TrainConfig) -> None:
    """Errors: ValueError for roles that the method mixes, or adapters it shares, stored so that
    they can't be."""
    tuning = args.tuning
    for pair in method.mixed_roles:
        stored = [_stored(tuning, role) for role in pair]
        apart = {
            "tuning.student_config": tuning.student_changes is not None,
            f"init_student_from {args.init_student_from}": student_base_of(args) is not None,
            " and ".join(stored): stored[0] != stored[1],
        }
        if any(apart.values()):
            raise ValueError(
                f"{method.name}: expected {' and '.join(pair)} stored alike, on one base, as their "
                f"weights are mixed, got {next(k for k, v in apart.items() if v)}. Give "
                "--tuning.student and --tuning.fake one layout, rank and alpha, or set "
                "--method_config.fake_toward_student 0."
            )
    if method.carried_role and tuning.layout(method.carried_role) != "lora":
        raise ValueError(
            f"tuning.{method.carried_role}: expected lora (the teacher carries a share of that "
            f"adapter), got full. Set --tuning.{method.carried_role} lora, or "
            "--method_config.approach.share 0."
        )
    if method.carried_role and args.compile:
        raise ValueError(
            f"{method.name}: expected no --compile beside approach (the share changes at every "
            "update, and each would be compiled), got both. Leave one of them out."
        )


def _stored(tuning: Tuning, role: str) -> str:
    if tuning.layout(role) == "full":
        return "full"
    rank, alpha = tuning.lora(role)
    return f"lora of rank {rank}, alpha {alpha:g}"


def _quietly(cls: type[Method[Any]], config: MethodConfig, teacher: TeacherFacts) -> Method[Any]:
    """The method; the trainer builds it again and warns then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(config, teacher.setting)


def student_fits(
    cls: type[Method[Any]],
    tuning: Tuning,
    teacher: ModelSource | Family,
) -> None:
    """Errors: ValueError for a student architecture that method or model cannot have."""
    changes = tuning.student_changes
    if changes is None:
        return
    if not cls.any_student:
        raise ValueError(
            f"{cls.name}: expected no tuning.student_config (its student is the teacher with "
            "something added), got one. Leave it out."
        )
    check_student_config(changes, teacher)


def _without_guidance(cls: type[Method[Any]], config: MethodConfig) -> None:
    """Errors: ValueError where the method guides its teacher, for a model without a null."""
    for key in cls.guidance_options:
        value = getattr(config, key)
        ends = value if isinstance(value, tuple) else (value,)
        if not isinstance(value, bool) and any(end not in (None, 1.0) for end in ends):
            raise ValueError(
                f"{cls.name}: expected no guidance (the model has no null condition), got {key} "
                f"{value}. Set it to {[1, 1] if isinstance(value, tuple) else 1}."
            )
