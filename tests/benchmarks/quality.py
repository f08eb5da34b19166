"""Every method on the digits' teacher, for the same time, over several training seeds, and its bar.

    python tests/benchmarks/quality.py --output_dir runs/quality --seconds 120 --seeds 0 1 2

is `stepdistill compare --budget 120s --output_dir runs/quality --seeds 0 1 2 --processes 2`, whose
files it writes, and then says whether each student beats the teacher at its own step count and
whether the best ones come near its 50 steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from stepdistill.cli.compare import Options, compare
from stepdistill.comparison.table import Cell
from stepdistill.config.flags import parse_options

ONE_STEP_RATIO, FOUR_STEP_RATIO = 1.3, 1.1


def verdicts(
    table: Mapping[tuple[str, int], Cell], teacher: Mapping[int, float]
) -> list[tuple[bool, str]]:
    """(passed, claim): every student beats the naive teacher; the best ones come near 50 steps."""
    made = []
    for (recipe, steps), cell in sorted(table.items()):
        claim = (
            f"{recipe}, {steps} steps: {cell.frechet:.2f} below the teacher's {teacher[steps]:.2f}"
        )
        made.append((cell.frechet < teacher[steps], claim))
    for steps, ratio in ((1, ONE_STEP_RATIO), (4, FOUR_STEP_RATIO)):
        of_steps = {key[0]: cell.frechet for key, cell in table.items() if key[1] == steps}
        if of_steps:
            best = min(of_steps, key=lambda name: of_steps[name])
            reached = of_steps[best] / teacher[50]
            claim = f"best {steps}-step ({best}): {reached:.2f} of the teacher's 50 steps, at most"
            made.append((reached <= ratio, f"{claim} {ratio}"))
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--output_dir", required=True)
    flags.add_argument("--seconds", type=float, default=120.0, help="of one core, each student")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--processes", type=int, default=2)
    flags.add_argument("--only", nargs="+", help="recipes; all where left out")
    return flags.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[tuple[bool, str]]:
    """Run what is missing, print the table and the bar; returns the verdicts."""
    args = parse(argv)
    command = ["--output_dir", args.output_dir, "--budget", f"{args.seconds:g}s", "--seeds"]
    command += [*map(str, args.seeds), "--processes", str(args.processes)]
    if args.only:
        command += ["--methods", ",".join(args.only)]
    found = compare(parse_options(Options, command, "compare"))
    made = verdicts(found.table, found.teacher)
    for passed, claim in made:
        print(f"- {'pass' if passed else 'FAIL'}: {claim}")
    return made


if __name__ == "__main__":
    main()
