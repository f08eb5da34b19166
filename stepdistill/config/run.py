"""TrainConfig and RunConfig: every option of a run, typed, with its help text beside it.

Names follow Diffusers and Transformers where one exists. `RunConfig` is what a launcher reads:
config files merged left to right, then flags. Its saved form alone repeats the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)
from pydantic_settings import CliSuppress
from typing_extensions import Self

from stepdistill.config.flags import AT_COMMAS
from stepdistill.config.metrics import BEST_METRICS, METRICS
from stepdistill.config.places import Here
from stepdistill.config.rewards import RewardConfig, check_rewards
from stepdistill.config.teacher import TeacherOptions
from stepdistill.config.tuning import Tuning
from stepdistill.config.watchdog import WatchdogConfig
from stepdistill.core.options import Options, Positive, Seed
from stepdistill.data.degradation import Degradation

if TYPE_CHECKING:
    import torch

Scheduler = Literal["constant", "constant_with_warmup", "linear", "cosine"]


_DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of mixed_precision


_OF_THE_TEACHER = ("teacher_lora", "single_file_config")


class TrainConfig(Options):
    """How to train, whatever the method and the model."""

    # ------------------------------------------------------------------ run
    output_dir: str = "runs/default"
    """Folder for checkpoints, logs and validation grids; one run each."""
    seed: Seed = 0
    """Seed of every random number in the run."""
    max_train_steps: int = Field(default=1000, ge=1)
    """Student updates; every method counts these."""
    max_train_seconds: float | None = Field(default=None, gt=0)
    """Wall-clock budget in seconds: stop at the first step boundary after it, whatever is left."""
    train_batch_size: int = Field(default=1, ge=1)
    """Samples per process and micro-batch."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per optimiser update, each phase on its own."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast dtype of network calls; trained weights and losses stay float32."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. auto does
    so for quantised denoisers, and those of 500 M parameters and more; of a VAE whose images are
    judged, from 20 M on."""
    compile: bool = False
    """Compile the denoisers' repeated blocks with torch.compile: minutes at the start, faster
    steps after. Once for each role, with and without gradients."""
    compile_backend: str = "inductor"
    """Backend of torch.compile; inductor needs Triton on CUDA, a C++ compiler on CPU."""
    offload_encoders: bool = False
    """Keep text encoders and autoencoder on the CPU: prompts and images are encoded there, once. An
    autoencoder whose images are judged stays on the device; a small decoder stands in for it."""
    tuning: Tuning = Tuning()
    """How trained roles store their weights (lora or full, rank, alpha)."""

    init_student_from: str | None = None
    """Where the student starts: a run (or one of its checkpoints) of the same tuning, or a pipeline
    of the teacher's architecture (folder or Hub id, such as SD-Turbo); a LoRA student then sits on
    that pipeline's frozen network, a second one in memory."""
    decoder: str | None = None
    """Folder or Hub id of a small decoder (AutoencoderTiny, such as TAESD) for losses that judge
    images; none means the pipeline's VAE, whose gradient takes far more memory."""
    rewards: list[RewardConfig] = Field(default=[])
    """Judges of the student's samples, whose loss is added to that of any method, such as
    {"kind": "clip", "weight": 0.1, "tau": 0.35}."""
    reward_crop: int | None = Field(default=None, ge=1)
    """Side, in latents (of 8 px in most models), of a square drawn anew each time that alone is
    decoded for rewards; none decodes all."""

    # ------------------------------------------------------------ optimiser
    learning_rate: float = Field(default=1e-5, gt=0)
    """Learning rate of the student and of every role without one of its own."""
    role_learning_rates: dict[str, Positive] = Field(default={})
    """Learning rate by role, e.g. {"fake": 5e-6}."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps its moments in 8 bits and needs bitsandbytes; on CPU and CUDA."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """First Adam beta."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Second Adam beta."""
    adam_weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Adam epsilon."""
    lr_scheduler: Scheduler = "constant_with_warmup"
    """Learning-rate law over student updates, the same for every role."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Student updates of linear warm-up."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient norm each role is clipped to."""
    role_max_grad_norm: dict[str, Positive] = Field(default={})
    """Clipping norm by role."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an averaged student for validation and export; 0 keeps none."""

    # ----------------------------------------------------------------- data
    resolution: int | None = Field(default=None, ge=1)
    """Height and width in px; none means the model's own size. Images of files are resized and
    cropped to it, or to the sizes of --data.buckets about it."""
    dataloader_num_workers: int = Field(default=0, ge=0)
    """Worker processes that load data."""
    cache_latents: bool = True
    """Keep VAE latents of dataset images in memory after the first use."""
    latents_cache_mb: int = Field(default=2048, ge=0)
    """MiB of latents that a process keeps in memory, the last used; 0 encodes every time."""
    max_cached_latents: int | None = Field(default=None, ge=0)
    """Latents kept at most, where their number is to be limited besides; 0 encodes every time."""
    max_cached_prompts: int = Field(default=4096, ge=0)
    """Prompt embeddings kept in memory; 0 encodes every time."""
    cache_dir: str | None = None
    """Folder of encoded prompts and latents, filled before training where something is missing (or
    by `stepdistill cache`), and of the indexes of tar shards."""
    cache_shard_mb: int = Field(default=256, ge=1)
    """MiB of a file in cache_dir; a kill while it is filled costs the one in work."""
    max_corrupt_fraction: float = Field(default=0.05, ge=0, le=1)
    """Largest fraction of samples that may be unreadable (and are replaced by others), from a
    thousand draws on; above it the run stops. Counted from the start of the process."""

    # ---------------------------------------------------- logs, checkpoints
    logging_steps: int = Field(default=10, ge=1)
    """Student updates between log lines (means over the window)."""
    report_to: Annotated[list[str], AT_COMMAS] = Field(default=[])
    """Accelerate trackers besides the JSONL log: tensorboard, wandb, ..."""
    disable_progress_bar: bool = False
    """Print no tqdm bar."""
    checkpointing_steps: int = Field(default=500, ge=0)
    """Student updates between checkpoints; 0 saves only the last."""
    checkpoints_total_limit: int | None = Field(default=None, ge=1)
    """Checkpoints to keep; older ones go after a newer one is whole."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or "latest" (starts afresh where there is none yet)."""
    data_changed: Literal["refuse", "ok"] = "refuse"
    """Whether a resumed run may go on with other data than it was begun with; where ok, run.json
    and the model card say so."""
    validation_prompts: list[str] = Field(default=[])
    """Prompts (or class labels) of the validation grid; where none, a few of the run's own data."""
    validation_steps: int | None = Field(default=None, ge=0)
    """Student updates between validation grids; 0 makes none. Where none is said, as many as cost
    under 2 % of the run, the teacher's samples included (monitoring/own_validation.py)."""
    num_validation_images: int = Field(default=4, ge=1)
    """Images per validation prompt, always from the same seeds."""
    validation_teacher_steps: int = Field(default=20, ge=0)
    """Steps of the teacher's samples that validation compares with, made once; 0 makes none."""
    validation_guidance: float | None = Field(default=None, ge=0)
    """Guidance of those samples; none means the method's own (of pairs it is not known: set it)."""
    best_metric: str | None = None
    """Validation metric by which the best checkpoint is saved and kept whatever the limit, and
    named in best.json: the lowest frechet_diagonal, teacher_rmse, trajectory_rmse or x0_mean_drift,
    or the highest diversity or diversity_ratio."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """What to do when the run goes wrong, check by check: warn, back_off or stop."""
    push_to_hub: bool = False
    """Upload the export when training ends."""
    hub_model_id: str | None = None
    """Repository to push to; private unless it exists already."""

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of the frozen denoiser's weights: tuning.base_dtype, or what autocast uses."""
        import torch  # which --help does without

        asked = self.tuning.base_dtype
        dtype: torch.dtype = getattr(
            torch, _DTYPES[self.mixed_precision] if asked == "auto" else asked
        )
        return dtype

    @classmethod
    def recorded(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The options in a run's record, without those that say which teacher in earlier ones."""
        return {name: value for name, value in saved.items() if name not in _OF_THE_TEACHER}

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        check_rewards(self.rewards)
        if self.reward_crop is not None and not self.rewards:
            raise ValueError("reward_crop: expected rewards beside it, got none")
        if self.validation_steps and not self.validation_prompts:
            raise ValueError(
                "validation_steps: expected validation_prompts beside it, got none. "
                "Give --validation_prompts, or set validation_steps to 0"
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub: expected hub_model_id (user/name) beside it, got none")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _checked_best(cls, data: Any, handler: ModelWrapValidatorHandler[TrainConfig]) -> Any:
        """Take the records of earlier versions, for export, with their best_mode and whatever
        best_metric they had; who trains by one checks it (`check_best_metric`)."""
        earlier = isinstance(data, dict) and "best_mode" in data
        if earlier:
            data = {name: value for name, value in data.items() if name != "best_mode"}
        made = handler(data)
        if not earlier:
            made.check_best_metric()
        elif made.best_metric is not None:
            warnings.warn(
                "best_mode has no effect: a best_metric has a direction of its own. Leave it out.",
                stacklevel=3,
            )
        return made

    def check_best_metric(self) -> None:
        """Errors: ValueError where best_metric is none to go by, or these options measure none."""
        name = self.best_metric
        if name is None:
            return
        expected = f"best_metric: expected one of {', '.join(BEST_METRICS)}, got {name!r}"
        if name not in METRICS:
            raise ValueError(expected)
        metric = METRICS[name]
        if metric.mode is None:
            raise ValueError(f"{expected}, which has no best value: {metric.why}. Name another")
        if not self.validation_steps:
            raise ValueError("best_metric: expected validation_steps beside it, got none")
        if metric.teacher and not self.validation_teacher_steps:
            raise ValueError(
                f"best_metric: expected validation_teacher_steps beside {name}, which compares "
                "with the teacher's samples, got 0. Set it to 20, or name diversity"
            )
        if metric.several and self.num_validation_images < 2:
            raise ValueError(
                f"best_metric: expected num_validation_images 2 or more beside {name}, which "
                "compares the images of a prompt, got 1. Raise it, or name another metric"
            )


_SOURCES = (
    *("prompts_file", "train_data_dir", "pairs_dir", "tar_shards", "dataset_name"),
    "preferences_file",
)


class SourceConfig(Options):
    """One source of data, and how it is read."""

    where: ClassVar[str] = "data"

    prompts_file: Here | None = None
    """Text file, one prompt a line (for class-conditional models: one label a line)."""
    train_data_dir: Here | None = None
    """Image folder with metadata.jsonl or metadata.csv (file_name, text), a .txt caption beside
    each image, or one sub-folder per class label."""
    pairs_dir: Here | None = None
    """Noise-image pairs made by `stepdistill pairs`."""
    preferences_file: Here | None = None
    """JSON lines of text, chosen and rejected: a prompt, and the names of two images of it (beside
    the file, or in folders below it), of which the first is the better. A --data.dataset_name has
    Pick-a-Pic's columns (jpg_0, jpg_1, label_0) for that."""
    tar_shards: str | None = None
    """webdataset tar files: a folder, a glob, or a range such as "shards/{0000..0099}.tar"."""
    dataset_name: str | None = None
    """Dataset of the `datasets` library: Hub id, folder of files, or folder of save_to_disk."""

    dataset_config_name: str | None = None
    """Configuration of the dataset, where it has several."""
    dataset_revision: str | None = None
    """Hub revision of the dataset."""
    dataset_split: str = "train"
    """Split of the dataset."""
    image_column: str = "image"
    """Column of images in the dataset; where it is not there, prompts alone are read."""
    caption_column: str = "text"
    """Column of captions (or class labels) in the dataset, the folder's metadata, or a tar's .json;
    where it holds lists of captions, one is drawn each time."""
    conditioning_column: str | None = None
    """Column of the dataset, or of the folder's metadata, of images to edit, to refer to or to be
    controlled by, for models that read one beside the prompt; conditioning_file_name and other
    usual names are found. A list in it means several of them."""
    mask_column: str | None = None
    """Likewise of masks, white where the image is repainted; mask_file_name is found."""
    streaming: bool = False
    """Read the dataset as a stream and download nothing first. Every worker of every process reads
    all of it; resuming reads up to its place."""
    shuffle_buffer: int = Field(default=4096, ge=1)
    """Samples that tar shards (by number) and streams (held in memory) are shuffled within."""

    @property
    def source(self) -> str | None:
        """The option that names the source, or None."""
        return next((name for name in _SOURCES if getattr(self, name) is not None), None)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{self.where}: expected one source, got {given}. Keep one of them.")
        if self.streaming and self.dataset_name is None:
            raise ValueError(f"{self.where}: expected dataset_name beside streaming, got none.")
        return self


class GANDataConfig(SourceConfig):
    """Real samples for a discriminator, where they are not the run's own data."""

    where: ClassVar[str] = "data.gan"

    prompts_file: CliSuppress[str | None] = None
    """No source of images."""
    preferences_file: CliSuppress[str | None] = None
    """Likewise: half of its images are rejected ones."""

    @model_validator(mode="after")
    def _of_images(self) -> Self:
        expected = (
            "data.gan: expected a source of images (--data.gan.train_data_dir, .tar_shards, "
            ".dataset_name or .pairs_dir), got "
        )
        if self.prompts_file is not None:
            raise ValueError(
                f"{expected}prompts_file {self.prompts_file!r}. Prompts of the generator are "
                "--data.prompts_file"
            )
        if self.preferences_file is not None:
            raise ValueError(f"{expected}preferences_file {self.preferences_file!r}")
        given = self.model_dump(exclude_defaults=True)
        if given and self.source is None:
            raise ValueError(f"{expected}none beside {sorted(given)}")
        return self


class DataConfig(SourceConfig):
    """Where training data comes from; a launcher takes exactly one source."""

    gan: GANDataConfig = GANDataConfig()
    """Real images with their own captions for the GAN; none means the run's own data."""
    buckets: bool = False
    """Resize and crop each image to the nearest of several sizes about the model's area, from 1:2
    to 2:1, in place of one; every batch is of one size. Reads each picture's size at the start."""
    degradation: Degradation = Degradation()
    """Low-resolution images made of the data's, for models that enlarge one."""

    @model_validator(mode="after")
    def _degraded_are_images(self) -> Self:
        if self.degradation.factor and self.source in (
            "prompts_file",
            "pairs_dir",
            "preferences_file",
        ):
            raise ValueError(
                "data.degradation.factor: expected images (--data.train_data_dir, .tar_shards or "
                f".dataset_name), got {self.source}. Name such a source"
            )
        return self

    @model_validator(mode="after")
    def _buckets_of_images(self) -> Self:
        if self.buckets and (self.source in (None, "prompts_file", "pairs_dir") or self.streaming):
            got = f"{self.dataset_name!r} streamed" if self.streaming else self.source
            raise ValueError(
                "data.buckets: expected images by number (--data.train_data_dir, .tar_shards, or "
                f".dataset_name without .streaming), got {got}. Leave it out, or name such a source"
            )
        if self.buckets and self.gan.source is not None:
            raise ValueError(
                "data.buckets: expected no data.gan (its images have one size, so the "
                f"discriminator would learn sizes), got {self.gan.source}. Leave one of them out"
            )
        return self


class RunConfig(TrainConfig, TeacherOptions):
    """A whole run: what to distil, with which method, on which data."""

    first: ClassVar[tuple[str, ...]] = (
        *("recipe", "pretrained_model_name_or_path", "method"),
        *("output_dir", "resume_from_checkpoint"),
        *("data.train_data_dir", "data.prompts_file", "data.dataset_name", "data.pairs_dir"),
        *("max_train_steps", "max_train_seconds", "train_batch_size"),
        *("gradient_accumulation_steps", "learning_rate", "resolution", "mixed_precision"),
        *("tuning.student", "tuning.rank", "validation_prompts", "validation_steps"),
    )  # what --help shows

    recipe: str | None = None
    """Recipe that everything else is laid over: method, model and settings in one name;
    `stepdistill recipes` lists them."""
    method: str
    """Distillation method; `stepdistill list` shows them."""
    method_config: dict[str, Any] = Field(default={})
    """Options of the method; its flags are --method_config.NAME."""
    data: DataConfig = DataConfig()
    """Training data."""
    export_dir: str | None = None
    """Where to write the distilled pipeline; none means OUTPUT_DIR/pipeline."""

    _reasons: list[str] = PrivateAttr(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        """What the settings come from, as a run says it at its start."""
        return self._reasons or ["the method's defaults"]

    def train_config(self) -> TrainConfig:
        """The part that says how to train."""
        return TrainConfig(**{name: getattr(self, name) for name in TrainConfig.model_fields})
