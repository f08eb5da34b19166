# Licensed under the Apache License, Version 2.0.
"""Negative prompts for one-step and few-step students that run without guidance (NASA).

A distilled student has its guidance folded in, so the usual negative prompt (the second half of a
classifier-free guidance batch) has nowhere to go. Negative-away steer attention subtracts it inside
cross-attention, layer by layer, from one and the same query:

    Z = softmax(Q K+^T / sqrt d) V+  -  scale * softmax(Q K-^T / sqrt d) V-

then `to_out`, without renormalisation. There are no new weights and no second pass of the network.
Source: Nguyen et al. 2024 (SNOOPI), arXiv:2412.02687.

    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        "path/to/student",                       # any served class, see STOCK
        custom_pipeline="pipelines/negative_prompt_one_step.py",
        trust_remote_code=True,                  # Diffusers asks for it before it runs a local file
        torch_dtype=torch.bfloat16,
    ).to("cuda")
    image = pipe("a portrait of a man", negative_prompt="glasses", nasa_scale=0.3).images[0]

What comes back IS the stock pipeline of the folder (its class, LoRA loaders, offloading, saving),
called with one more argument. A pipeline in memory is wrapped without a copy:

    pipe = NegativePromptOneStepPipeline.from_pipe(pipe)

How it is done. Positive and negative embeddings are joined along the tokens, so every projection,
MLP and mask treats both alike; during the call, attention processors part them again.

- UNets (Stable Diffusion, LCM, SDXL) and PixArt: the formula above, in every cross-attention.
- Joint attention (SD3, Flux). The paper says that it subtracts in "the image-text part", no more;
  this is our reading. The negative text is a second text stream: it attends to itself and the
  image, with the weights and modulation of the positive one. An image token's output is a sum of
  image and text values under one softmax, and what is subtracted is the text's share of that sum
  with the negative text in the positive one's place: scale * P[:, text-] V-, where
  P = softmax(Q [K-, K_image]^T / sqrt d).
- Pooled embeddings and size conditions are the positive prompt's.

Limits: guidance must be off (`guidance_scale` <= 1, or told to the network), and IP-adapters or
other custom attention processors must be unloaded; both are errors.
"""

# Shapes: B batch, N tokens (text+, text-, image), H heads, D width of a head.

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

# Served classes: where encode_prompt returns what the call takes back, and the default scale.
# Scales: 0.1 (SD 1.5), 0.2 (SD 2.1) and 0.5 (PixArt) are the paper's; the others are unpublished
# starting points. Useful values lie in 0..1.
_CLIP = {"prompt_embeds": 0}
_POOLED = {"prompt_embeds": 0, "pooled_prompt_embeds": 2}
_MASKED = {"prompt_embeds": 0, "prompt_attention_mask": 1}
STOCK: dict[str, tuple[dict[str, int], float]] = {
    "StableDiffusionPipeline": (_CLIP, 0.1),
    "LatentConsistencyModelPipeline": (_CLIP, 0.1),
    "StableDiffusionXLPipeline": (_POOLED, 0.2),
    "StableDiffusion3Pipeline": (_POOLED, 0.5),
    "FluxPipeline": ({"prompt_embeds": 0, "pooled_prompt_embeds": 1}, 0.5),
    "PixArtAlphaPipeline": (_MASKED, 0.5),
    "PixArtSigmaPipeline": (_MASKED, 0.5),
}
_SD2_TEXT_WIDTH, _SD2_SCALE = 1024, 0.2
_PROMPTS = ("prompt", "prompt_2", "prompt_3")


