"""Tuning: the user's choice of how each trained role stores its weights. Methods never see it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Layout = Literal["lora", "full"]


class Tuning(BaseModel):
    """How trained roles hold weights: an adapter on the one frozen base, or a copy of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    student: Layout = "lora"
    """Student weights: "lora" (adapter on the frozen base) or "full" (own copy)."""
    fake: Layout = "lora"
    """Fake-score weights of distribution matching, likewise."""
    rank: int = Field(default=64, ge=1)
    """LoRA rank r of every adapter."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha (scale is alpha / rank); none means alpha = rank, scale 1. Always saved."""
    fake_rank: int | None = Field(default=None, ge=1)
    """LoRA rank of the fake's adapter; none means `rank`."""
    target_modules: tuple[str, ...] | None = None
    """Module name endings that get an adapter; none means the family's list."""
    base_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of frozen base weights; auto follows mixed_precision. Trained weights are float32."""

    def layout(self, role: str, follows: str | None = None) -> Layout:
        """The layout of a trained role, or of the EMA of one."""
        return self.fake if (follows or role) == "fake" else self.student

    def lora(self, role: str) -> tuple[int, float]:
        """(rank, alpha) of a role's adapter."""
        rank = self.fake_rank if role == "fake" and self.fake_rank else self.rank
        return rank, self.alpha if self.alpha is not None else float(rank)
