"""Tiny pipelines of classes without a family, for the generic one to listen to. See tiny.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from stepdistill.testing.assembled import assemble

VAE = {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}

# Flow, told t / 1000; masked tokens of zeros.
AURA_FLOW = {
    "text_encoder": "t5",
    "transformer": {
        "_class_name": "AuraFlowTransformer2DModel",
        "sample_size": 8,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 16,
    },
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.73},
    "vae": VAE,
}
# v prediction on a table of shifted SNR, with sizes told to the network.
COGVIEW3 = {
    "text_encoder": "t5",
    "transformer": {
        "_class_name": "CogView3PlusTransformer2DModel",
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "text_embed_dim": 16,
        "time_embed_dim": 16,
        "condition_dim": 4,
        "pos_embed_max_size": 16,
        "sample_size": 8,
    },
    "scheduler": {
        "_class_name": "CogVideoXDDIMScheduler",
        "prediction_type": "v_prediction",
        "snr_shift_scale": 4.0,
        "timestep_spacing": "trailing",
    },
    "vae": VAE,
}
# Two encoders with masks, style and size inputs, rotary tables, learned variance.
HUNYUAN_DIT = {
    "text_encoder_2": "t5",
    "transformer": {
        "_class_name": "HunyuanDiT2DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 16,
    },
    "vae": {**VAE, "levels": 4},
    "text_encoder": "clip_77",
    "scheduler": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
# Packed flow latents, a null pass of its own, a mask over text and image.
CHROMA = {
    "text_encoder": "t5",
    "transformer": {
        "_class_name": "ChromaTransformer2DModel",
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    },
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "vae": {**VAE, "shift_factor": 0.1159},
}
# Told 1 - t and a guided batch always: the generic family refuses it.
LUMINA = {
    "text_encoder": "gemma",
    "transformer": {
        "_class_name": "LuminaNextDiT2DModel",
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 16,
        "num_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "cross_attention_dim": 16,
    },
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "vae": {**VAE, "levels": 4},
}
tiny_lumina = partial(assemble, "LuminaPipeline", LUMINA)
TINY_GENERIC: dict[str, Callable[[], Any]] = {
    "aura_flow": partial(assemble, "AuraFlowPipeline", AURA_FLOW),
    "chroma": partial(assemble, "ChromaPipeline", CHROMA),
    "cogview3": partial(assemble, "CogView3PlusPipeline", COGVIEW3),
    "hunyuan_dit": partial(assemble, "HunyuanDiTPipeline", HUNYUAN_DIT),
}
