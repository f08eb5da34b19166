"""Stable Audio Open: a transformer over T5 tokens and audio latents, on a trigonometric VP path.

It is told 2 phi / pi and predicts v (core/path.TrigPath). Its own scheduler alone tells such times,
and takes the steps of an SDE. A student's stock schedulers (DDIM, LCM, TCD) count the entries of a
table: `net_for` puts the change of units into the time embedding, cos and sin of 2 pi w t, so that
the exported network, told entries, answers as this one told times. Exact, and no further package.
Source: Evans et al. 2024, arXiv:2407.14358.
"""

# Shapes: B batch, C channels, L length, N tokens, D width.

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from stepdistill.core.path import TrigPath
from stepdistill.core.types import Cond
from stepdistill.families.audio import AudioFamily
from stepdistill.families.encoding import check_prompts
from stepdistill.families.family import net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks

_CODE = """\
import math, torch
{source}
count_entries(pipe.transformer, {unit!r})"""


@torch.no_grad()
def count_entries(net, unit):  # type: ignore[no-untyped-def]
    """The network, told entries n of a table, answers as before told the time unit * (n + 1)."""
    shift = 2 * math.pi * unit * net.time_proj.weight
    cos, sin = net.timestep_proj[0].weight.chunk(2, dim=1)
    turned = [cos * shift.cos() + sin * shift.sin(), sin * shift.cos() - cos * shift.sin()]
    net.timestep_proj[0].weight.copy_(torch.cat(turned, dim=1))
    net.time_proj.weight.mul_(unit)


class StableAudioFamily(AudioFamily):
    """StableAudioPipeline at the length its transformer states."""

    name: ClassVar[str] = "stable_audio"
    pipelines: ClassVar[tuple[str, ...]] = ("StableAudioPipeline",)
    tiny = "stepdistill.testing.tiny_audio:tiny_stable_audio"
    scales_input: ClassVar[bool] = True

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if self.kind not in ("v", "flow"):  # of the latter are students that were made so
            raise ValueError(
                f"{self.name}: expected a scheduler for v-prediction on its VP path, got "
                f"{type(pipeline.scheduler).__name__}, which tells the network other times. Save "
                "the pipeline with its CosineDPMSolverMultistepScheduler."
            )

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.config.in_channels, self.config.sample_size

    @property
    def seconds(self) -> float:
        """As the stock call reckons its default length."""
        return self.config.sample_size * self.hop / self.sample_rate

    def images(self, latents: Tensor) -> Tensor:
        """Waves (B, A, T), cut as by the stock call, which may round a sample away."""
        return super().images(latents)[..., : int(self.seconds * self.sample_rate)]

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype = net_dtype(net)
        out: Tensor = net(
            x_t.to(dtype),
            model_t.float(),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            global_hidden_states=cond["seconds"].to(dtype),
            rotary_embedding=get_1d_rotary_pos_embed(
                self.pipeline.rotary_embed_dim,
                x_t.shape[-1] + cond["seconds"].shape[1],
                use_real=True,
                repeat_interleave_real=False,
            ),
            return_dict=False,
        )[0]
        return out

    def _unit(self, scheduler: Any) -> float | None:
        """Time to an entry of the scheduler's table; None where it tells this network's times."""
        if not (isinstance(self.path, TrigPath) and "trained_betas" in scheduler.config):
            return None
        return 2 * self.path.last / math.pi / self.path.num_steps

    def net_for(self, net: nn.Module, scheduler: Any) -> nn.Module:
        """A copy that is told entries n of a table, t = (n + 1) / N, in place of times."""
        unit = self._unit(scheduler)
        if unit is None:
            return net
        made = copy.deepcopy(net)
        count_entries(made, unit)
        return made

    def net_code(self, scheduler: Any) -> str:
        unit = self._unit(scheduler)
        if unit is None:
            return ""
        source = inspect.getsource(count_entries).replace("  # type: ignore[no-untyped-def]", "")
        return _CODE.format(source=source.rstrip(), unit=unit)

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i": the token of time and length, then one a latent."""
        width = self.config.num_attention_heads * self.config.attention_head_dim
        return token_blocks(width, transformer_blocks=self.config.num_layers)

    def image_features(
        self, features: dict[str, Tensor], x_t: Tensor, cond: Cond
    ) -> dict[str, Tensor]:
        return {name: value[:, -x_t.shape[-1] :] for name, value in features.items()}

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N + 2, D) of T5 and of both ends in seconds; seconds (B, 1, 2 D)."""
        pipeline, count = self.pipeline, len(check_prompts(prompts))
        device = pipeline.text_encoder.device
        text = pipeline.encode_prompt(list(prompts), device, False)
        ends = pipeline.encode_duration(0.0, self.seconds, device, False, count)
        return Cond({"prompt_embeds": torch.cat([text, *ends], 1), "seconds": torch.cat(ends, 2)})

    def null(self, bsz: int) -> Cond:
        """See Family.null: no tokens at all, but the length, as in the stock call."""
        cond = self.encode([""]).repeat(bsz)
        return Cond({**cond.tensors, "prompt_embeds": torch.zeros_like(cond["prompt_embeds"])})
