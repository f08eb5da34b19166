"""What tunes the decoder of a few-step student: the options of `stepdistill decoder`."""

from __future__ import annotations

from pydantic import Field

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Export, Here
from stepdistill.core.options import Count, Positive, Seed
from stepdistill.data.degradation import Degradation


class DecoderOptions(CommandOptions):
    """Options by the names of the command's flags."""

    student: Export
    """A pipeline export of a model that reads an image: its own few steps make what is decoded."""
    train_data_dir: Here
    """Folder of images."""
    output_dir: str = "decoder"
    """The export with the tuned decoder; what a call that is cut off leaves lies beside it."""
    degradation: Degradation = Degradation()
    """Low-resolution images, as in training; none means those that the student was trained with."""
    resolution: int | None = Field(default=None, ge=1)
    """Height and width in px; none means the model's own."""
    max_train_steps: Count = 2000
    """Updates."""
    train_batch_size: Count = 4
    """Images of an update."""
    learning_rate: Positive = 1e-5
    """Of Adam, the decoder's."""
    discriminator_learning_rate: Positive = 1e-4
    """Likewise the discriminator's."""
    l1: float = Field(default=1.0, ge=0)
    """Weight of the mean absolute error."""
    perceptual: float = Field(default=1.0, ge=0)
    """Weight of the perceptual distance, where there is a network."""
    network: str | None = None
    """lpips, or the folder or Hub id of a vision model (made by `stepdistill features`, DINOv2)."""
    gan: float = Field(default=0.1, ge=0)
    """Weight of the hinge loss under a PatchGAN; 0 has none."""
    gan_start: int = Field(default=500, ge=0)
    """Updates before it."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Of the decoder that is written."""
    seed: Seed = 0
    """Of data, noise and discriminator."""
