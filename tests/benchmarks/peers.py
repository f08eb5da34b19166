"""What an iteration costs here and in a peer's own script, on the same tiny model and batch.

    python tests/benchmarks/peers.py --output_dir runs/peers
    python tests/benchmarks/peers.py --output_dir runs/peers --peer DIFFUSERS/examples/\
consistency_distillation/train_lcm_distill_lora_sdxl.py
    python tests/benchmarks/peers.py --output_dir runs/peers --peer DMD2
    python tests/benchmarks/peers.py --output_dir runs/peers --peer FASTGEN

DIFFUSERS, DMD2 and FASTGEN are checkouts of huggingface/diffusers, tianweiy/DMD2 and
NVlabs/FastGen; the installed packages serve them, and FastGen needs attrs, einops, hydra-core and
loguru. Every run is a process of its own on one thread, stopped from outside after a few
iterations, so that ours and theirs are measured by the same hooks:

iteration / bare   time of an iteration over that of its network calls alone, which are recorded
                   (inputs, gradients, active adapters) and replayed right after it, so that drift
                   of the machine cancels. Text and images are encoded in the iteration. Times are
                   of the processor, not the clock: other programs do not count.
rows               samples that enter the denoiser in an iteration, forwards only; those of which a
                   head reads features alone leave it behind the middle block
resident           bytes of denoiser weights, their gradients at an optimiser's step, and its state
peak               of the process above what its imports took, in a run without replay

LCM-LoRA: rank 64 on a small SDXL. ctm, tcd: on a small Stable Diffusion, beside no peer. dmd2,
f_distill: likewise, one critic update, full roles as DMD2 and FastGen train them, and our shared
layout (LoRA r=64). FastGen always
recomputes activations: f_distill_full does not, f_distill_recompute does. Peers that lack a package
of no use here (wandb, lmdb, ...) get a stand-in; DMD2's images, never read without its GAN, random
ones. Prints a table of ratios and writes OUTPUT_DIR/peers.json.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import inspect
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import accelerate  # what either side imports is no part of its peak
import datasets  # noqa: F401
import numpy as np
import peft  # noqa: F401
import torch
import torchvision  # noqa: F401
import transformers  # noqa: F401
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from stepdistill.families.features import FeatureBlock, capture

RANK, STEPS, WARM_UP = 64, 8, 2
LATENT_SIZE = int(os.environ.get("PEERS_LATENT_SIZE", "16"))  # set by --latent_size
WIDTHS = (64, 128)
MIDDLE = FeatureBlock("mid_block", WIDTHS[-1], "map")
STAND_INS = (
    *("wandb", "lmdb", "imageio", "webdataset", "boto3", "botocore", "timm", "ftfy", "av", "cv2"),
    *("decord", "pynvml", "pkg_resources"),
)
STAND_IN_PARTS = (
    "wandb.util",
    "imageio.v2",
    "imageio.v3",
    "botocore.config",
    "botocore.exceptions",
)


@dataclass(frozen=True)
class Ours:
    """One of our runs. updates: optimiser steps of an iteration. recompute: of activations."""

    model: str
    updates: int
    layout: str
    method: str
    options: Mapping[str, Any]
    recompute: bool = False


_DMD = {"num_steps": 1, "critic_steps": 1, "guidance": 3.0}
_F = {**_DMD, "gan": {"weight_g": 1e-3, "source": "teacher"}}
OURS = {
    "lcm_lora": Ours(
        "sdxl", 1, "lora", "consistency",
        {"target": "self", "loss": "huber", "guidance_range": (4.0, 16.0)},
    ),
    "dmd2_full": Ours("sd", 2, "full", "dmd2", _DMD),
    "dmd2_shared": Ours("sd", 2, "lora", "dmd2", _DMD),
    "ctm_full": Ours("sd", 1, "full", "ctm", {"solver_steps": 4, "guidance_range": (3.0, 3.0)}),
    "tcd_lora": Ours("sd", 1, "lora", "tcd", {"guidance_range": (3.0, 3.0)}),
    "f_distill_full": Ours("sd", 2, "full", "f_distill", _F),
    "f_distill_recompute": Ours("sd", 2, "full", "f_distill", _F, recompute=True),
    "f_distill_shared": Ours("sd", 2, "lora", "f_distill", _F),
    "boot": Ours("sd", 1, "full", "boot", {}),
    "scott": Ours("sd", 2, "full", "scott", {}),
}  # fmt: skip
# A peer's case: updates of its iteration, and which of ours do the same work.
PEERS = {
    "lcm_lora": (1, ("lcm_lora",)),
    "dmd2": (2, ("dmd2_full", "dmd2_shared")),
    "fastgen": (3, ("f_distill_full", "f_distill_recompute", "f_distill_shared")),
}


# ------------------------------------------------------------------ model and data
def build(root: Path) -> None:
    """Two pipelines with UNets of 4 M parameters, prompts, and images with captions."""
    from stepdistill.testing.tiny import TINY

    for name in ("sd", "sdxl"):
        pipeline = TINY[name]()
        config = dict(pipeline.unet.config)
        size = {"sample_size": LATENT_SIZE, "block_out_channels": WIDTHS, "norm_num_groups": 8}
        pipeline.register_modules(unet=UNet2DConditionModel(**{**config, **size}))
        pipeline.save_pretrained(root / name)
    images = root / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(32):
        picture = rng.integers(0, 255, (2 * LATENT_SIZE, 2 * LATENT_SIZE, 3), dtype=np.uint8)
        Image.fromarray(picture).save(images / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture number {i}"}))
    (images / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (root / "prompts.txt").write_text("\n".join(f"picture number {i}" for i in range(32)) + "\n")


# ------------------------------------------------------------------ the measurement
class Enough(BaseException):
    """Ends a training script from its optimiser's hook; no `except Exception` keeps it."""


