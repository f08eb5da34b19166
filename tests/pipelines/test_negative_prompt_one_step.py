"""The negative prompt of guidance-free students: its formula, its identities, and stock behaviour.

References are written out as matrices in float64, not with the processors' own attention call.
"""

# Shapes: B batch, N tokens, H heads, D width.

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttention
from support.runs import teacher_dir
from torch.utils.flop_counter import FlopCounterMode

FILE = Path(__file__).parents[2] / "pipelines" / "negative_prompt_one_step.py"
NAMES = ["sd", "sdxl", "sd3", "flux_schnell", "pixart"]

_spec: Any = importlib.util.spec_from_file_location("negative_prompt_one_step", FILE)
nasa: Any = importlib.util.module_from_spec(_spec)
sys.modules["negative_prompt_one_step"] = nasa
_spec.loader.exec_module(nasa)


@pytest.fixture(autouse=True)
def own_module_cache(tmp_path_factory, monkeypatch) -> None:
    """Diffusers copies a custom pipeline's file to a cache; parallel tests must not share it."""
    folder = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", folder)
    monkeypatch.syspath_prepend(folder)


_LOADED: dict[str, tuple[Any, Any]] = {}


@pytest.fixture
def pipes(request, tmp_path_factory) -> tuple[Any, Any, dict[str, Any]]:
    """(stock pipeline, the same with negative prompts, call arguments) of a tiny family."""
    name = request.param
    if name not in _LOADED:
        folder = teacher_dir(name, tmp_path_factory)
        parts = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
        stock = DiffusionPipeline.from_pretrained(folder, **parts)
        stock.set_progress_bar_config(disable=True)
        ours = nasa.NegativePromptOneStepPipeline.from_pipe(stock)
        ours.set_progress_bar_config(disable=True)
        _LOADED[name] = stock, ours
    size = {"height": 16, "width": 16}
    extra = {
        "flux_schnell": {**size, "max_sequence_length": 16},
        "pixart": {"use_resolution_binning": False, "clean_caption": False},
    }
    return (*_LOADED[name], {"output_type": "latent", **extra.get(name, {})})


