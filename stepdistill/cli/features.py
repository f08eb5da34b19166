"""Make a small feature network of your own images, for `--features` of evaluate and compare.

    stepdistill features train --train_data_dir pictures

Where no weights of Inception, CLIP or DINO are at hand, or none of them knows such images. It takes
minutes of one processor core; distances in different networks can't be compared.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Here
from stepdistill.core.options import Count, Positive, Seed


class Options(CommandOptions):
    action: CliPositionalArg[Literal["train"]]
    """train: no other is there."""
    train_data_dir: Here
    """Folder of images, subfolders too; captions are not read."""
    output_dir: str = "features"
    """Where networks lie, each in a folder named by the hash of images and settings; an equal call
    finds it there, one that was cut off goes on."""
    size_px: int | None = Field(default=None, ge=8)
    """Side that images are brought to; none means their own, at most 64."""
    width: Count = 16
    """Channels of the first convolutions; there are 6 times as many features."""
    max_train_steps: Count = 400
    """Updates."""
    train_batch_size: int = Field(default=128, ge=2)
    """Images of an update, each told from all others."""
    learning_rate: Positive = 2e-3
    """Of AdamW; falls as a cosine."""
    seed: Seed = 0
    """Of weights and draws."""


def run(options: Options) -> None:
    from stepdistill.evaluation.learned import FeatureSettings, train_features
    from stepdistill.reporting.bars import bar

    rest = options.model_dump(exclude={"action", "train_data_dir", "output_dir"})
    with bar(total=options.max_train_steps, desc="features", unit="step") as shown:

        def tell(step: int, loss: float) -> None:
            shown.update(step - shown.n)
            shown.set_postfix(loss=f"{loss:.3f}", refresh=False)

        settings = FeatureSettings(**rest)
        folder = train_features(options.train_data_dir, options.output_dir, settings, tell)
    print(f"--features {folder}")
