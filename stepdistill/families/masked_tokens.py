"""Base of families whose network reads a prompt's tokens and a mask of them (T5's or Gemma's)."""

# Shapes: B batch, N tokens, D width.

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from stepdistill.core.types import Cond
from stepdistill.families.encoding import check_prompts
from stepdistill.families.family import Family

ENCODE_ARGUMENTS = ("clean_caption", "max_sequence_length", "complex_human_instruction")


class MaskedTokensFamily(Family):
    """bare_null: whether the stock call encodes its negative prompt without the instruction (or
    system prompt) that it puts before the prompt."""

    bare_null: ClassVar[bool] = False

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D); mask (B, N), 1 on tokens and 0 on padding."""
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            check_prompts(prompts),
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            **self.encode_extras,
        )
        return Cond({"prompt_embeds": embeds, "mask": mask})

    @property
    def encode_extras(self) -> dict[str, Any]:
        """The stock call's own defaults for encode_prompt, which may have others."""
        call = inspect.signature(type(self.pipeline).__call__).parameters
        return {name: call[name].default for name in ENCODE_ARGUMENTS if name in call}

    @torch.no_grad()
    def null(self, bsz: int) -> Cond:
        """See Family.null."""
        if not self.bare_null:
            return super().null(bsz)
        _, _, embeds, mask = self.pipeline.encode_prompt(
            [""], do_classifier_free_guidance=True, device=self.pipeline.text_encoder.device
        )
        return Cond({"prompt_embeds": embeds, "mask": mask}).repeat(bsz)
