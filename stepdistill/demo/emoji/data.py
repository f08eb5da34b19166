"""The emoji data set, made from three npm packages as `npm pack` writes them.

- @lobehub/fluent-emoji-3d: Microsoft's Fluent emoji, 256 px (MIT)
- emoji-datasource-google: Noto emoji, 64 px (Apache 2.0, as the package's README.md says)
- emoji-datasource: emoji.json alone, names, groups and tones (MIT)

Left out: flags of countries and regions (one word each, told apart by it alone), and pairs of two
skin tones. Each picture is cut to its drawing, put on white at VARIANTS sizes and places.
"""

# V variants, N pictures

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stepdistill.storage.folders import replacing

from .captions import TONES, Entry, plain, plain_subgroup

IMAGE_PX = 64
VARIANTS = 4
PACKAGES = {
    "fluent": ("lobehub-fluent-emoji-3d-*.tgz", "package/assets/"),
    "noto": ("emoji-datasource-google-*.tgz", "package/img/google/64/"),
    "names": ("emoji-datasource-[0-9]*.tgz", "package/emoji.json"),
}
LICENCE_FILES = ("LICENSE", "README.md", "package.json")
SHIPPED = Path(__file__).with_name("teacher")  # its weights, pictures and judge
ENTRIES = "entries.jsonl"  # beside pictures, what each shows
HELD_OUT_FILE = Path(__file__).with_name("held_out.json")
LICENCES = Path(__file__).with_name("licences")  # in full: the packages name theirs alone
_LEFT_OUT = {"country-flag", "subdivision-flag", "skin-tone"}


@dataclass(frozen=True)
class Emoji:
    """Pictures (V, N, 64, 64, 3) uint8 and what they show; variant 0 is centred and unscaled."""

    pictures: NDArray[np.uint8]
    entries: Sequence[Entry]

    def weights(self, of_all: bool = False) -> Tensor:
        """(N,) how often training draws a picture: held-out ones never, the many tones and styles
        of one thing less than a picture that stands alone. Args: of_all: held-out ones too."""
        count = Counter(entry.base for entry in self.entries)
        held_out = frozenset() if of_all else held_out_keys()
        return torch.tensor(
            [(entry.key not in held_out) / count[entry.base] ** 0.5 for entry in self.entries]
        )

    def images(self, variant: int | Tensor, index: Tensor) -> Tensor:
        """(B, 3, 64, 64) float32 in [-1, 1]. Args: variant, index: of each picture."""
        pixels = torch.from_numpy(self.pictures[variant, index])
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def held_out_keys() -> frozenset[str]:
    """Keys of the pictures that no training sees; their words are seen in other combinations."""
    return frozenset(json.loads(HELD_OUT_FILE.read_text())["combinations"])


def build_data(source: Path, folder: Path, seed: int = 0) -> None:
    """Write the data set of the packages in `source` to `folder`, with their licence texts.

    Errors: FileNotFoundError for a package that is not there.
    """
    with replacing(folder) as partial:
        partial.mkdir(parents=True)
        names = json.loads(next(_read(source, "names", ".json"))[1])
        known = dict(_known(names))
        pictures, entries = [], []
        for style in ("fluent", "noto"):
            for file_name, content in _read(source, style, (".webp", ".png")):
                facts = known.get(_code(Path(file_name).stem))
                if facts is not None:
                    entries.append(Entry(**facts, style=style))
                    draw = random.Random(f"{seed} {entries[-1].key}")
                    pictures.append(_variants(content, draw))
        order = sorted(range(len(entries)), key=lambda k: entries[k].key)
        np.save(partial / "pictures.npy", np.stack([pictures[k] for k in order], axis=1))
        lines = [json.dumps(asdict(entries[k])) for k in order]
        (partial / ENTRIES).write_text("\n".join(lines) + "\n")
        for package in PACKAGES:
            for file_name, content in _read(source, package, LICENCE_FILES, licences=True):
                target = partial / "licences" / f"{package}-{Path(file_name).name}"
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(content)


def load_data(folder: Path) -> Emoji:
    """The data set that `build_data` wrote; pictures stay on the disk until they are read."""
    pictures = np.load(folder / "pictures.npy", mmap_mode="r")
    return Emoji(pictures, read_entries((folder / ENTRIES).read_text()))


def read_entries(text: str) -> list[Entry]:
    """Entries of a text with one in a line."""
    return [Entry(**json.loads(line)) for line in text.splitlines()]


def _read(
    source: Path, package: str, ends: str | tuple[str, ...], licences: bool = False
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a package's files whose names end so."""
    pattern, prefix = PACKAGES[package]
    archives = sorted(source.glob(pattern))
    if not archives:
        raise FileNotFoundError(
            f"{source}: expected the package {pattern}, got none. Get it there with `npm pack`: "
            "@lobehub/fluent-emoji-3d, emoji-datasource-google and emoji-datasource."
        )
    with tarfile.open(archives[-1]) as archive:
        for member in archive:
            inside = member.name.count("/") == 1 if licences else member.name.startswith(prefix)
            if member.isfile() and inside and member.name.endswith(ends):
                handle = archive.extractfile(member)
                assert handle is not None
                yield member.name, handle.read()


def _code(code: str) -> str:
    """Code points in one spelling: lower case, without the mark that asks for a coloured glyph."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _known(names: list[dict]) -> Iterator[tuple[str, dict]]:  # type: ignore[type-arg]
    """(code points, fields of Entry but style) of every emoji and each of its single tones."""
    for one in names:
        if one["subcategory"] in _LEFT_OUT:
            continue
        facts = {
            "base": _code(one["unified"]),
            "name": plain(one["name"]),
            "group": plain(one["category"]),
            "subgroup": plain_subgroup(one["subcategory"]),
        }
        yield facts["base"], {**facts, "tone": None}
        for code, variation in one.get("skin_variations", {}).items():
            if code.lower() in TONES:
                yield _code(variation["unified"]), {**facts, "tone": TONES[code.lower()]}


def _variants(content: bytes, draw: random.Random) -> NDArray[np.uint8]:
    """(V, 64, 64, 3): the drawing on white; at 60 px in the middle, then a bit smaller or larger
    and moved."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    made = []
    for variant in range(VARIANTS):
        longest = 60 if variant == 0 else draw.randint(54, IMAGE_PX)
        share = longest / max(flat.size)
        size = [max(1, round(share * length)) for length in flat.size]
        room = [IMAGE_PX - length for length in size]
        shift = [0, 0] if variant == 0 else [draw.randint(-3, 3), draw.randint(-3, 3)]
        left, top = (min(max(r // 2 + s, 0), r) for r, s in zip(room, shift, strict=True))
        canvas = Image.new("RGB", (IMAGE_PX, IMAGE_PX), "white")
        canvas.paste(flat.resize(size, Image.Resampling.LANCZOS), (left, top))
        made.append(np.asarray(canvas))
    return np.stack(made)