# ------------------------------------------------------------------ attention
class NegativeCrossAttnProcessor:
    """Cross-attention over joined embeddings (text+, text-): Z+ - scale Z-, before to_out.

    Self-attention goes to the processor that stood there before.
    """

    def __init__(self, stock: Any, num_negative: int, scale: float) -> None:
        self.stock, self.num_negative, self.scale = stock, num_negative, scale

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            return self.stock(attn, hidden_states, attention_mask=attention_mask, temb=temb)
        residual, grid = hidden_states, None
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if hidden_states.ndim == 4:
            grid = hidden_states.shape[-2:]
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        query = _heads(attn.to_q(hidden_states), attn.heads)
        key = _heads(attn.to_k(encoder_hidden_states), attn.heads)
        value = _heads(attn.to_v(encoder_hidden_states), attn.heads)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        total, bsz = key.shape[2], key.shape[0]
        parts = [total - self.num_negative, self.num_negative]
        masks: Any = (None, None)
        if attention_mask is not None:  # an additive bias (B, 1, N)
            mask = attn.prepare_attention_mask(attention_mask, total, bsz)
            masks = mask.view(bsz, attn.heads, -1, total).split(parts, dim=-1)
        positive, negative = (
            F.scaled_dot_product_attention(query, k, v, attn_mask=m)
            for k, v, m in zip(key.split(parts, 2), value.split(parts, 2), masks, strict=True)
        )
        out = (positive - self.scale * negative).transpose(1, 2).flatten(2).to(query.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if grid is not None:
            out = out.transpose(-1, -2).unflatten(-1, grid)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


def joint_attention(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: tuple[Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor, Tensor],
    value: tuple[Tensor, Tensor, Tensor],
    scale: float,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(text+, text-, image) outputs of joint attention with the negative text's share subtracted.

    Args: each of query, key, value: text+, text- and image heads, tokens along `dim`.
    """
    text_q, negative_q, image_q = query
    text_k, negative_k, image_k = key
    text_v, negative_v, image_v = value
    sizes = [text_q.shape[dim], image_q.shape[dim]]
    plain = attend(
        *(torch.cat(pair, dim) for pair in ((text_q, image_q), (text_k, image_k))),
        torch.cat((text_v, image_v), dim),
    )
    text, image = plain.split(sizes, dim)
    against = torch.cat((negative_k, image_k), dim)
    negative = attend(negative_q, against, torch.cat((negative_v, image_v), dim))
    # Zero image values: what is left of the sum is the share of the negative text.
    share = attend(image_q, against, torch.cat((negative_v, torch.zeros_like(image_v)), dim))
    return text, negative, image - scale * share


class NegativeJointAttnProcessor:
    """SD3's joint attention, image tokens first. Image-only attention (SD3.5) stays stock."""

    def __init__(self, stock: Any, num_text: int, num_negative: int, scale: float) -> None:
        self.stock, self.text, self.scale = stock, [num_text, num_negative], scale

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        if encoder_hidden_states is None:
            return self.stock(attn, hidden_states, attention_mask=attention_mask)
        context = encoder_hidden_states

        def heads(image: Any, text: Any, image_norm: Any, text_norm: Any) -> Any:
            words, pixels = (
                _heads(text(context), attn.heads),
                _heads(image(hidden_states), attn.heads),
            )
            words = words if text_norm is None else text_norm(words)
            pixels = pixels if image_norm is None else image_norm(pixels)
            return (*words.split(self.text, 2), pixels)

        outs = joint_attention(
            F.scaled_dot_product_attention,
            heads(attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q),
            heads(attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k),
            heads(attn.to_v, attn.add_v_proj, None, None),
            self.scale,
            dim=2,
        )
        text, negative, image = (out.transpose(1, 2).flatten(2) for out in outs)
        words = torch.cat((text, negative), 1)
        if not attn.context_pre_only:
            words = attn.to_add_out(words)
        return attn.to_out[1](attn.to_out[0](image)), words


class NegativeFluxAttnProcessor:
    """Flux's joint attention, text tokens first: two streams, or one where blocks are single."""

    def __init__(self, stock: Any, num_text: int, num_negative: int, scale: float) -> None:
        self.text, self.scale = [num_text, num_negative], scale
        self._attention_backend = stock._attention_backend
        self._parallel_config = stock._parallel_config

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if attention_mask is not None:
            raise ValueError(
                "negative prompt: expected no attention mask on Flux's joint attention, got one."
            )

        def heads(own: Any, added: Any, own_norm: Any, added_norm: Any, rotate: bool) -> Any:
            joined = own_norm(own(hidden_states).unflatten(-1, (-1, attn.head_dim)))
            if encoder_hidden_states is not None:
                words = added(encoder_hidden_states).unflatten(-1, (-1, attn.head_dim))
                joined = torch.cat((added_norm(words), joined), 1)
            if rotate and image_rotary_emb is not None:
                joined = apply_rotary_emb(joined, image_rotary_emb, sequence_dim=1)
            return joined.split([*self.text, joined.shape[1] - sum(self.text)], 1)

        same: Any = torch.nn.Identity()
        two = encoder_hidden_states is not None
        add_q, add_k, add_v, norm_q, norm_k = (
            getattr(attn, name) if two else None
            for name in ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
        )
        outs = joint_attention(
            self._attend,
            heads(attn.to_q, add_q, attn.norm_q, norm_q, rotate=True),
            heads(attn.to_k, add_k, attn.norm_k, norm_k, rotate=True),
            heads(attn.to_v, add_v, same, same, rotate=False),
            self.scale,
            dim=1,
        )
        text, negative, image = (out.flatten(2) for out in outs)
        words = torch.cat((text, negative), 1)
        if not two:
            return torch.cat((words, image), 1)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(words)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@contextmanager
def negative_attention(net: Any, num_text: int, num_negative: int, scale: float) -> Iterator[None]:
    """Within: the denoiser takes joined embeddings (text+, text-) and subtracts the second.

    Errors: ValueError for attention processors that are not the stock ones of a served network.
    """
    before = dict(net.attn_processors)
    inside: dict[str, Any] = {}
    for name, stock in before.items():
        if type(stock) in (AttnProcessor, AttnProcessor2_0):
            inside[name] = NegativeCrossAttnProcessor(stock, num_negative, scale)
        elif type(stock) is JointAttnProcessor2_0:
            inside[name] = NegativeJointAttnProcessor(stock, num_text, num_negative, scale)
        elif type(stock) is FluxAttnProcessor:
            inside[name] = NegativeFluxAttnProcessor(stock, num_text, num_negative, scale)
        else:
            raise ValueError(
                f"negative prompt: expected stock attention processors, got "
                f"{type(stock).__name__} at {name}. Unload IP-adapters and custom processors."
            )
    net.set_attn_processor(inside)
    try:
        yield
    finally:
        net.set_attn_processor(dict(before))


# ------------------------------------------------------------------- pipeline
class _NegativePrompt:
    """Laid over a stock pipeline class: its call, with a negative prompt that needs no guidance."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        nasa_scale: float | None = None,
        num_inference_steps: int = 1,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> Any:
        """The stock pipeline's output, steered away from the negative prompt.

        Args:
            prompt: one or B prompts. negative_prompt: one for all, or one for each.
            nasa_scale: strength of the subtraction, 0 or more; 0 is the stock call, bit for bit.
                None takes the class's default (see STOCK).
            num_inference_steps: what the student was made for.
            guidance_scale: None means off (told guidance keeps its class default); a student whose
                network is told the guidance takes the number of its model card.
            options: whatever else the stock call takes. Embeddings may be given in place of either
                prompt (prompt_embeds, negative_prompt_embeds, with pooled embeddings or masks where
                the class has them); both may differ in length.
        Errors: ValueError for a negative or non-finite scale, guidance that is on, a number of
            negative prompts that does not fit, or attention processors that are not stock.
        """
        stock, name = super().__call__, type(self).__name__
        returned, scale = STOCK[name]
        if nasa_scale is not None:
            scale = nasa_scale
        elif name == "StableDiffusionPipeline":
            wide = self.unet.config.cross_attention_dim == _SD2_TEXT_WIDTH
            scale = _SD2_SCALE if wide else scale
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"nasa_scale: expected a finite number >= 0, got {scale}.")
        net = self.unet if "unet" in self.components else self.transformer
        if guidance_scale is not None:
            options["guidance_scale"] = guidance_scale
        elif self._guided_by_scale(net):
            options["guidance_scale"] = 1.0
        options["num_inference_steps"] = num_inference_steps
        none = negative_prompt is None and options.get("negative_prompt_embeds") is None
        if none or scale == 0:
            for key in [k for k in options if k.startswith(("negative_prompt", "negative_pooled"))]:
                del options[key]
            return stock(prompt=prompt, num_images_per_prompt=num_images_per_prompt, **options)
        self._check_guidance(net, options)
        positive, negative = self._encode_both(prompt, negative_prompt, options, returned)
        joined = {
            key: torch.cat((value, negative[key]), 1) if key != "pooled_prompt_embeds" else value
            for key, value in positive.items()
        }
        # Expanded here: not every stock class repeats embeddings that it is given.
        joined = {
            key: value.repeat_interleave(num_images_per_prompt, 0) for key, value in joined.items()
        }
        sizes = positive["prompt_embeds"].shape[1], negative["prompt_embeds"].shape[1]
        with negative_attention(net, *sizes, scale):
            return stock(**joined, **options)

    def _guided_by_scale(self, net: Any) -> bool:
        """Whether guidance_scale > 1 makes the stock call run a second, unconditional pass."""
        told = ("LatentConsistencyModelPipeline", "FluxPipeline")
        named = type(self).__name__ not in told
        return named and getattr(net.config, "time_cond_proj_dim", None) is None

    def _check_guidance(self, net: Any, options: dict[str, Any]) -> None:
        names = ["true_cfg_scale", *(["guidance_scale"] if self._guided_by_scale(net) else [])]
        on = {name: options[name] for name in names if options.get(name, 1.0) > 1.0}
        if on:
            raise ValueError(
                f"negative prompt: expected guidance off (<= 1), got {on}. The student has its "
                "guidance folded in; for classifier-free guidance use the stock pipeline."
            )

    def _encode_both(
        self, prompt: Any, negative_prompt: Any, options: dict[str, Any], returned: dict[str, int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embeddings of both prompts, B rows each; takes what it uses out of `options`."""
        given: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt}
        names = [*_PROMPTS, *returned]
        for key in [*names[1:], *(f"negative_{name}" for name in names[1:])]:
            given[key] = options.pop(key, None)
        positive = self._encode({name: given[name] for name in names}, options, returned)
        bsz = len(positive["prompt_embeds"])
        against = {name: given[f"negative_{name}"] for name in names}
        if against["prompt_embeds"] is not None and "pooled_prompt_embeds" in returned:
            against["pooled_prompt_embeds"] = positive["pooled_prompt_embeds"]  # not used
        for name in _PROMPTS:
            if isinstance(against[name], str):
                against[name] = [against[name]] * bsz
        negative = self._encode(against, options, returned)
        for key, value in negative.items():
            if len(value) not in (1, bsz):
                raise ValueError(
                    f"negative_prompt: expected one, or one for each of {bsz} prompts, got "
                    f"{len(value)}."
                )
            negative[key] = value.expand(bsz, *value.shape[1:])
        return positive, negative

    def _encode(
        self, given: dict[str, Any], options: dict[str, Any], returned: dict[str, int]
    ) -> dict[str, Tensor]:
        lacks = [name for name in returned if given[name] is None]
        if (given["prompt"] is None) == (given["prompt_embeds"] is None) or (
            given["prompt"] is None and lacks
        ):
            raise ValueError(
                f"negative prompt: expected each prompt as text or as {sorted(returned)}, got "
                f"{sorted(name for name, value in given.items() if value is not None)}."
            )
        takes = inspect.signature(self.encode_prompt).parameters
        call = inspect.signature(super().__call__).parameters
        told = {  # clip_skip, max_sequence_length, clean_caption, with the call's own defaults
            name: options.get(name, call[name].default)
            for name in takes
            if name in call and name not in given and "negative" not in name
        }
        lora = options.get("cross_attention_kwargs") or options.get("joint_attention_kwargs") or {}
        fixed = {
            "device": self._execution_device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
            "lora_scale": lora.get("scale"),
        }
        arguments = {**told, **fixed, **given}
        made = self.encode_prompt(**{key: arguments[key] for key in takes if key in arguments})
        return {name: made[place] for name, place in returned.items()}


@functools.cache
def _over(name: str) -> type:
    """The stock class of that name with the negative prompt laid over it.

    It keeps the stock name, so that save_pretrained writes a stock pipeline.
    """
    if name not in STOCK:
        raise ValueError(
            f"negative prompt: expected a pipeline of {sorted(STOCK)}, got {name!r}. "
            "Its attention has no place here yet."
        )
    return type(name, (_NegativePrompt, getattr(diffusers, name)), {})


class NegativePromptOneStepPipeline(DiffusionPipeline):
    """What `custom_pipeline=` finds; making one gives the folder's own class with the new call.

    Use `DiffusionPipeline.from_pretrained(folder, custom_pipeline=this file)` or `from_pipe`.
    """

    _optional_components: ClassVar[list[str]] = [
        "scheduler",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "unet",
        "transformer",
        "image_encoder",
        "feature_extractor",
        "safety_checker",
    ]

    def __new__(cls, stock_class: str | None = None, **parts: Any) -> Any:
        made = _over(stock_class)
        takes = inspect.signature(made.__init__).parameters
        foreign = [key for key, part in parts.items() if key not in takes and part is not None]
        if foreign:
            raise ValueError(f"{stock_class}: expected its own parts only, got also {foreign}.")
        return made(**{key: part for key, part in parts.items() if key in takes})

    def __init__(
        self,
        scheduler,
        vae,
        text_encoder,
        text_encoder_2,
        text_encoder_3,
        tokenizer,
        tokenizer_2,
        tokenizer_3,
        unet,
        transformer,
        image_encoder,
        feature_extractor,
        safety_checker,
        stock_class=None,
        requires_safety_checker=True,
        force_zeros_for_empty_prompt=True,
        add_watermarker=None,
        is_distilled=False,
    ) -> None:
        """Never run: it tells Diffusers which parts a folder may hold. See __new__."""

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The stock method's answer, and the class named in the folder's model_index.json.

        Errors: ValueError for a class that is not served, before a weight is loaded.
        """
        name = config_dict.get("_class_name")
        _over(name if isinstance(name, str) else str(name))
        found, unused, hidden = super().extract_init_dict(config_dict, **kwargs)
        return {**found, "stock_class": name}, unused, hidden

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """A pipeline in memory with the new call; weights are shared, not copied."""
        return _over(type(pipeline).__name__).from_pipe(pipeline, **kwargs)
