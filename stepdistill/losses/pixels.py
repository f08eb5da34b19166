"""Options of a pixel network whose features discriminator heads read; rewards.features makes it."""

from __future__ import annotations

from pydantic import Field

from stepdistill.core.method import MethodConfig, ScorerSpec


class PixelOptions(MethodConfig):
    """A frozen vision network (rewards.features)."""

    network: str | None = None
    """Folder or Hub id of a Transformers vision model in safetensors (facebook/dinov2-small), or a
    folder that `stepdistill features train` made of your own images."""
    size_px: int | None = Field(default=None, ge=8)
    """Side in px that images are resized to first; none means what the network was trained at."""

    @property
    def spec(self) -> ScorerSpec:
        """What a method asks the run for."""
        options = self.model_dump(include=set(PixelOptions.model_fields))
        return ScorerSpec("features", options, "gan.pixels")
