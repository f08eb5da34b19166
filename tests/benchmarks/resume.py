"""Exact resume in one table: every method, and every family, cut off at a random update.

    python tests/benchmarks/resume.py --output_dir runs/resume

Four steps; the run ends before a random optimiser update, also in the middle of a step. A new
trainer goes on from the newest checkpoint. Compared bit for bit with the run that was never
interrupted: weights of all roles (EMA and heads too), optimiser, the method's buffers, every log
line. Odd rows load data in a worker process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.resume import resumed_differs
from support.runs import METHOD_CASES

from stepdistill.models.tiny import TINY

# All methods on a UNet and on a transformer, all families under a score and a regression method.
METHOD_FAMILIES = (("sd", "lora"), ("sd3", "full"))
FAMILY_CASES = (("dmd2", "lora"), ("lcm", "lora"))


def rows() -> Iterator[tuple[str, str, str]]:
    """(case, family, layout) of each row."""
    seen = set()
    for family, layout in METHOD_FAMILIES:
        other = {"lora": "full", "full": "lora"}[layout]  # for what an adapter can't hold
        for case, spec in METHOD_CASES.items():
            fitting = [(case, family, own) for own in (layout, other) if spec.fits(family, own)]
            seen.update(fitting[:1])
            yield from fitting[:1]
    for family in TINY:
        for case, layout in FAMILY_CASES:
            row = (case, family, layout)
            if row not in seen and METHOD_CASES[case].fits(family, layout):
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.simplefilter("ignore")
    failed = 0
    print(f"{'method':20} {'family':13} {'layout':6} workers cut off     result")
    for index, (case, family, layout) in enumerate(rows()):
        if args.only and args.only not in f"{case}-{family}-{layout}":
            continue
        teacher = args.output_dir / "teachers" / family
        if not teacher.exists():
            TINY[family]().save_pretrained(teacher)
        folder = args.output_dir / f"{case}-{family}-{layout}"
        shutil.rmtree(folder, ignore_errors=True)
        workers, started = index % 2, time.monotonic()
        differ, update, total = resumed_differs(
            case, teacher, layout, folder, args.seed, dataloader_num_workers=workers
        )
        failed += bool(differ)
        told = f"{len(differ)} differ: {', '.join(differ[:3])}" if differ else "ok"
        print(
            f"{case:20} {family:13} {layout:6} {workers:7} {update:3} of {total:2}   {told}"
            f"   ({time.monotonic() - started:.0f} s)",
            flush=True,
        )
        shutil.rmtree(folder)
    sys.exit(f"{failed} rows differ" if failed else 0)


if __name__ == "__main__":
    main()
