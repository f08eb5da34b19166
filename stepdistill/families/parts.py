"""What a family knows of its pipeline without calling it: facts of the classes, what configurations
say before a weight is loaded, and the parts of a loaded one.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import diffusers
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import nn

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


class Parts(ABC):
    """The facts that subclasses of `Family` state.

    name: the key in FAMILIES, of its file or entry point. pipelines: names of the Diffusers
    pipeline classes. net_name: the denoiser's component name.
    tiny: a small pipeline with random weights: component -> configuration with its _class_name, or
        a kind of text encoder (see testing/assembled.py); or "module:function" that makes it.
    variants: name of a further one -> what is laid over that, or the function's arguments.
    typed: what the stock call of a few-step student must be told all the same: no config says it.
    dynamic_shift: whether the stock call tells its scheduler a shift by the size.
    settings_of: the family whose model files and recipes suit it; its own where empty.
    reads: of "image" (to edit, to begin a video with, to refer to), "mask" and "control".
    side_nets: frozen networks that run in every call of the denoiser, one copy for all roles: the
        component's name -> its class. shared_config: keys of the denoiser's configuration that
        these share, so that a student of another size keeps them.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    net_name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]] = TRANSFORMER_LORA_TARGETS
    conditioning: Literal["prompt", "label", "none"] = "prompt"
    settings_of: ClassVar[str] = ""
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
    image_argument: ClassVar[str] = "image"  # by which the stock call is given them
    side_nets: ClassVar[Mapping[str, str]] = {}
    shared_config: ClassVar[tuple[str, ...]] = ()
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
    pipeline: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A family derived from another has tiny pipelines of its own."""
        super().__init_subclass__(**kwargs)
        for fact in ("tiny", "variants"):
            if fact not in vars(cls):
                setattr(cls, fact, vars(Parts)[fact])

    # ------------------------------------------------- what configurations say
    @classmethod
    def nets_in(cls, index: Mapping[str, Any]) -> tuple[str, ...]:
        """The components that are denoisers in a pipeline with that model_index.json.

        Errors: ValueError where its entries do not go together.
        """
        return (cls.net_name,)

    @staticmethod
    def check_side_class(name: str, got: Any, expected: str, where: str) -> None:
        """Errors: ValueError where one of `side_nets` is of another class."""
        if got != expected:
            raise ValueError(
                f"{where}: expected {name} to be one {expected}, got {got}. Of several networks "
                "beside a denoiser, or other kinds, none is served: save the pipeline with one."
            )

    @classmethod
    def check_configs(cls, configs: Mapping[str, Mapping[str, Any]], where: str) -> None:
        """Whether the `side_nets` go with the denoiser, by `shared_config`, and the autoencoder.

        Args: configs: of all these, by component. where: begins the message.
        Errors: ValueError where they do not.
        """
        net = configs[cls.net_name]
        for name in cls.side_nets:
            for key in cls.shared_config:
                values = [config.get(key) for config in (net, configs[name])]
                expected, got = (list(v) if isinstance(v, list | tuple) else v for v in values)
                if None not in (expected, got) and expected != got:
                    raise ValueError(
                        f"{where}/{name}: expected a network of the {cls.net_name} beside it, with "
                        f"{key} {expected}, got {got}. Use one that was trained for this base."
                    )

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

    # ------------------------------------------------------ of a loaded pipeline
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

    @property
    def side_parts(self) -> dict[str, nn.Module]:
        """The loaded `side_nets`."""
        return {name: getattr(self.pipeline, name) for name in self.side_nets}

    @property
    def config(self) -> Any:
        """The stock denoiser's configuration."""
        return self.config_of(self.net)

    @staticmethod
    def config_of(net: nn.Module) -> Any:
        """The Diffusers configuration of a denoiser; a role may have one of its own."""
        return net.config

    @property
    def lora_formats(self) -> tuple[str, ...]:
        """What a LoRA student can be exported as."""
        return ("lora", "kohya", "comfyui") if has_layout(self.first_net) else ("lora",)
