"""Flux.2 dev: klein's transformer with a guidance embedding, prompts through Mistral 3.

The stock call tells the guidance and makes no null pass; students are told 1 unless they read w.
"""

# Shapes: B batch.

from __future__ import annotations

from typing import Any, ClassVar

from stepdistill.families.flux2 import Flux2Family
from stepdistill.families.flux_guidance import GuidanceToldFamily, fix_guidance


class Flux2DevFamily(GuidanceToldFamily, Flux2Family):
    """Flux2Pipeline."""

    name: ClassVar[str] = "flux2_dev"
    pipelines: ClassVar[tuple[str, ...]] = ("Flux2Pipeline",)
    tiny = "stepdistill.testing.tiny_flux2:tiny_flux2_dev"

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if not self.embeds_guidance:
            raise ValueError(
                "flux2_dev: expected a transformer that is told the guidance, got guidance_embeds "
                "false. Put it into a Flux2KleinPipeline."
            )

    def settle_guidance(self, pipeline: Any, guidance: float) -> bool:
        """See Family.settle_guidance: the embedding becomes that of one guidance."""
        fixed = fix_guidance(pipeline.transformer, guidance)
        if fixed is not None:
            pipeline.register_modules(transformer=fixed)
        return fixed is not None
