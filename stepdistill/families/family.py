"""Family: the adapter between one kind of stock Diffusers pipeline and every method.

A family turns prompts into a Cond and images into latents with the pipeline's own code, and calls
the pipeline's own denoiser. It knows nothing of methods, adapters or precision.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), N tokens, D width.

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import diffusers
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from stepdistill.core.denoiser import linear_guidance
from stepdistill.core.method import Setting
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.types import Cond
from stepdistill.families.end_input import with_end_input
from stepdistill.families.features import FeatureBlock
from stepdistill.families.schedule import dynamic_shift, own_sampler, read_schedule
from stepdistill.families.vae import decode_latents, encode_images, latent_size
from stepdistill.loading.original_layout import has_layout

Draw = Literal["noise", "images", "unread"]
# Attention and feed-forward projections, the usual reach of a distillation LoRA on transformers.
TRANSFORMER_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
# LCM-LoRA's list for UNets (arXiv:2311.05556, released training script's defaults).
UNET_LORA_TARGETS = (
    *TRANSFORMER_LORA_TARGETS,
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)


def net_dtype(net: nn.Module) -> torch.dtype:
    """The dtype a denoiser computes in: that of its first weight (adapters come after theirs)."""
    return next(p.dtype for p in net.parameters() if p.is_floating_point())


def check_prompts(prompts: Sequence[Any]) -> list[str]:
    """The prompts as a list. Errors: TypeError where one is no string."""
    wrong = [p for p in prompts if not isinstance(p, str)]
    if isinstance(prompts, str) or wrong:
        got = prompts if isinstance(prompts, str) else wrong[0]
        raise TypeError(
            f"encode: expected a list of strings, got {got!r} ({type(got).__name__}). "
            "Pass [prompt, ...]."
        )
    return list(prompts)


class Family(ABC):
    """One kind of pipeline. Subclasses are at most 140 lines and list the classes they serve.

    name: the key in FAMILIES, of its file or entry point. pipelines: names of the Diffusers
    pipeline classes. net_name: the denoiser's component name.
    tiny: a small pipeline with random weights: component -> configuration with its _class_name, or
        a kind of text encoder (see testing/assembled.py); or "module:function" that makes it.
    variants: name of a further one -> what is laid over that, or the function's arguments.
    typed: what the stock call of a few-step student must be told all the same: no config says it.
    dynamic_shift: whether the stock call tells its scheduler a shift by the size.
    reads: of "image" (to edit, to begin a video with, to refer to), "mask" and "control".
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    net_name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]] = TRANSFORMER_LORA_TARGETS
    conditioning: Literal["prompt", "label", "none"] = "prompt"
    one_prompt: ClassVar[bool] = False  # whether the stock call takes one prompt at a time
    has_null: bool = True  # whether there is an empty condition to guide away from
    supports_w: ClassVar[bool] = False  # whether a stock denoiser can have a guidance embedding
    supports_s: ClassVar[bool] = True  # whether a copy can be told where its jump ends (end_input)
    causal: ClassVar[bool] = False  # whether a copy can be made causal by chunks of frames
    forward_mode: ClassVar[bool] = True  # whether its denoiser can be differentiated forward (JVP)
    one_size: ClassVar[bool] = False  # whether network or condition know one image size alone
    scales_input: ClassVar[bool] = False  # whether the stock loop needs scheduler.scale_model_input
    # Shift of the linspace(1, 1/N, N) that the stock call hands its scheduler; 0 where it does not.
    sends_sigmas: ClassVar[float] = 0.0
    packed_noise: ClassVar[bool] = False  # whether the stock call draws it in the layout of `pack`
    grid_argument: ClassVar[str] = "sigmas"  # by which a call can be given flow times
    reads: ClassVar[Mapping[str, bool]] = {}  # images beside x_t -> whether it needs them
    image_keys: ClassVar[tuple[str, ...]] = ()  # where its Cond holds those: kept by a null
    # What the stock call draws, in order: also numbers for those; or a latent that nobody reads.
    call_draws: ClassVar[tuple[Draw, ...]] = ("noise",)
    # What the stock call's result holds.
    output: ClassVar[Literal["images", "frames", "audios"]] = "images"
    tiny: ClassVar[str | Mapping[str, Any]] = ""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    typed: ClassVar[tuple[str, ...]] = ("num_inference_steps", "guidance_scale")
    dynamic_shift: ClassVar[bool] = False
    one_step_x0: ClassVar[tuple[str, ...]] = ()  # classes that read a single step's result as x0
    short_pipelines: ClassVar[tuple[str, ...]] = ()  # stock classes of few-step defaults
    unquantized: Callable[[], nn.Module] | None = None  # loads what a quantised base was made from
    drawn_from: torch.Generator | None = None  # that of `call_draws` for images; else by content
    owned: tuple[float, float] = (0.0, 1.0)  # (lowest, highest) time that its denoiser is meant for

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A family derived from another has tiny pipelines of its own."""
        super().__init_subclass__(**kwargs)
        for fact in ("tiny", "variants"):
            if fact not in vars(cls):
                setattr(cls, fact, vars(Family)[fact])

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.path, self.kind, self._fixed_shift = read_schedule(pipeline.scheduler)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                part.eval()  # train mode would drop class labels (DiT) and activations at random
                if name not in self.net_parts:
                    part.requires_grad_(False)

    # ------------------------------------------------------------ the network
    @property
    def net(self) -> nn.Module:
        """The stock denoiser module; where experts share the times, all of them in one."""
        net: nn.Module = getattr(self.pipeline, self.net_name)
        return net

    @property
    def expert(self) -> Literal["both", "high", "low"]:
        """Which of two denoisers was loaded, by the times that it owns."""
        if self.owned == (0.0, 1.0):
            return "both"
        return "high" if self.owned[1] == 1.0 else "low"

    @property
    def first_net(self) -> Any:
        """The stock denoiser, or one of several, which are alike."""
        return next(iter(self.parts_of(self.net).values()))

    def net_of(self, nets: Sequence[Any]) -> Any:
        """`parts_of` undone: such a network of its parts."""
        (net,) = nets
        return net

    @property
    def net_parts(self) -> tuple[str, ...]:
        """The pipeline's components that make up `net`."""
        return tuple(self.parts_of(self.net))

    def parts_of(self, net: nn.Module) -> dict[str, Any]:
        """A network such as `net` as components of the pipeline, all of one stock class."""
        return {self.net_name: net}

    @classmethod
    def nets_in(cls, index: Mapping[str, Any]) -> tuple[str, ...]:
        """The components that are denoisers in a pipeline with that model_index.json.

        Errors: ValueError where its entries do not go together.
        """
        return (cls.net_name,)

    @property
    def config(self) -> Any:
        """The stock denoiser's configuration."""
        return self.config_of(self.net)

    @staticmethod
    def config_of(net: nn.Module) -> Any:
        """The Diffusers configuration of a denoiser; a role may have one of its own."""
        return net.config

    @classmethod
    def input_channels(cls, vae: Mapping[str, Any]) -> int | None:
        """The denoiser's in_channels beside an autoencoder of that configuration; None where other
        things decide them too."""
        return None

    @classmethod
    def conditioning_in(cls, config: Any) -> Literal["prompt", "label", "none"]:
        """The conditioning of a model whose denoiser has that configuration."""
        return cls.conditioning

    @classmethod
    def told_guidance_in(cls, config: Any) -> bool:
        """Whether a copy of a denoiser of that configuration can be told the guidance (w)."""
        return cls.supports_w

    @classmethod
    def needs_images(cls) -> tuple[str, ...]:
        """The images beside x_t without which there is no call."""
        return tuple(name for name, needed in cls.reads.items() if needed)

    @classmethod
    def edits_image(cls) -> bool:
        """Whether an item has an image to edit, enlarge or refer to beside what it becomes."""
        return "image" in cls.reads and not cls.from_first_frame()

    @classmethod
    def from_first_frame(cls) -> bool:
        """Whether it makes a video from a first frame, which an item's image then is."""
        return cls.output == "frames" and "image" in cls.reads

    @classmethod
    def has_lora_loader(cls) -> bool:
        """Whether Diffusers gives its pipeline load_lora_weights; else PEFT loads an adapter."""
        return issubclass(getattr(diffusers, cls.pipelines[0]), LoraBaseMixin)

    @property
    def lora_formats(self) -> tuple[str, ...]:
        """What a LoRA student can be exported as."""
        return ("lora", "kohya", "comfyui") if has_layout(self.first_net) else ("lora",)

    @classmethod
    def labels_in(cls, config: Any) -> int | None:
        """How many class labels a model of that configuration knows; None where it reads none."""
        return None

    @classmethod
    def frame_size_in(cls, vae: Mapping[str, Any]) -> tuple[int, int] | None:
        """(height, width) in px of first frames, by the autoencoder's configuration; None where it
        reads none."""
        return None

    @classmethod
    def null_in(cls, index: Any) -> bool:
        """Whether a pipeline with that model_index.json has an empty condition."""
        return cls.has_null

    @property
    def embeds_guidance(self) -> bool:
        """Whether the teacher itself is told the guidance (w) in place of a null pass."""
        return False

    def shift_at(
        self, height: int | None = None, width: int | None = None, num_steps: int = 50
    ) -> float:
        """Resolution shift of the stock call's times at that size (the model's own where None).

        Args: num_steps: of that call, where its shift depends on them (Flux.2's).
        """
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return self._fixed_shift * (self.sends_sigmas or 1.0)
        return dynamic_shift(config, self.image_tokens(height, width))

    def image_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """What the stock call counts for a dynamic shift at that size."""
        sides = self.sample_shape(height, width)[1:]
        return math.prod(sides) // int(self.config.get("patch_size", 1)) ** len(sides)

    @property
    def shift(self) -> float:
        """`shift_at` the model's own size."""
        return self.shift_at()

    @classmethod
    def refuse_one_step(cls, pipeline: str, as_flow: bool, num_steps: int) -> None:
        """Errors: ValueError for a velocity student that the stock call can't sample in one step.

        PixArtAlphaPipeline takes x0 from a single step's result; no flow scheduler puts it there.
        """
        if pipeline in cls.one_step_x0 and as_flow and num_steps == 1:
            raise ValueError(
                f"{cls.name}: expected two steps or more of a velocity student in {pipeline} (of a "
                "single one its call reads what no flow scheduler gives), got 1. Set "
                "method_config.setup: wrapped, or train and export at more steps (--num_steps)."
            )

    @property
    def setting(self) -> Setting:
        """The facts a method may know, at the model's own size."""
        return self.setting_at(None)

    def setting_at(self, resolution: int | None) -> Setting:
        """The same at that many px a side."""
        size, kind = (resolution, resolution), (self.path, self.sends_sigmas)
        usual = self.shift_at(*size)

        def sampler(num_steps: int, shift: float) -> SamplerSpec:
            # Of another shape's, in buckets, there is what the usual number of steps has.
            of_steps = self.shift_at(*size, num_steps) if shift == usual else shift
            return own_sampler(self.pipeline.scheduler, *kind, num_steps, of_steps)

        return Setting(self.path, self.kind, usual, sampler, self.owned)

    def copy_net(self, extra_inputs: Sequence[str] = (), net: nn.Module | None = None) -> nn.Module:
        """An independent copy of the denoiser with the extra inputs a role asks for.

        Args: net: what to copy; none means the teacher's own.
        Errors: ValueError where the stock class has no such input.
        """
        tells_end = tuple(extra_inputs) == ("s",) and self.supports_s
        if extra_inputs and not tells_end:
            raise ValueError(
                f"{self.name}: expected extra inputs the stock network has, got {extra_inputs}. "
                "Set embed_guidance: false."
            )
        twin = copy.deepcopy(self.net if net is None else net)
        return with_end_input(twin) if tells_end else twin

    def forward(
        self,
        net: nn.Module,
        x_t: Tensor,
        model_t: Tensor,
        cond: Cond,
        w: Tensor | None = None,
    ) -> Tensor:
        """The raw output (B, C, *S) of `net` at x_t (B, C, *S), told time model_t (B,).

        Errors: ValueError for w with a network that has no guidance embedding.
        """
        if not self.supports_w:
            self.refuse_w(w)
        return self.run(net, x_t, model_t, cond, w)

    @abstractmethod
    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """`forward` for the adapter to define; w is None where `supports_w` is false."""

    def from_raw(self, out: Tensor, x_t: Tensor, model_t: Tensor) -> Tensor:
        """What `forward` makes of the stock denoiser's output (B, C, *S) at x_t: here itself."""
        return out

    def guide(self, cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
        """The stock call's guided output (B, C, *S) of the two; guidance: a number or (B,)."""
        return linear_guidance(cond, null, guidance)

    def refuse_w(self, w: Tensor | None) -> None:
        """Errors: ValueError where w is given; for networks without that input."""
        if w is not None:
            raise ValueError(f"{self.name}: expected no w (no guidance embedding), got one.")

    @abstractmethod
    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """Blocks a head may read by name; "mid" is always one of them."""

    def num_calls(self, cond: Cond) -> int:
        """Calls of the network that `run` makes for that Cond."""
        return 1

    def image_features(
        self, features: dict[str, Tensor], x_t: Tensor, cond: Cond
    ) -> dict[str, Tensor]:
        """Captured features without what else a block puts out beside the image (text, padding)."""
        return features

    # -------------------------------------------------------------- the data
    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C, *S) of one latent for height x width px (the model's own size where None)."""
        config, factor = self.config, self.pipeline.vae_scale_factor
        default_size, patch = config.sample_size, config.patch_size
        sides = (latent_size(pixels, default_size, factor, patch) for pixels in (height, width))
        return (config.in_channels, *sides)

    @property
    def default_shape(self) -> tuple[int, ...]:
        """(C, *S) of one latent at the model's own size."""
        return self.sample_shape()

    @property
    def latent_px(self) -> int:
        """px to a side of one latent."""
        factor: int = self.pipeline.vae_scale_factor
        return factor

    @property
    def px_beside(self) -> int:
        """px of what is made that one of the "image" it reads stands for: here they are of one
        size."""
        return 1

    @property
    def size_multiple(self) -> int:
        """px that sides of images are multiples of: of a patch, or of the UNet's deepest level."""
        levels, patch = self.config.get("block_out_channels"), self.config.get("patch_size") or 1
        side = int(patch[-1] if isinstance(patch, list | tuple) else patch)  # of videos: (F, H, W)
        return self.latent_px * (2 ** (len(levels) - 1) if levels else side)

    def image_size(self, resolution: int | None = None) -> tuple[int, int]:
        """(height, width) in px of images of that side, or of the model's own."""
        height, width = (side * self.latent_px for side in self.default_shape[-2:])
        return (height, width) if resolution is None else (resolution, resolution)

    @abstractmethod
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """The Cond of B prompts (or labels), through the pipeline's own encoding code."""

    def null(self, bsz: int) -> Cond:
        """The Cond of B empty prompts, as the stock pipeline makes it for guidance."""
        return self.encode([""]).repeat(bsz)

    def encode_at(self, prompts: Sequence[Any], shape: Sequence[int]) -> Cond:
        """`encode` for latents of shape (C, *S), which images beside x_t may have to fit."""
        return self.encode(prompts)

    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """What of `encode` the prompts alone decide, for `with_images`."""
        return self.encode(prompts)

    def with_images(self, cond: Cond, images: Mapping[str, Tensor], shape: Sequence[int]) -> Cond:
        """The Cond of `encode_text` with images beside x_t, for latents of shape (C, *S).

        Args: images: by the names in `reads`: "image" and "control" (B, 3, H, W), or of several
            (B, K, 3, H, W), in [-1, 1]; "mask" (B, 1, H, W) in [0, 1], 1 where it is repainted.
        Errors: ValueError for others (see families.beside), TypeError where it reads none.
        """
        raise TypeError(f"{self.name}: expected no images beside the prompt, it reads none.")

    def null_for(self, cond: Cond, null: Cond | None = None) -> Cond:
        """The null counterpart of that very Cond, on its device: its images without the prompt.

        Args: null: one row of `null`, where the caller has it.
        """
        empty = (self.null(1) if null is None else null).repeat(cond.bsz)
        device = next(iter(cond.tensors.values())).device
        images = {name: cond[name] for name in self.image_keys if name in cond.tensors}
        return Cond({**empty.to(device).tensors, **images})

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (B, C, *S) of images (B, 3, H, W) in [-1, 1]."""
        return encode_images(self.pipeline.vae, images, generator)

    def images(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), or videos (B, 3, F, H, W), in [-1, 1], unclamped."""
        return decode_latents(self.pipeline.vae, latents)

    def pictures(self, images: Tensor) -> Tensor:
        """What is shown of `images`, and what metrics see: here themselves."""
        return images

    def size_text(self, resolution: int | None = None) -> str:
        """The size of what is made, in words."""
        return " x ".join(map(str, self.image_size(resolution))) + " px"

    def place_encoders(self, dtype: torch.dtype, device: torch.device) -> None:
        """Text encoders in that dtype, and all parts but the denoiser on the device."""
        for name, part in self.pipeline.components.items():
            if isinstance(part, PreTrainedModel):
                part.to(dtype)
            if isinstance(part, nn.Module) and name not in self.net_parts:
                part.to(device)

    # -------------------------------------------------------------- checking
    @property
    def call_extras(self) -> dict[str, Any]:
        """Arguments that keep the stock call at the model's own size, where its defaults do not."""
        return {}

    def call_rows(self, bsz: int, guidance: float) -> dict[str, Any]:
        """`call_extras` of a call with so many prompts that is guided by g."""
        return self.call_extras

    @property
    def length_call(self) -> dict[str, Any]:
        """The part of `call_extras` that a student's card tells: where a model states what the
        stock call can't know, or its default is not for few steps."""
        return {}

    def size_options(self, height: int, width: int) -> dict[str, Any]:
        """Arguments that make the stock call's images of that size, px."""
        return {"height": height, "width": width}

    def stock_guidance(self, guidance: float) -> float:
        """guidance_scale of the stock call for g of null + g (cond - null), or for g told."""
        return guidance

    def guided_call(self, guidance: float) -> dict[str, Any]:
        """What else the stock call must be told for a student that is still guided by g."""
        return {}

    def settle_guidance(self, pipeline: Any, guidance: float) -> bool:
        """Make a pipeline with the student in it heed no guidance_scale, as if told `guidance`.

        By what its stock call reads from a config or weight; False where it reads nothing.
        """
        return False

    def decoded(self, latents: Tensor) -> Tensor:
        """Latents after the stock loop as the stock call decodes them: here themselves."""
        return latents

    def net_for(self, net: nn.Module, scheduler: Any) -> nn.Module:
        """`net` as it answers under a stock scheduler: another where that one counts time anew."""
        return net

    def net_code(self, scheduler: Any) -> str:
        """What `net_for` does to `pipe`, as Python for a card; empty where it does nothing."""
        return ""

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (B, C, *S) in the layout that the stock call keeps them in."""
        return latents

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """(B, C, *S) of what `pack` made, or the network put out; shape: (C, *S)."""
        return packed

    @classmethod
    def images_in(cls, result: Any) -> Tensor:
        """(B, C, H, W) or (B, C, F, H, W) in [0, 1] of what a stock call returned as "pt"."""
        images: Tensor = getattr(result, cls.output)
        return images.transpose(1, 2) if cls.output == "frames" else images

    def stock_call(
        self, prompts: Sequence[Any], guidance: float, num_steps: int, generator: torch.Generator
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of the stock pipeline's own `__call__`, to compare with."""
        return self.images_in(
            self.pipeline(
                prompt=list(prompts),
                guidance_scale=self.stock_guidance(guidance),
                num_inference_steps=num_steps,
                output_type="pt",
                **{"generator": generator, **self.call_rows(len(prompts), guidance)},
            )
        )