class Call:
    """One recorded denoiser call, to be run again as it was."""

    def __init__(self, net: Any, args: Any, kwargs: Any) -> None:
        self.net, self.grad = net, torch.is_grad_enabled()
        self.args, self.kwargs = _detached(args), _detached(kwargs)
        self.state = _state(net)
        self.rows = len(args[0] if args else kwargs["sample"])
        self.features_alone = False

    def run(self) -> None:
        """Forward, and backward to weights and inputs where the recorded call had a graph."""
        kept = _state(self.net)
        _restore(self.state)
        with torch.set_grad_enabled(self.grad):
            made = sum(x.square().mean() for x in self._outputs())
            if isinstance(made, Tensor) and made.requires_grad:
                made.backward()
        _restore(kept)

    def _outputs(self) -> list[Tensor]:
        """What the loss went through: the features where there are any, else the output."""
        if self.features_alone:
            with capture(self.net, {"mid": MIDDLE}, only=True) as found:
                self.net(*self.args, **self.kwargs)
            return list(found.values())
        out = self.net(*self.args, **self.kwargs)
        if isinstance(out, list):  # FastGen's: features, or the output and then its features
            return out[1] if isinstance(out[-1], list) else out
        first: Tensor = out if isinstance(out, Tensor) else out[0]
        return [first]


def _state(net: Any) -> tuple[list[Any], list[Any]]:
    """Which adapters are active, and which weights are trained."""
    layers = (m for m in net.modules() if isinstance(m, BaseTunerLayer))
    adapters = [(m, m._active_adapter, m._disable_adapters) for m in layers]
    return adapters, [(p, p.requires_grad) for p in net.parameters()]


def _restore(state: tuple[list[Any], list[Any]]) -> None:
    for layer, active, disabled in state[0]:
        layer._active_adapter, layer._disable_adapters = active, disabled
    for param, flag in state[1]:
        param.requires_grad_(flag)


