"""A small feature network made from a user's own images, where no published one is at hand.

SimCLR: two views of each image are to be told from all other images of a batch by the normalised
temperature-scaled cross entropy (NT-Xent). No captions are read.
Sources: Chen et al. 2020, arXiv:2002.05709, Eq. 1; that Frechet distances in self-supervised
features rank generators at least as well: Morozov et al. 2021 (ICLR), On Self-Supervised Image
Representations for GAN Evaluation.
Differs from the paper: five convolutions without normalisation; views are crops that are not
resized, brighter or darker, of more or less contrast. No flips (of letters), no blur, no change of
colour: a network that is taught to overlook a fault can't measure it.
"""

# B batch, N images, D feature width, S side in px

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.core.context import stable_seed
from stepdistill.core.stopping import stop_if_orphaned
from stepdistill.loading.safe_files import read_tensors
from stepdistill.rewards.vision import KIND, ConvFeatures, read_learned
from stepdistill.storage.files import locked, read_json, sha256_of
from stepdistill.storage.folders import fault_of, write_folder
from stepdistill.storage.optimizers import load_optimizer_tensors, optimizer_tensors

from .images import Frame, clean_resize, image_files, middle, open_image, to_tensor
from .store import network_sha256, settings_hash

LARGEST_PX = 64  # a side by default: what is finer is left to published networks
LEAST_IMAGES = 16
TEMPERATURE = 0.2
LEAST_CROP = 0.6  # of a side
SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class FeatureSettings:
    """What decides a network beside its images. size_px: that they are brought to; None: theirs, at
    most LARGEST_PX. width: channels of the first convolutions; there are 6 times as many features.
    """

    size_px: int | None = None
    width: int = 16
    max_train_steps: int = 400
    train_batch_size: int = 128
    learning_rate: float = 2e-3
    seed: int = 0


class LearnedFeatures:
    """Such a network from its folder, as a feature network of `stepdistill evaluate`.

    Errors: ValueError for a folder without its files, or with weights of another network.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.net, config = read_learned(folder)
        self.name, self.config = Path(folder).resolve().name, config
        self.device = torch.device(device)
        self.net.to(self.device).eval().requires_grad_(False)
        self.facts = {
            "weights": network_sha256(self.net),
            "preprocess": f"middle square, {config['size_px']} px, Pillow bicubic",
            "made_of": str(config["data"]),
        }

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) standardised; see FeatureNet."""
        side = min(images.shape[-2:])
        square = images[..., middle(images.shape[-2], side), middle(images.shape[-1], side)]
        resized = clean_resize(square, int(self.config["size_px"])).expand(-1, 3, -1, -1)
        return (resized - float(self.config["mean"])) / float(self.config["std"])

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.net(pixels.to(self.device))
        return features.float()


def enough_images(folder: str | Path) -> Sequence[Path]:
    """Errors: ValueError for fewer than LEAST_IMAGES below the folder."""
    files = image_files(folder, "train_data_dir")
    if len(files) < LEAST_IMAGES:
        raise ValueError(
            f"train_data_dir: expected {LEAST_IMAGES} images or more, got {len(files)} in "
            f"{str(folder)!r}. A network of so few knows no kind."
        )
    return files