def latents(pipe: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return pipe(*args, generator=torch.Generator().manual_seed(0), **kwargs).images


def off(name_or_pipe: Any) -> dict[str, float]:
    """Guidance off for a stock call; Flux's number is told to the network, if to anything."""
    return {} if "Flux" in type(name_or_pipe).__name__ else {"guidance_scale": 1.0}


every = pytest.mark.parametrize("pipes", NAMES, indirect=True)


# ------------------------------------------------------------------ the formula
def attention(**options: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(12, 10, heads=3, dim_head=4, **options).double()


def probabilities(q: torch.Tensor, k: torch.Tensor, bias: Any = 0.0) -> torch.Tensor:
    """softmax(Q K^T / sqrt D + bias), (B, H, N, M)."""
    return ((q @ k.mT) / q.shape[-1] ** 0.5 + bias).softmax(-1)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_is_the_papers_formula(masked) -> None:
    """Prompts of 5 and 3 tokens, with and without masks: to_out(Z+ - 0.7 Z-)."""
    attn = attention()
    x, text, against = (torch.randn(2, n, w).double() for n, w in ((6, 12), (5, 10), (3, 10)))
    bias = torch.zeros(2, 1, 8).double()
    if masked:
        bias[0, :, 4] = bias[1, :, 6:] = -10000.0
    q = heads(attn.to_q(x), 3)
    z = []
    for words, part in ((text, bias[..., :5]), (against, bias[..., 5:])):
        k, v = heads(attn.to_k(words), 3), heads(attn.to_v(words), 3)
        z.append((probabilities(q, k, part[:, None]) @ v).transpose(1, 2).flatten(2))
    expected = attn.to_out[0](z[0] - 0.7 * z[1])
    attn.set_processor(nasa.NegativeCrossAttnProcessor(attn.processor, 3, 0.7))
    joined = torch.cat((text, against), 1)
    got = attn(x, joined, attention_mask=bias if masked else None)
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("norm", [None, "layer_norm"])
def test_cross_attention_at_scale_zero_is_stock(norm) -> None:
    """On maps (B, C, H, W) with group norm, residual and rescaling, as UNet blocks may have."""
    attn = attention(
        cross_attention_norm=norm, norm_num_groups=3, residual_connection=True,
        rescale_output_factor=1.7, qk_norm="layer_norm",
    )  # fmt: skip
    x, text = torch.randn(2, 12, 2, 3).double(), torch.randn(2, 5, 10).double()
    expected = attn(x, text)
    attn.set_processor(nasa.NegativeCrossAttnProcessor(attn.processor, 4, 0.0))
    got = attn(x, torch.cat((text, torch.randn(2, 4, 10).double()), 1))
    assert (got - expected).abs().max() < 1e-12


def test_equal_prompts_leave_one_minus_scale() -> None:
    attn = attention(out_bias=False)  # to_out is then linear: the factor shows through
    x, text = torch.randn(2, 6, 12).double(), torch.randn(2, 5, 10).double()
    plain = attn(x, text)
    attn.set_processor(nasa.NegativeCrossAttnProcessor(attn.processor, 5, 0.3))
    assert (attn(x, torch.cat((text, text), 1)) - 0.7 * plain).abs().max() < 1e-12


def test_self_attention_is_left_alone() -> None:
    attn = attention()
    x = torch.randn(2, 6, 12).double()
    attn.to_k = attn.to_v = torch.nn.Linear(12, 12, bias=False).double()
    plain = attn(x)
    attn.set_processor(nasa.NegativeCrossAttnProcessor(AttnProcessor2_0(), 5, 0.3))
    assert torch.equal(attn(x), plain)


TEXT, AGAINST, IMAGE = 5, 3, 6


def joint_reference(q: Any, k: Any, v: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(image, text-) of heads whose tokens are [text+, text-, image], by explicit matrices."""
    text, against = slice(0, TEXT), slice(TEXT, TEXT + AGAINST)
    picture = slice(TEXT + AGAINST, None)

    def over(words: slice, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.cat((k[:, :, words], k[:, :, picture]), 2)
        weights = probabilities(query, keys)
        split = k[:, :, words].shape[2]
        return weights[..., :split] @ v[:, :, words], weights[..., split:] @ v[:, :, picture]

    share, rest = over(text, q[:, :, picture])
    away, _ = over(against, q[:, :, picture])
    return share + rest - scale * away, sum(over(against, q[:, :, against]))


def sd3_attention() -> Attention:
    torch.manual_seed(0)
    return Attention(
        12, added_kv_proj_dim=12, heads=3, dim_head=4, out_dim=12, bias=True,
        processor=JointAttnProcessor2_0(), qk_norm="rms_norm", context_pre_only=False,
    ).double()  # fmt: skip


def test_sd3_subtracts_the_texts_share() -> None:
    attn = sd3_attention()
    x, words = torch.randn(2, IMAGE, 12).double(), torch.randn(2, TEXT + AGAINST, 12).double()
    q, k, v = (
        torch.cat((heads(added(words), 3), heads(own(x), 3)), 2)
        for own, added in (
            (attn.to_q, attn.add_q_proj),
            (attn.to_k, attn.add_k_proj),
            (attn.to_v, attn.add_v_proj),
        )
    )
    q, k = attn.norm_q(q), attn.norm_k(k)  # both streams' norms start alike
    picture, against = joint_reference(q, k, v, 0.4)
    attn.set_processor(nasa.NegativeJointAttnProcessor(attn.processor, TEXT, AGAINST, 0.4))
    got, text = attn(x, words)
    assert (got - attn.to_out[0](picture.transpose(1, 2).flatten(2))).abs().max() < 1e-12
    assert (
        text[:, TEXT:] - attn.to_add_out(against.transpose(1, 2).flatten(2))
    ).abs().max() < 1e-12


def flux_attention(single: bool) -> FluxAttention:
    torch.manual_seed(0)
    kinds = {"pre_only": True} if single else {"added_kv_proj_dim": 12}
    return FluxAttention(12, heads=3, dim_head=4, out_dim=12, bias=True, **kinds).double()


@pytest.mark.parametrize("single", [False, True])
def test_flux_subtracts_the_texts_share(single) -> None:
    """In blocks of two streams and of one; with the positions of the stock network."""
    attn = flux_attention(single)
    x, words = torch.randn(2, IMAGE, 12).double(), torch.randn(2, TEXT + AGAINST, 12).double()
    angles = torch.randn(TEXT + AGAINST + IMAGE, 2).double().repeat_interleave(2, -1)
    rotary = angles.cos(), angles.sin()
    if single:
        tokens = torch.cat((words, x), 1)
        q, k, v = (heads(f(tokens), 3) for f in (attn.to_q, attn.to_k, attn.to_v))
    else:
        pairs = zip(
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            (attn.to_q, attn.to_k, attn.to_v),
            strict=True,
        )
        q, k, v = (torch.cat((heads(a(words), 3), heads(f(x), 3)), 2) for a, f in pairs)

    def turned(h: torch.Tensor) -> torch.Tensor:
        h = h.transpose(1, 2)
        return nasa.apply_rotary_emb(h, rotary, sequence_dim=1).transpose(1, 2)

    picture, against = joint_reference(turned(attn.norm_q(q)), turned(attn.norm_k(k)), v, 0.4)
    picture, against = (z.transpose(1, 2).flatten(2) for z in (picture, against))
    attn.set_processor(nasa.NegativeFluxAttnProcessor(attn.processor, TEXT, AGAINST, 0.4))
    if single:
        out = attn(torch.cat((words, x), 1), image_rotary_emb=rotary)
        text, got = out[:, : TEXT + AGAINST], out[:, TEXT + AGAINST :]
    else:
        got, text = attn(x, words, image_rotary_emb=rotary)
        picture, against = attn.to_out[0](picture), attn.to_add_out(against)
    assert (got - picture).abs().max() < 1e-12
    assert (text[:, TEXT:] - against).abs().max() < 1e-12


def test_equal_prompts_walk_through_joint_blocks_alike() -> None:
    """Two text streams of one prompt stay one: the positive text never sees the negative."""
    attn = sd3_attention()
    x, words = torch.randn(2, IMAGE, 12).double(), torch.randn(2, TEXT, 12).double()
    plain = attn(x, words)[1]
    attn.set_processor(nasa.NegativeJointAttnProcessor(attn.processor, TEXT, TEXT, 0.4))
    text = attn(x, torch.cat((words, words), 1))[1]
    for half in text.split(TEXT, 1):
        assert (half - plain).abs().max() < 1e-12


# ----------------------------------------------------------------- the pipeline
@pytest.mark.sampled("sd", "sd3")
@every
def test_scale_zero_and_no_prompt_are_the_stock_call_bit_for_bit(pipes) -> None:
    stock, ours, call = pipes
    plain = latents(stock, "a cat", num_inference_steps=1, **off(stock), **call)
    assert torch.equal(latents(ours, "a cat", "a dog", nasa_scale=0.0, **call), plain)
    assert torch.equal(latents(ours, "a cat", **call), plain)


@every
def test_vanishing_scale_meets_the_stock_call(pipes) -> None:
    """Through the processors, not around them, at two steps and two prompts of other lengths."""
    stock, ours, call = pipes
    prompts = ["a cat", "a much longer prompt"]
    steps = {"num_inference_steps": 2}
    plain = latents(stock, prompts, **steps, **off(stock), **call)
    near = latents(ours, prompts, "dog", nasa_scale=1e-12, **steps, **call)
    assert (near - plain).abs().max() < 1e-5 * plain.abs().max()


@every
def test_the_effect_is_there_and_grows_with_the_scale(pipes) -> None:
    _, ours, call = pipes
    plain = latents(ours, "a cat", **call)
    moved = [
        float((latents(ours, "a cat", "a dog", nasa_scale=s, **call) - plain).norm())
        for s in (0.25, 0.5)
    ]
    assert moved[0] > 1e-5 * float(plain.norm())  # random weights hardly read the text
    assert 1.5 < moved[1] / moved[0] < 2.7  # nearly linear at small scales


@pytest.mark.sampled("sd3", "pixart")
@every
def test_rows_of_a_batch_are_calls_of_their_own(pipes) -> None:
    _, ours, call = pipes
    noise = torch.randn(4, *latents(ours, "a", **call).shape[1:])
    options = {"nasa_scale": 0.5, **call}
    batch = latents(
        ours, ["a cat", "a tree"], ["dog", "leaves"], num_images_per_prompt=2, latents=noise,
        **options,
    )  # fmt: skip
    for row, (prompt, against) in enumerate(
        [("a cat", "dog")] * 2 + [("a tree", "leaves")] * 2
    ):  # two images of each prompt follow one another
        alone = latents(ours, prompt, against, latents=noise[row : row + 1], **options)
        assert (batch[row] - alone[0]).abs().max() < 1e-5 * alone.abs().max()


@every
@torch.no_grad()  # kernels differ in their last bits where a graph is kept
def test_embeddings_in_place_of_text(pipes) -> None:
    _, ours, call = pipes
    returned = nasa.STOCK[type(ours).__name__][0]
    options = {k: call[k] for k in ("max_sequence_length", "clean_caption") if k in call}
    given: dict[str, Any] = {}
    for prefix, text in (("", "a cat"), ("negative_", "a dog")):
        empty = dict.fromkeys((*nasa._PROMPTS, *returned))
        made = ours._encode({**empty, "prompt": text}, options, returned)
        given |= {prefix + name: value for name, value in made.items()}
    by_text = latents(ours, "a cat", "a dog", nasa_scale=0.5, **call)
    assert torch.equal(latents(ours, nasa_scale=0.5, **given, **call), by_text)


@every
def test_processors_and_weights_are_as_before(pipes) -> None:
    stock, ours, call = pipes
    net = getattr(ours, "unet", None) or ours.transformer
    before, names = dict(net.attn_processors), set(net.state_dict())
    latents(ours, "a cat", "a dog", **call)
    with pytest.raises(RuntimeError):
        latents(ours, "a cat", "a dog", latents=torch.zeros(1, 3, 3, 3), **call)
    after = net.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    assert set(net.state_dict()) == names
    assert (getattr(stock, "unet", None) or stock.transformer) is net  # shared, not copied


@pytest.mark.parametrize("pipes", ["pixart"], indirect=True)
def test_padding_of_the_negative_prompt_does_not_count(pipes) -> None:
    """Masks of both prompts reach the attention: masked negative tokens change nothing."""
    _, ours, call = pipes
    call = {**call, "max_sequence_length": 8}
    given = ours.encode_prompt("a dog", False, max_sequence_length=20)
    embeds, mask = given[0], given[1]
    assert int(mask.sum()) < 20
    options = {"negative_prompt_attention_mask": mask, "nasa_scale": 0.5, **call}
    first = latents(ours, "a cat", negative_prompt_embeds=embeds, **options)
    noisy = torch.where(mask[..., None].bool(), embeds, 9.0)
    assert torch.equal(latents(ours, "a cat", negative_prompt_embeds=noisy, **options), first)
    other = torch.where(mask[..., None].bool(), 9.0, embeds)
    assert not torch.equal(latents(ours, "a cat", negative_prompt_embeds=other, **options), first)


# ------------------------------------------------------------ loading and saving
@pytest.mark.sampled("sd", "sd3")
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart_sigma"])
def test_loads_as_a_custom_pipeline(name, tmp_path_factory) -> None:
    """The class is the folder's own; SD3 without T5 needs no telling."""
    folder = teacher_dir(name, tmp_path_factory)
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(FILE), trust_remote_code=True
    )
    wanted = DiffusionPipeline.load_config(folder)["_class_name"]
    assert [c.__name__ for c in type(pipe).__mro__[:3:2]] == [wanted, wanted]
    assert type(pipe).__mro__[2].__module__.startswith("diffusers.pipelines.")


@pytest.mark.parametrize("pipes", ["sd"], indirect=True)
def test_saves_as_the_stock_pipeline(pipes, tmp_path) -> None:
    stock, ours, call = pipes
    ours.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(stock)
    again.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, **call}
    assert torch.equal(latents(again, "a", **options), latents(stock, "a", **options))


def test_stands_alone() -> None:
    """torch, diffusers and the standard library; one pipeline class, which Diffusers looks for."""
    tree = ast.parse(FILE.read_text())
    imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imports |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    top = {name.split(".")[0] for name in imports} - set(sys.stdlib_module_names)
    assert top == {"torch", "diffusers"}
    bases = [n.bases for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    assert sum(getattr(b, "id", "") == "DiffusionPipeline" for bs in bases for b in bs) == 1


# -------------------------------------------------------------------- bad input
@pytest.mark.parametrize("pipes", ["sd"], indirect=True)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nasa_scale": -0.1}, "nasa_scale: expected a finite number >= 0, got -0.1"),
        ({"nasa_scale": float("nan")}, "nasa_scale: expected a finite number"),
        ({"guidance_scale": 7.5}, "expected guidance off .* got {'guidance_scale': 7.5}"),
        ({"negative_prompt": ["a", "b", "c"]}, "one for each of 2 prompts, got 3"),
        ({"prompt": None}, "expected each prompt as text or as"),
    ],
)
def test_bad_input_is_one_clear_error(pipes, options, message) -> None:
    _, ours, call = pipes
    given = {"prompt": ["a cat", "a tree"], "negative_prompt": "a dog", **call, **options}
    with pytest.raises(ValueError, match=message):
        ours(**given)


