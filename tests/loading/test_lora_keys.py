"""Every key of a LoRA file counts: it is merged to the value it says, or the file is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.runs import teacher_dir
from torch import Tensor

from stepdistill.families.registry import load_family
from stepdistill.loading.original_layout import original_layout
from stepdistill.loading.source import ModelSource
from stepdistill.loading.traced import origin, traced, used

State = dict[str, Tensor]
RANK, ALPHA = 2, 3.0


def pair(net: Any, module: str, stem: str, sides: tuple[str, str], seed: int = 0) -> State:
    """Random factors of a linear module of `net` under a stem of keys."""
    rows, columns = net.get_submodule(module).weight.shape
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(s, generator=generator) for s in ((RANK, columns), (rows, RANK)))
    return {f"{stem}{sides[0]}.weight": down, f"{stem}{sides[1]}.weight": up}


KOHYA, PEFT = (".lora_down", ".lora_up"), (".lora_A", ".lora_B")
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UNET_STEM = f"lora_unet_{ATTENTION.replace('.', '_')}"
TE_MODULE = "encoder.layers.0.self_attn.q_proj"
TE_STEM = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def kohya(pipe: Any) -> State:
    return {
        **pair(pipe.unet, ATTENTION, UNET_STEM, KOHYA),
        f"{UNET_STEM}.alpha": torch.tensor(ALPHA),
    }


def diffusers(pipe: Any) -> State:
    return pair(pipe.unet, ATTENTION, f"unet.{ATTENTION}", PEFT)


def other_rank(pipe: Any) -> State:
    """Two more modules, of twice the rank and other alphas, so that ALPHA is no common one."""
    state: State = {}
    for side in "kv":
        stem = f"{UNET_STEM[:-1]}{side}"
        more = pair(pipe.unet, f"{ATTENTION[:-1]}{side}", stem, KOHYA, 1)
        more = {k: torch.cat([v, v], dim=0 if "down" in k else 1) for k, v in more.items()}
        state |= {**more, f"{stem}.alpha": torch.tensor(5.0)}
    return state


def text(pipe: Any) -> State:
    """All four matrices of a text encoder's attention, as kohya writes them."""
    state: State = {}
    for side in ("q_proj", "k_proj", "v_proj", "out_proj"):
        module, stem = (name.replace("q_proj", side) for name in (TE_MODULE, TE_STEM))
        state |= pair(pipe.text_encoder, module, stem, KOHYA)
    return state


def wan_cross(pipe: Any) -> State:
    """Pairs of every matrix that Diffusers' Wan converter expects in a block."""
    state: State = {}
    for place in original_layout(pipe.transformer):
        (module,) = place.parts
        if place.name.startswith("blocks."):
            state |= pair(pipe.transformer, module, f"diffusion_model.{place.name}", PEFT)
    return state


def plus(base: Callable[[Any], State], **more: Tensor) -> Callable[[Any], State]:
    return lambda pipe: {**base(pipe), **more}


def without(base: Callable[[Any], State], ending: str) -> Callable[[Any], State]:
    return lambda pipe: {k: v for k, v in base(pipe).items() if not k.endswith(ending)}


def again(base: Callable[[Any], State], old: str, new: str) -> Callable[[Any], State]:
    """The same, and once more under another name."""

    def build(pipe: Any) -> State:
        state = base(pipe)
        return {**state, **{k.replace(old, new): v.clone() + 1 for k, v in state.items()}}

    return build


