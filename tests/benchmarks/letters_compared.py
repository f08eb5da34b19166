"""Every method that starts from a teacher, by its recipe for small models, on those of letters.py.

    cd tests
    python -m benchmarks.letters_compared ../runs/letters --prediction v \\
        --net ../runs/letters/net/NAME
    python -m benchmarks.letters_compared ../runs/letters --prediction v --keep  # its rows, to here

`runs/letters` is letters.py's folder, NAME a network of `stepdistill features train` (see there).
Three minutes of one core a student, one seed after the other: those that are done are left as they
are. The rows are kept in tests/benchmarks/letters, and RESULTS.md's table is held to them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.same_budget import BUDGET, table

from stepdistill.comparison.results import read
from stepdistill.config.layers import merged, recipe_files
from stepdistill.core.method import COMMON_DATA
from stepdistill.methods import METHODS

KEPT = Path(__file__).with_name("letters")
OTHER_NAMES = ("scm",)  # options of a method that make another, by its recipe
TEACHER_STEPS = ("1", "2", "4", "25")
IMAGES_PER_PROMPT = "6"  # of 156 prompts


def counts() -> Iterator[tuple[str, int | None]]:
    """(method, the step count that its recipe is for; none: all of its counts, by one student).

    Without those that tune a distilled student by a scorer, or learn from pairs of another kind.
    """
    for layers in recipe_files().values():
        recipe, values = layers[-1].recipe, merged(layers)
        if recipe is None or recipe.size != "small":
            continue
        scored = values.get("rewards") or "reward" in values.get("method_config", {})
        method = METHODS[values["method"]]
        if method.data in COMMON_DATA and not scored:
            yield recipe.called or method.name, None if method.one_student else recipe.steps[0]
    yield from ((name, 1) for name in OTHER_NAMES)
    yield "dmd2", 1  # beside the recipe's own four


def train(folder: Path, prediction: str, net: Path, seeds: Sequence[int], processes: int) -> None:
    """The missing ones of a teacher, a seed after the other."""
    groups: dict[int | None, list[str]] = {}
    for name, steps in counts():
        groups.setdefault(steps, []).append(name)
    for seed in seeds:
        for steps, methods in groups.items():
            count = () if steps is None else ("--steps", str(steps))
            subprocess.run(
                ["stepdistill", "compare", "--teacher", str(folder / prediction),
                 "--train_data_dir", str(folder / "pictures"),
                 "--reference", str(folder / "pictures"),
                 "--prompts_file", str(folder / "prompts.txt"), "--features", str(net),
                 "--guidance", "1", "--teacher_steps", *TEACHER_STEPS,
                 "--num_images_per_prompt", IMAGES_PER_PROMPT,
                 "--output_dir", str(compared(folder, prediction)), "--budget", BUDGET,
                 "--processes", str(processes), "--curve_points", "1", "--discard_students",
                 "--seeds", str(seed), *count, "--methods", *methods],
                check=True,
            )  # fmt: skip


def compared(folder: Path, prediction: str) -> Path:
    return folder / f"compared-{prediction}"


def keep(folder: Path, prediction: str) -> None:
    """Copy the rows to KEPT."""
    made, kept = compared(folder, prediction), KEPT / prediction
    shutil.copytree(made / "results", kept / "results", dirs_exist_ok=True)
    for name in ("teacher_rows.json", "pairs_seconds.json"):
        shutil.copy(made / name, kept / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prediction", choices=("epsilon", "v"), required=True)
    parser.add_argument("--net", type=Path, help="feature network to judge by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="train nothing, keep what is there")
    args = parser.parse_args()
    if args.keep:
        keep(args.folder, args.prediction)
        print("\n".join(table(read(KEPT / args.prediction))))
    elif args.net is None:
        parser.error("--net: expected a folder of `stepdistill features train`, got none.")
    else:
        train(args.folder, args.prediction, args.net, args.seeds, args.processes)


if __name__ == "__main__":
    main()
