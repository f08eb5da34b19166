"""Exact resume in one table: every method, every family and every source of data, interrupted.

    python tests/benchmarks/resume.py --output_dir runs/resume

Four steps. A run is cut off before a random optimiser update, also in the middle of a step; every
other one is a process that is killed (SIGKILL) at a random instant. A new trainer goes on from the
newest checkpoint. Compared bit for bit with the run that was never interrupted: weights of all
roles (EMA and heads too), optimiser, the method's buffers, every log line. Killed rows load data in
two worker processes and accumulate gradients over two batches; rows by source begin a second epoch.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.killed import killed_differs
from support.resume import resumed_differs
from support.runs import METHOD_CASES
from support.samples import dataset_of

from stepdistill.testing.tiny import TINY

# All methods on a UNet and on a transformer, all families under a score and a regression method.
METHOD_FAMILIES = (("sd", "lora"), ("sd3", "full"))
FAMILY_CASES = (("dmd2", "lora"), ("lcm", "lora"))
SOURCES = ("images", "tars", "rows", "stream")


def rows() -> Iterator[tuple[str, str, str, str]]:
    """(case, family, layout, source of data) of each row."""
    seen = set()
    for family, layout in METHOD_FAMILIES:
        other = {"lora": "full", "full": "lora"}[layout]  # for what an adapter can't hold
        for case, spec in METHOD_CASES.items():
            fitting = [(case, family, own) for own in (layout, other) if spec.fits(family, own)]
            seen.update(fitting[:1])
            yield from ((*row, "tensors") for row in fitting[:1])
    for family in TINY:
        for case, layout in FAMILY_CASES:
            row = (case, family, layout)
            if row not in seen and METHOD_CASES[case].fits(family, layout):
                yield (*row, "tensors")
    yield from (("lcm", "sd_v", "lora", source) for source in SOURCES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="rows whose name holds one of these")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.simplefilter("ignore")
    failed = 0
    print(f"{'method':20} {'family':13} {'layout':6} {'data':8} how     at update  result")
    for index, (case, family, layout, source) in enumerate(rows()):
        name = f"{case}-{family}-{layout}-{source}"
        if args.only and not any(only in name for only in args.only):
            continue
        teacher = args.output_dir / "teachers" / family
        if not teacher.exists():
            TINY[family]().save_pretrained(teacher)
        folder, started = args.output_dir / name, time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        options: dict[str, Any] = {}
        if source != "tensors":
            folder.mkdir(parents=True)
            options = {"dataset": dataset_of(source, folder), "max_train_steps": 9}
            options["dataset"].size_px = 16
        killed = source != "tensors" or index % 2 == 1
        if killed:
            options |= {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}
        interrupted = killed_differs if killed else resumed_differs
        differ, update, total = interrupted(case, teacher, layout, folder, args.seed, **options)
        failed += bool(differ)
        told = f"{len(differ)} differ: {', '.join(differ[:3])}" if differ else "ok"
        print(
            f"{case:20} {family:13} {layout:6} {source:8} {'killed' if killed else 'cut off':7} "
            f"{update:2} of {total:2}   {told}   ({time.monotonic() - started:.0f} s)",
            flush=True,
        )
        shutil.rmtree(folder)
    sys.exit(f"{failed} rows differ" if failed else 0)


if __name__ == "__main__":
    main()