V = torch.ones(4)
# family, the file, a key that the line names
REFUSED: dict[str, tuple[str, Callable[[Any], State], str]] = {
    "kohya dora": ("sd_v", plus(kohya, **{f"{UNET_STEM}.dora_scale": V}), "dora_scale"),
    "peft dora": (
        "sd_v",
        plus(diffusers, **{f"unet.{ATTENTION}.lora_magnitude_vector": V}),
        "lora_magnitude_vector",
    ),
    "dora of a transformer": (
        "wan",
        plus(wan_cross, **{"diffusion_model.blocks.0.self_attn.q.dora_scale": V}),
        "dora_scale",
    ),
    "kohya block that is not here": (
        "sd_v",
        again(kohya, "mid_block", "down_blocks_7"),
        "down_blocks_7",
    ),
    "block that is not here": (
        "sd_v",
        again(diffusers, "mid_block", "down_blocks.7"),
        "down_blocks.7",
    ),
    "wan block that is not here": ("wan", again(wan_cross, "blocks.0", "blocks.9"), "blocks.9"),
    "locon mid": ("sd_v", plus(kohya, **{f"{UNET_STEM}.lora_mid.weight": V}), "lora_mid"),
    "loha": ("sd_v", plus(kohya, **{f"{UNET_STEM}.hada_w1_a": V}), "hada_w1_a"),
    "lokr": ("sd_v", plus(kohya, **{f"{UNET_STEM}.lokr_w1": V}), "lokr_w1"),
    "full diff": ("sd_v", plus(kohya, **{f"{UNET_STEM}.diff": V}), "diff"),
    "alpha alone": ("sd_v", plus(kohya, **{f"{UNET_STEM}x.alpha": torch.tensor(1.0)}), "x.alpha"),
    "half a pair": ("sd_v", without(diffusers, "lora_B.weight"), "lora_A"),
    "text block that is not here": (
        "sd_v",
        lambda pipe: {
            **kohya(pipe),
            **{k.replace("layers_0", "layers_70"): v for k, v in text(pipe).items()},
        },
        "all its keys for one part (denoiser or a text encoder) name no module",
    ),
    "a text encoder's q_proj alone": (
        "sd_v",
        lambda pipe: {**kohya(pipe), **pair(pipe.text_encoder, TE_MODULE, TE_STEM, KOHYA)},
        "infer state dict type",  # Diffusers' own words
    ),
    "wan diff_m": (
        "wan",
        plus(wan_cross, **{"diffusion_model.blocks.0.diff_m": V}),
        "diff_m",
    ),
    "wan norm diff": (
        "wan",
        plus(wan_cross, **{"diffusion_model.blocks.0.self_attn.norm_q.diff": V}),
        "norm_q.diff",
    ),
    "wan k_img of an image-to-video file": (
        "wan",
        lambda pipe: {
            **wan_cross(pipe),
            **{
                k.replace("cross_attn.k", f"cross_attn.{side}_img"): v
                for side in ("k", "v")
                for k, v in wan_cross(pipe).items()
                if "cross_attn.k." in k
            },
        },
        "k_img",
    ),
}


@pytest.fixture
def loaded(tmp_path, tmp_path_factory) -> Callable[[str, Callable[[Any], State]], tuple[Any, Any]]:
    """The stock pipeline, and that with the file merged in at scale 0.5."""

    def load(name: str, build: Callable[[Any], State]) -> tuple[Any, Any]:
        folder = teacher_dir(name, tmp_path_factory)
        plain = load_family(folder).pipeline
        save_file({k: v.contiguous() for k, v in build(plain).items()}, tmp_path / "x.safetensors")
        source = ModelSource(str(folder), teacher_lora=(f"{tmp_path / 'x.safetensors'}:0.5",))
        return plain, load_family(source).pipeline

    return load


@pytest.mark.sampled(
    "peft dora",
    "dora of a transformer",
    "kohya block that is not here",
    "locon mid",
    "lokr",
    "alpha alone",
    "half a pair",
    "text block that is not here",
    "wan norm diff",
)
@pytest.mark.parametrize("name", REFUSED)
def test_keys_left_over_are_refused(name, loaded) -> None:
    family, build, key = REFUSED[name]
    with pytest.raises(ValueError, match="teacher_lora: expected a LoRA of") as refused:
        loaded(family, build)
    assert key in str(refused.value), refused.value
    assert "\n" not in str(refused.value)


def delta(state: State, stem: str, sides: tuple[str, str], alpha: float = RANK) -> Tensor:
    down, up = (state[f"{stem}{side}.weight"] for side in sides)
    return 0.5 * alpha / RANK * up @ down