def _detached(value: Any) -> Any:
    """A copy of nested call arguments; tensors with a graph become leaves that ask for one."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _detached(entry) for key, entry in value.items()}
    return type(value)(_detached(v) for v in value) if isinstance(value, list | tuple) else value


class Meter:
    """Times and sizes the iterations of whatever script runs within, until there are enough.

    updates: optimiser steps of an iteration. replay: record the network calls and run them again.
    """

    def __init__(self, updates: int, replay: bool) -> None:
        self.updates, self.replay = updates, replay
        self.calls: list[Call] = []
        self.rows: list[int] = []
        self.seconds: list[float] = []
        self.bare: list[float] = []
        self.state: dict[int, int] = {}  # of each optimiser, bytes
        self.gradients = self.weights = self.steps = 0
        self.own = 0.0  # seconds of this iteration that recording took
        self.start = time.process_time()

    @contextmanager
    def watching(self) -> Iterator[None]:
        outer = UNet2DConditionModel.__call__

        def call(net: Any, *args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            self.calls.append(Call(net, args, kwargs))
            self.own += time.process_time() - begun
            try:
                return outer(net, *args, **kwargs)
            except BaseException:
                self.calls[-1].features_alone = True
                raise

        self._plain, self._recording = outer, call
        handle = register_optimizer_step_post_hook(self._stepped)
        self._record(self.replay)
        self.start = time.process_time()
        try:
            yield
        finally:
            self._record(False)
            handle.remove()

    def _record(self, on: bool) -> None:
        UNet2DConditionModel.__call__ = (  # type: ignore[method-assign]
            self._recording if on else self._plain
        )

    def _stepped(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self.steps += 1
        if len(self.seconds) < WARM_UP:
            self._weigh(optimizer)
        if self.steps % self.updates:
            return
        self.seconds.append(time.process_time() - self.start - self.own)
        if self.replay:
            self.rows.append(sum(recorded.rows for recorded in self.calls))
            self._record(False)
            begun = time.process_time()
            for recorded in self.calls:
                recorded.run()
            self.bare.append(time.process_time() - begun)
            for recorded in self.calls:
                recorded.net.zero_grad(set_to_none=True)
            self._record(True)
        self.calls, self.own = [], 0.0
        if len(self.seconds) >= STEPS + WARM_UP:
            raise Enough
        self.start = time.process_time()

    def _weigh(self, optimizer: Any) -> None:
        nets = [x for x in gc.get_objects() if type(x) is UNet2DConditionModel]
        params = {id(p): p for net in nets for p in net.parameters()}
        params |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
        grads = sum(p.grad.nbytes for p in params.values() if p.grad is not None)
        self.gradients = max(self.gradients, grads)
        self.weights = max(self.weights, sum(p.nbytes for p in params.values()))
        values = (v for entry in optimizer.state.values() for v in entry.values())
        self.state[id(optimizer)] = sum(v.nbytes for v in values if isinstance(v, Tensor))

    def result(self, base: int) -> dict[str, Any]:
        """JSON of a run. base: peak bytes before it."""
        kept = self.seconds[WARM_UP:]
        ratios = [ours / bare for ours, bare in zip(kept, self.bare[WARM_UP:], strict=False)]
        return {
            "seconds": statistics.median(kept),
            "ratio": statistics.median(ratios) if ratios else None,
            "rows": statistics.median(self.rows) if self.rows else None,
            "weights": self.weights,
            "gradients": self.gradients,
            "optimiser": sum(self.state.values()),
            "resident": self.weights + self.gradients + sum(self.state.values()),
            "peak": peak_bytes() - base,
        }


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ------------------------------------------------------------------ what is run
def run_ours(root: Path, name: str, batch: int, where: Path) -> Callable[[], object]:
    from stepdistill import TrainConfig, Tuning
    from stepdistill.data.images import ImageFolderDataset
    from stepdistill.methods import METHODS
    from stepdistill.trainers import trainer_class

    ours = OURS[name]
    args = TrainConfig(
        output_dir=str(where),
        train_batch_size=batch,
        max_train_steps=10**6,
        cache_latents=False,  # as the peers do it
        max_cached_prompts=0,
        disable_progress_bar=True,
        gradient_checkpointing=ours.recompute,
        tuning=Tuning(student=ours.layout, fake=ours.layout, rank=RANK),  # type: ignore[arg-type]
    )
    data: Any = ImageFolderDataset(root / "images", 2 * LATENT_SIZE)
    if METHODS[ours.method].data == "prompts":
        data = (root / "prompts.txt").read_text().splitlines()
    made = trainer_class(ours.method)(
        root / ours.model, args, data, method=ours.method, method_config=dict(ours.options)
    )
    return made.train


def stand_in() -> None:
    """Something to import in place of each package that is missing and of no use here."""
    for name in STAND_INS:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            parts = [part for part in STAND_IN_PARTS if part.startswith(f"{name}.")]
            for full in (name, *parts):
                sys.modules[full] = MagicMock(__spec__=ModuleSpec(full, None), __path__=[])


def run_lcm(root: Path, peer: Path, batch: int, where: Path) -> Callable[[], object]:
    sys.argv = [
        str(peer),
        *("--pretrained_teacher_model", str(root / "sdxl"), "--output_dir", str(where)),
        *("--train_data_dir", str(root / "images"), "--caption_column", "text"),
        *("--cache_dir", str(where / "cache"), "--resolution", str(2 * LATENT_SIZE)),
        *("--train_batch_size", str(batch), "--lora_rank", str(RANK), "--loss_type", "huber"),
        *("--max_train_steps", "100000", "--checkpointing_steps", "100000", "--seed", "0"),
    ]
    return lambda: runpy.run_path(str(peer), run_name="__main__")


def run_dmd2(root: Path, peer: Path, batch: int, where: Path) -> Callable[[], object]:
    stand_in()
    known = inspect.signature(accelerate.Accelerator.__init__).parameters
    own = accelerate.Accelerator

    def accelerator(**told: Any) -> Any:
        """Without what Accelerate has dropped since (dispatch_batches, at its default there)."""
        return own(**{name: value for name, value in told.items() if name in known})

    accelerate.Accelerator = accelerator  # type: ignore[misc, assignment]
    sys.path.insert(0, str(peer))
    images = MagicMock()

    class RandomLatents(torch.utils.data.Dataset[Tensor]):
        def __init__(self, *_args: Any, **_kwargs: Any) -> None:
            pass

        def __len__(self) -> int:
            return 64

        def __getitem__(self, _index: int) -> Tensor:
            return torch.randn(4, LATENT_SIZE, LATENT_SIZE)

    images.SDImageDatasetLMDB = RandomLatents
    sys.modules["main.sd_image_dataset"] = images
    sys.argv = [
        "train_sd.py",
        *("--model_id", str(root / "sd"), "--output_path", str(where / "out")),
        *("--log_path", str(where / "log"), "--cache_dir", str(where / "cache")),
        *("--train_prompt_path", str(root / "prompts.txt"), "--wandb_name", "peer"),
        *("--batch_size", str(batch), "--latent_resolution", str(LATENT_SIZE), "--no_save"),
        *("--resolution", str(2 * LATENT_SIZE), "--initialie_generator", "--num_workers", "0"),
        *("--generator_lr", "1e-5", "--guidance_lr", "1e-5", "--real_guidance_scale", "3"),
        *("--grid_size", "1", "--wandb_iters", "100000"),
    ]

    def run() -> None:
        import main.train_sd as script  # type: ignore[import-not-found]

        trainer = script.Trainer(script.parse_args())
        trainer.step = 1  # past the iteration that draws pictures
        trainer.train()

    return run


def run_fastgen(root: Path, peer: Path, batch: int, where: Path) -> Callable[[], object]:
    """Its f-distill trainer: a critic update, then one of the student, each on a batch anew."""
    stand_in()
    os.environ.setdefault("HF_HOME", str(where))
    sys.path.insert(0, str(peer))
    from fastgen.configs.callbacks import GradClip_CALLBACK  # type: ignore[import-not-found]
    from fastgen.configs.methods import config_f_distill  # type: ignore[import-not-found]
    from fastgen.networks.discriminators import (  # type: ignore[import-not-found]
        Discriminator_SD15,
    )
    from fastgen.networks.SD15.network import (  # type: ignore[import-not-found]
        StableDiffusion15,
    )
    from fastgen.trainer import Trainer  # type: ignore[import-not-found]
    from fastgen.utils import LazyCall, instantiate  # type: ignore[import-not-found]

    def batches(batch_size: int) -> Iterator[dict[str, Any]]:
        from stepdistill.data.images import ImageFolderDataset

        images, index = ImageFolderDataset(root / "images", 2 * LATENT_SIZE), 0
        while True:
            items = [images[(index + i) % len(images)] for i in range(batch_size)]
            index += batch_size
            prompts = [item["prompt"] for item in items]
            yield {
                "real": torch.stack([item["image"] for item in items]),
                "condition": prompts,
                "neg_condition": [""] * batch_size,
            }

    local = partial(DDIMScheduler.from_pretrained, root / "sd", subfolder="scheduler")
    DDIMScheduler.from_pretrained = lambda *_args, **_kwargs: local()  # SD 1.5's, from the Hub
    config = config_f_distill.create_config()
    config.trainer.callbacks = GradClip_CALLBACK
    config.trainer.resume = False
    config.dataloader_train = LazyCall(batches)(batch_size=batch)
    model = config.model
    model.net = LazyCall(StableDiffusion15)(model_id=str(root / "sd"))
    model.device, model.input_shape = "cpu", [4, LATENT_SIZE, LATENT_SIZE]
    model.discriminator = LazyCall(Discriminator_SD15)(
        feature_indices={len(WIDTHS)},  # the middle block
        all_res=[LATENT_SIZE // 2] * (len(WIDTHS) + 1),
        in_channels=WIDTHS[-1],
    )
    model.guidance_scale, model.student_update_freq = 3.0, 2
    model.sample_t_cfg.time_dist_type = "uniform"
    model.sample_t_cfg.min_t, model.sample_t_cfg.max_t = 0.001, 0.999
    config.model_class.config = model
    made = instantiate(config.model_class)
    return lambda: Trainer(config).run(made)


RUN_PEER = {"lcm_lora": run_lcm, "dmd2": run_dmd2, "fastgen": run_fastgen}


def child(told: dict[str, Any]) -> None:
    """One measured run; prints its JSON as the last line."""
    torch.set_num_threads(1)
    root, where, batch = Path(told["root"]), Path(told["where"]), told["batch"]
    where.mkdir(parents=True, exist_ok=True)
    case = told["case"]
    if told["peer"] is None:
        updates, train = OURS[case].updates, run_ours(root, case, batch, where)
    else:
        updates, train = PEERS[case][0], RUN_PEER[case](root, Path(told["peer"]), batch, where)
    meter, base = Meter(updates, told["replay"]), told["base"]
    try:
        with meter.watching():
            train()
    except Enough:
        print(json.dumps(meter.result(base)))


def measure(told: dict[str, Any]) -> dict[str, Any]:
    """A run with replay for the ratio, and one without for the peak."""
    found: dict[str, Any] = {}
    for replay in (True, False):
        where = f"{told['where']}-{'replay' if replay else 'peak'}"
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                "--child",
                json.dumps({**told, "replay": replay, "where": where}),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            check=False,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            raise RuntimeError(f"{told['case']} of {told['peer']}:\n{done.stderr[-3000:]}")
        one = json.loads(lines[-1])
        found |= one if replay else {"peak": one["peak"], "seconds": one["seconds"]}
    return found


def peer_case(peer: Path) -> str:
    """Which of PEERS a path is. Errors: ValueError for one that is none."""
    if peer.name.startswith("train_lcm_distill_lora_sdxl") and peer.is_file():
        return "lcm_lora"
    if (peer / "main" / "train_sd.py").is_file():
        return "dmd2"
    if (peer / "fastgen" / "trainer.py").is_file():
        return "fastgen"
    raise ValueError(
        f"peer: expected Diffusers' train_lcm_distill_lora_sdxl.py, or a checkout of DMD2 or "
        f"FastGen, got {peer}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--peer", type=Path, help="a script or checkout; see above")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--only", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--latent_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1, help="medians of so many runs in turn")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child is not None:
        child({**json.loads(args.child), "base": peak_bytes()})
        return
    case = None if args.peer is None else peer_case(args.peer)
    if args.latent_size != LATENT_SIZE:
        os.environ["PEERS_LATENT_SIZE"] = str(args.latent_size)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    root = args.output_dir.resolve()
    build(root)
    names = args.only if case is None else [n for n in PEERS[case][1] if n in args.only]
    rows: list[dict[str, Any]] = []
    print("| run | batch | iteration / bare | rows | resident, MiB | peak, MiB | ours / peer: "
          "time | resident | peak |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for batch in args.batch_sizes:
        told = {"root": str(root), "batch": batch, "peer": None}
        runs = {name: {**told, "case": name} for name in names}
        if case is not None:
            runs = {f"peer {case}": {**told, "case": case, "peer": str(args.peer.resolve())}} | runs
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
        for repeat in range(args.repeats):  # in turn, so that drift of the machine meets all alike
            for name, one in runs.items():
                where = str(root / f"{name.replace(' ', '-')}-{batch}-{repeat}")
                found[name].append(measure({**one, "where": where}))
        made = {name: medians(several) for name, several in found.items()}
        theirs = None if case is None else made[f"peer {case}"]
        for name, row in made.items():
            rows.append({"run": name, "batch": batch, **row})
            print(line(rows[-1], None if row is theirs else theirs), flush=True)
    (root / "peers.json").write_text(json.dumps(rows, indent=2) + "\n")


def medians(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One measurement of several of the same run, and the seconds of each."""
    middle = {key: statistics.median(one[key] for one in several) for key in several[0]}
    return {**middle, "all_seconds": [one["seconds"] for one in several]}


def line(row: dict[str, Any], theirs: dict[str, Any] | None) -> str:
    """A row of the table."""
    mib = 2.0**20
    against = ["", "", ""]
    if theirs is not None:
        against = [f"{row[key] / theirs[key]:.2f}" for key in ("seconds", "resident", "peak")]
    cells = [row["run"], str(row["batch"]), f"{row['ratio']:.3f}", f"{row['rows']:g}"]
    cells += [f"{row['resident'] / mib:.0f}", f"{row['peak'] / mib:.0f}", *against]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