def train_features(
    folder: str | Path,
    out: str | Path,
    settings: FeatureSettings = FeatureSettings(),
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """A network of the images below `folder`, in a folder of `out` named by the hash of images and
    settings: an equal call finds it there, one that was cut off goes on.

    Args: tell: called with each step and its loss.
    Errors: ValueError for fewer than LEAST_IMAGES, or files that are no images.
    """
    files = enough_images(folder)
    side = settings.size_px or min(LARGEST_PX, min(open_image(files[0], "train_data_dir").size))
    digest = sha256_of(*files)
    facts = {**asdict(settings), "size_px": side, "data": {"images": len(files), "sha256": digest}}
    target = Path(out) / f"{Path(folder).resolve().name}-{settings_hash(facts)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if fault_of(target) is None:
            return target
        images = _read(files, side)
        mean, std = float(images.mean()), max(float(images.std()), 1e-3)
        part = target.with_name(target.name + ".part")
        net = _train((images - mean) / std, side, settings, part, tell)
        config = {"model_type": KIND, **facts, "mean": mean, "std": std}
        config["data"] = f"{len(files)} images, sha256 {digest[:16]}"
        write_folder(target, {"model": net.state_dict()}, {"config": config})
        shutil.rmtree(part, ignore_errors=True)
    return target


def _read(files: Sequence[Path], side: int) -> Tensor:
    """(N, 3, S, S) in [0, 1]: middle squares."""
    rows = []
    for file in files:
        image = open_image(file, "train_data_dir")
        square = to_tensor([Frame(crop_px=min(image.size))(image)])
        rows.append(clean_resize(square, side).expand(-1, 3, -1, -1))
    return torch.cat(rows)


def _train(
    images: Tensor, side: int, settings: FeatureSettings, part: Path, tell: Callable[..., None]
) -> nn.Module:
    """The network after all steps, whose draws are keyed by their number. Args: part: a folder for
    what a call that is cut off leaves to the next."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = ConvFeatures(side, settings.width)
        head = nn.Sequential(nn.Linear(6 * settings.width, 64), nn.ReLU(), nn.Linear(64, 64))
    both = nn.ModuleDict({"net": net, "head": head})
    optimizer = torch.optim.AdamW(both.parameters(), weight_decay=1e-4)
    begin = _resumed(both, optimizer, part)
    saved, total = time.monotonic(), settings.max_train_steps
    for step in range(begin, total):
        stop_if_orphaned()
        generator = torch.Generator().manual_seed(stable_seed("features", settings.seed, step))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
        batch = images[
            torch.randperm(len(images), generator=generator)[: settings.train_batch_size]
        ]
        loss = nt_xent(*(head(net(view(batch, generator))) for _ in range(2)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tell(step + 1, float(loss.detach()))
        if time.monotonic() - saved > SAVE_SECONDS:
            _save(both, optimizer, part, step + 1)
            saved = time.monotonic()
    return net


def nt_xent(first: Tensor, second: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Mean over 2B embeddings (B, D) of the cross entropy of each one's other view among all.

    Source: arXiv:2002.05709, Eq. 1.
    """
    rows = F.normalize(torch.cat([first, second]))
    scores = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(scores, torch.arange(len(rows)).roll(len(first)))


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """A crop of each image (B, 3, S, S), all of one size, with changed brightness and contrast."""
    count, side = len(images), images.shape[-1]
    least = max(1, round(LEAST_CROP * side))
    crop = int(torch.randint(least, side + 1, (1,), generator=generator))
    corner = torch.randint(side - crop + 1, (2, count, 1), generator=generator)
    rows, columns = corner + torch.arange(crop)  # (B, crop) each
    cropped = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None]]
    shift, scale = torch.rand(2, count, 1, 1, 1, generator=generator) * 0.4 - 0.2
    return cropped.movedim(-1, 1) * (1 + scale) + shift


def _save(both: nn.Module, optimizer: torch.optim.Optimizer, part: Path, step: int) -> None:
    tensors = {"model": both.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    write_folder(part, tensors, {"state": {"step": step}})


def _resumed(both: nn.Module, optimizer: torch.optim.Optimizer, part: Path) -> int:
    """The step to go on at, with what `_save` wrote loaded; 0 where there is nothing whole."""
    if fault_of(part) is not None:
        return 0
    both.load_state_dict(read_tensors(part / "model.safetensors"))
    load_optimizer_tensors(optimizer, read_tensors(part / "optimizer.safetensors"))
    return int(read_json(part / "state.json", ("step",))["step"])
