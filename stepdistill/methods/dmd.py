"""DMD: distribution matching of a one-step student, held in place by the teacher's own pairs.

    loss = dmd2's gradient on fresh noise + weight * d( student(noise), x0 ),
(noise, x0) pairs of the teacher's ODE (stepdistill pairs). DMD2 does without the second term; it
keeps modes that reverse KL alone lets go, at the price of the pairs.
Source: Yin et al. 2023, arXiv:2311.18828, Eq. 7-9.
Differs from the paper: LPIPS judges images at their own size unless lpips.resize says otherwise.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from pydantic import Field, model_validator

from stepdistill.core.context import Ctx
from stepdistill.core.method import FIELDS, Nets, ScorerSpec
from stepdistill.core.recipe import Recipe
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.rewards import LPIPSOptions
from stepdistill.methods.digits import score
from stepdistill.methods.perceptual import PairDistance, judged, pair_distance
from stepdistill.methods.scores import ScoreDistillation
from stepdistill.methods.scores_config import ScoreConfig


class DMDConfig(ScoreConfig):
    """Options of dmd, besides those of every score distillation."""

    critic_steps: int = Field(default=1, ge=1)
    """Fake updates per student update."""
    regression_weight: float = Field(default=0.25, gt=0)
    """Weight of the regression on pairs beside the distribution-matching gradient."""
    regression: PairDistance = "lpips"
    """Its distance: of decoded images (lpips), of latents, or the sum of l2 and lpips."""
    lpips: LPIPSOptions = LPIPSOptions()
    """Options of lpips."""
    huber_c: float = Field(default=1e-3, gt=0)
    """c of the pseudo-Huber distance."""

    @model_validator(mode="after")
    def _one_step(self) -> DMDConfig:
        steps = self.num_steps if self.student_times is None else len(self.student_times)
        if steps > 1 or self.gan.enabled or self.rollout == "data":
            raise ValueError(
                "dmd: expected one step, no gan and no rollout from data (x0 is the teacher's "
                f"sample, no real image), got num_steps {steps}, gan.weight_g "
                f"{self.gan.weight_g:g}, rollout {self.rollout!r}. dmd2 has these, without pairs."
            )
        return self


class DMD(ScoreDistillation[DMDConfig]):
    """Distribution matching with regression on the teacher's pairs."""

    name = "dmd"
    paper = "Yin et al. 2023, arXiv:2311.18828"
    Config = DMDConfig
    status = "trained on real data here"
    data = "pairs"
    steps = (1,)
    digits = (Recipe("dmd", score(guidance=1.0, regression="l2")),)

    @property
    def needs(self) -> frozenset[str]:
        return FIELDS["pairs"]

    def scorers(self) -> dict[str, ScorerSpec]:
        return {"lpips": self.config.lpips.spec} if judged(self.config.regression) else {}

    def student_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """dmd2's loss on samples of fresh noise, and the distance to x0 from the pairs' noise."""
        assert batch.x0 is not None, "the trainer checks `needs`"
        assert batch.noise is not None, "the trainer checks `needs`"
        losses, config = super().student_loss(nets, batch, ctx), self.config
        start = self.setting.path.prior(batch.noise)
        x0 = nets["student"](start, ctx.times(self.rollout.times[0], batch.bsz), batch.cond).x0
        error = pair_distance(nets, config.regression, x0, batch.x0, config.huber_c).mean()
        return losses.plus(config.regression_weight, error, regression=error)
