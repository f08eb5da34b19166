"""Every family in one table: adapter against stock, exports in another environment, LoRA formats.

    python tests/benchmarks/families.py --output_dir runs/families --python OTHER/bin/python

OTHER needs diffusers and peft alone: the cards' own code is run there, from the exported pipeline
and from the LoRA, and must make the image of the in-memory sampler (8-bit levels, 0 to 255).
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from export.test_fresh_process import RUNNER, expected_image, nudge
from support.runs import METHOD_CASES, MethodCase, build_trainer

from stepdistill.export.card import image_file
from stepdistill.families.registry import FAMILIES, load_family
from stepdistill.testing.parity import check_family
from stepdistill.testing.tiny import TINY

FORMATS = ("lora", "kohya", "comfyui")

# A video is compared as a strip of its frames.
STRIP = """
def strip(frames, _path):
    import numpy
    from PIL import Image
    row = numpy.concatenate(list(frames), axis=1)
    Image.fromarray((row * 255).round().astype("uint8")).save("image.png")
"""
# Deterministic: the noise between random steps is drawn in the stock loop's own (packed) layout.
METHOD_CASES["ode"] = MethodCase("dmd2", {"num_steps": 2, "critic_steps": 1, "sampler": "ode"})


@dataclass(frozen=True)
class Line:
    """One family. error: of `stepdistill check`. pipeline, lora: worst level, or what failed."""

    family: str
    error: float
    pipeline: str
    lora: str
    formats: tuple[str, ...]
    adapter_lines: int

    def markdown(self) -> str:
        formats = ", ".join(self.formats) or "none"
        return (
            f"| `{self.family}` | {self.error:.1e} | {self.pipeline} | {self.lora} | {formats} "
            f"| {self.adapter_lines} |"
        )


def card_code(folder: Path, extras: dict[str, Any]) -> str:
    """The card's code with a seed set last (PEFT draws numbers too) and the tiny model's size."""
    card = (folder / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    told = {name: value for name, value in extras.items() if name != "image"}
    code = code.replace("num_inference_steps=", f"**{told!r}, num_inference_steps=")
    code = code.replace("export_to_video(", "strip(")
    seeded = re.sub(r"^(.*\bpipe\()", r"torch.manual_seed(0)\n\1", code, flags=re.MULTILINE)
    return "import torch\n" + STRIP + seeded


def run_elsewhere(python: str, folders: Sequence[Path], where: Path, extras: Any) -> str:
    """Run the cards' code of these folders with another interpreter; returns its messages."""
    codes = {folder.name: card_code(folder, extras) for folder in folders}
    done = subprocess.run(
        [python, "-c", RUNNER, json.dumps(codes)],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr


def apart(made: Path, ours: Image.Image) -> str:
    """The largest difference of two images in 8-bit levels; "failed" where there is none."""
    if not made.is_file():
        return "failed"
    pictures = [np.asarray(x.convert("RGB")).astype(int) for x in (Image.open(made), ours)]
    return str(int(np.abs(pictures[0] - pictures[1]).max()))


def line_of(name: str, out: Path, python: str) -> Line:
    """Build, check, train two steps, export and reload one family."""
    root = out / name
    teacher = root / "teacher"
    TINY[name]().save_pretrained(teacher)
    family = load_family(teacher)
    error = max(value for _, value in check_family(family))
    case = "dmd2" if name == "edm" else "ode"  # a CM scheduler has no deterministic steps
    trainer: Any = build_trainer(case, teacher, "lora", root / "run", alpha=3.0)
    trainer.train()
    nudge(trainer)
    ours = expected_image(trainer, trainer.method.sampler())
    folders, formats = [trainer.export(root / "pipeline")], []
    for form in FORMATS:
        try:
            made = trainer.export(root / form, format=form, dtype="float32")
        except ValueError as err:
            print(f"{name}, {form}: {err}", file=sys.stderr)
            continue
        formats.append(form)
        folders += [made] if form == "lora" else []
    extras = trainer.family.call_extras
    if "image" in extras:
        extras["image"].save(root / image_file(trainer.family.output))
    said = run_elsewhere(python, folders, root, extras)
    results = {folder.name: apart(root / f"{folder.name}.png", ours) for folder in folders}
    if "failed" in results.values():
        print(f"{name}: {said[-1500:]}", file=sys.stderr)
    source = inspect.getsourcefile(FAMILIES[name]) if name in FAMILIES else None
    lines = len(Path(source).read_text().splitlines()) if source else 0
    return Line(
        name, error, results["pipeline"], results.get("lora", "none"), tuple(formats), lines
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--python", default=sys.executable, help="of the other environment")
    parser.add_argument("--only", nargs="+", default=list(FAMILIES))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| family | check | pipeline reloaded | LoRA reloaded | LoRA formats | adapter lines |")
    print("|---|---|---|---|---|---|")
    for name in args.only:
        try:
            print(line_of(name, args.output_dir, args.python).markdown(), flush=True)
        except Exception:
            print(f"| `{name}` | failed |", flush=True)
            traceback.print_exc()


if __name__ == "__main__":
    main()