# family, the file, part, module, its stem in the file, alpha
TAKEN: dict[str, tuple[str, Callable[[Any], State], str, str, str, tuple[str, str], float]] = {
    "kohya with alpha": ("sd_v", kohya, "unet", ATTENTION, UNET_STEM, KOHYA, ALPHA),
    "diffusers": ("sd_v", diffusers, "unet", ATTENTION, f"unet.{ATTENTION}", PEFT, RANK),
    "alphas and ranks of each module": (
        "sd_v",
        lambda pipe: {**kohya(pipe), **other_rank(pipe)},
        "unet",
        ATTENTION,
        UNET_STEM,
        KOHYA,
        ALPHA,
    ),
    "a text encoder beside it": (
        "sd_v",
        lambda pipe: {**kohya(pipe), **text(pipe)},
        "text_encoder",
        TE_MODULE,
        TE_STEM,
        KOHYA,
        RANK,
    ),
    "wan": (
        "wan",
        wan_cross,
        "transformer",
        "blocks.0.attn2.to_k",
        "diffusion_model.blocks.0.cross_attn.k",
        PEFT,
        RANK,
    ),
    "wan with norms that change nothing": (
        "wan",
        plus(wan_cross, **{"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(4)}),
        "transformer",
        "blocks.0.attn1.to_q",
        "diffusion_model.blocks.0.self_attn.q",
        PEFT,
        RANK,
    ),
}


@pytest.mark.sampled("kohya with alpha", "alphas and ranks of each module", "wan")
@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_has_the_value_that_the_file_says(name, loaded) -> None:
    family, build, part, module, stem, sides, alpha = TAKEN[name]
    plain, merged = loaded(family, build)
    change = delta(build(plain), stem, sides, alpha)
    before, after = (
        getattr(pipe, part).get_submodule(module).weight.detach() for pipe in (plain, merged)
    )
    torch.testing.assert_close(after - before, change, rtol=1e-4, atol=1e-5)
    assert float(change.abs().max()) > 0.01


@pytest.mark.parametrize("key", ["lora_A.weight", "lora_magnitude_vector", "extra"])
def test_a_peft_folder_s_keys_count_too(key, tmp_path, tmp_path_factory) -> None:
    folder, peft = teacher_dir("pixart", tmp_path_factory), tmp_path / "peft"
    config = LoraConfig(r=2, target_modules=["to_q"])
    get_peft_model(load_family(folder).net, config).save_pretrained(peft)
    file = peft / "adapter_model.safetensors"
    odd = f"base_model.model.transformer_blocks.7.attn1.to_q.{key}"
    save_file({**load_file(file), odd: torch.ones(2, 2)}, file)
    with pytest.raises(ValueError, match=re.escape(f"{odd} would be left out")):
        load_family(ModelSource(str(folder), teacher_lora=(str(peft),)))


class TestTraced:
    """What a converter does to a tensor, and what went into its result."""

    OPERATIONS: ClassVar[dict[str, tuple[Callable[[Any, Any], Any], set[str]]]] = {
        "cut": (lambda a, b: a.chunk(2)[1], {"a"}),
        "stacked": (lambda a, b: torch.cat([a, b]), {"a", "b"}),
        "scaled": (lambda a, b: a * b.mean().item(), {"a"}),
        "moved": (lambda a, b: a.t().contiguous().to(torch.float16), {"a"}),
        "put in": (lambda a, b: _put(torch.zeros(4, 4), a), {"a"}),
        "of its shape": (lambda a, b: torch.zeros_like(a), set()),
        "neither": (lambda a, b: torch.zeros(2), set()),
    }

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_origins(self, name) -> None:
        operation, names = self.OPERATIONS[name]
        given = traced({"a": torch.ones(4, 4), "b": torch.ones(4, 4)})
        assert origin(operation(*given.values())) == names

    def test_a_number_read_is_used(self) -> None:
        given = traced({"alpha": torch.tensor(4.0), "x": torch.ones(2), "y": torch.ones(2)})
        scaled = given["x"] * (given["alpha"].item() / 2)
        assert used(given, [scaled]) == {"alpha", "x"}
        assert scaled.tolist() == [2.0, 2.0]


def _put(whole: Tensor, piece: Tensor) -> Tensor:
    whole[:2] = piece[:2]
    return whole * 2