@pytest.mark.parametrize("pipes", ["flux_schnell"], indirect=True)
def test_true_guidance_is_refused(pipes) -> None:
    _, ours, call = pipes
    with pytest.raises(ValueError, match="true_cfg_scale"):
        ours("a cat", "a dog", true_cfg_scale=3.0, **call)


@pytest.mark.parametrize("pipes", ["sd"], indirect=True)
def test_foreign_attention_is_refused(pipes) -> None:
    _, ours, call = pipes

    class Foreign(AttnProcessor2_0):
        pass

    before = dict(ours.unet.attn_processors)
    ours.unet.set_attn_processor(Foreign())
    try:
        with pytest.raises(ValueError, match="stock attention processors, got Foreign"):
            ours("a cat", "a dog", **call)
    finally:
        ours.unet.set_attn_processor(before)


def test_unserved_class_is_refused_before_weights_load(tmp_path_factory) -> None:
    folder = teacher_dir("dit", tmp_path_factory)
    with pytest.raises(ValueError, match=r"expected a pipeline of .* got 'DiTPipeline'"):
        DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FILE), trust_remote_code=True)


# ------------------------------------------------------------------------- cost
def flops_ratio(net: Any, inputs: Any, text: int) -> float:
    """FLOPs with a negative prompt of as many tokens / without; nothing is computed (meta)."""

    def count(tokens: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(**inputs(tokens))
        return counter.get_total_flops()

    plain = count(text)
    with nasa.negative_attention(net, text, text, 0.5):
        return count(2 * text) / plain


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


@pytest.mark.full
def test_cost_on_the_real_unet_is_about_a_percent() -> None:
    """SD 1.5 at 512 px: the paper counts +1.89% (of another network), CFG +100%."""
    with torch.device("meta"):
        net = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    ratio = flops_ratio(
        net,
        lambda n: {
            "sample": empty(1, 4, 64, 64),
            "timestep": empty(1),
            "encoder_hidden_states": empty(1, n, 768),
        },
        77,
    )
    assert 1.005 < ratio < 1.012


@pytest.mark.full
def test_cost_on_real_transformers() -> None:
    """PixArt like a UNet; joint attention pays for a second text stream and its attention."""
    with torch.device("meta"):
        pixart = PixArtTransformer2DModel(sample_size=128, caption_channels=4096)
        sd3 = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
            pos_embed_max_size=192,
        )  # fmt: skip
        flux = FluxTransformer2DModel()
    ratios = [
        flops_ratio(
            pixart,
            lambda n: {
                "hidden_states": empty(1, 4, 128, 128),
                "timestep": empty(1),
                "encoder_hidden_states": empty(1, n, 4096),
                "encoder_attention_mask": empty(1, n),
                "added_cond_kwargs": {"resolution": empty(1, 2), "aspect_ratio": empty(1, 1)},
            },
            120,
        ),
        flops_ratio(
            sd3,
            lambda n: {
                "hidden_states": empty(1, 16, 128, 128),
                "timestep": empty(1),
                "encoder_hidden_states": empty(1, n, 4096),
                "pooled_projections": empty(1, 2048),
            },
            333,
        ),
        flops_ratio(
            flux,
            lambda n: {
                "hidden_states": empty(1, 4096, 64),
                "timestep": empty(1),
                "encoder_hidden_states": empty(1, n, 4096),
                "pooled_projections": empty(1, 768),
                "txt_ids": empty(n, 3),
                "img_ids": empty(4096, 3),
            },
            512,
        ),
    ]
    assert ratios[0] < 1.02
    assert ratios[1] < 1.4
    assert ratios[2] < 1.3
