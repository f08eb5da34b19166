"""The `stepdistill` command: demo | train | plan | cache | pairs | sample | export | merge | ...

Heavy imports happen inside the commands, so --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; a user's mistake ends with one line and status 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        return _train(argv[1:])
    if argv[:1] == ["plan"]:
        return _plan(argv[1:])
    if argv[:1] == ["evaluate"]:
        from stepdistill.evaluation.command import main as evaluate

        return evaluate(argv[1:])
    if argv[:1] == ["compare"]:
        from stepdistill.comparison.command import main as compare

        return compare(argv[1:])
    if argv[:1] == ["cache"]:
        return _cache(argv[1:])
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = args.run
    with _mistakes_in_one_line():
        return run(args)


@contextmanager
def _mistakes_in_one_line() -> Iterator[None]:
    """Within: a user's mistake ends the command with one line and status 1."""
    try:
        yield
    except (ValueError, TypeError, FloatingPointError, OSError) as err:
        sys.exit("error: " + " ".join(str(err).split()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stepdistill", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        made.set_defaults(run=run)
        return made

    demo = command("demo", _demo)
    demo.add_argument("--method", default="dmd2", help="a method, or snoopi or tscd_one_lora")
    demo.add_argument("--student", choices=("lora", "full"), default="full")
    demo.add_argument("--seconds", type=float, help="training budget of each student")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--output_dir", default="demo")

    commands.add_parser("train", help="Train from config files and flags; train --help lists them.")

    commands.add_parser("cache", help="Encode a run's prompts and images to --cache_dir.")

    commands.add_parser("plan", help="Forecast a run's memory and hours; plan --help lists flags.")

    commands.add_parser("compare", help="Train methods alike and judge them; compare --help.")

    commands.add_parser("evaluate", help="Compare a teacher with students; evaluate --help.")

    pairs = command("pairs", _pairs)
    pairs.add_argument("--pretrained_model_name_or_path", required=True)
    pairs.add_argument("--revision")
    pairs.add_argument("--variant")
    pairs.add_argument("--teacher_lora", action="append", default=[], help="path[:scale], merged")
    pairs.add_argument("--single_file_config", help="pipeline folder of a single-file teacher")
    pairs.add_argument("--prompts_file", help="noises are solved to images of these prompts")
    pairs.add_argument("--invert", metavar="DIR", help="or real images, inverted to noises (rf++)")
    pairs.add_argument("--pairs_dir", required=True)
    pairs.add_argument("--num_pairs", type=int, help="all images with --invert")
    pairs.add_argument("--num_steps", type=int, default=50, help="steps of the teacher's solver")
    pairs.add_argument("--guidance", type=float, default=1.0, help="null + g (cond - null)")
    pairs.add_argument("--resolution", type=int)
    pairs.add_argument("--batch_size", type=int, default=16)
    pairs.add_argument("--seed", type=int, default=0)

    sample = command("sample", _sample)
    sample.add_argument("model_dir", help="exported pipeline folder")
    sample.add_argument("--prompt", required=True, nargs="+")
    sample.add_argument("--num_steps", type=int, help="a step count of the trained grid")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--output_dir", default="samples")

    export = command("export", _export)
    export.add_argument("run_dir", help="output_dir of a training run")
    export.add_argument("out_dir")
    export.add_argument("--checkpoint", help="best, or checkpoint-N; the newest unless given")
    export.add_argument("--num_steps", type=int, help="a step count of the trained grid")
    formats = ("pipeline", "lora", "diffusers", "kohya", "comfyui")
    export.add_argument(
        "--format", choices=formats, default="pipeline", help="diffusers is lora by another name"
    )

    merge = command("merge", _merge)
    merge.add_argument("sources", nargs="+", help="path[:weight] of LoRA files or of two pipelines")
    merge.add_argument("--output", required=True, help="folder to write")
    merge.add_argument("--method", choices=("cat", "linear"), help="of LoRA files; cat is the sum")

    push = command("push", _push)
    push.add_argument("folder", help="exported folder")
    push.add_argument("repo_id", help="user/name; private unless it exists")
    push.add_argument("--public", action="store_true", help="make a new repository public")
    push.add_argument("--dry_run", metavar="DIR", help="write what would be sent; send nothing")

    report = command("report", _report)
    report.add_argument("run_dir", help="output_dir of a finished or running training run")

    command("list", _list)

    check = command("check", _check)
    check.add_argument("model_dir", help="Diffusers pipeline folder or Hub id")
    check.add_argument("--base_quantization", choices=("none", "int8", "nf4"), default="none")
    return parser


def _train(argv: Sequence[str]) -> None:
    """Train and export; --help and mistyped options are answered before networks are imported."""
    from stepdistill.config.files import parse_run_config

    with _mistakes_in_one_line():
        parse_run_config(argv, prog="stepdistill train")
    from stepdistill.trainers import launch

    launch(argv)


def _cache(argv: Sequence[str]) -> None:
    """Fill --cache_dir with the files and flags of a run; the method does not matter."""
    from stepdistill.config.files import parse_run_config

    with _mistakes_in_one_line():
        run = parse_run_config(argv, prog="stepdistill cache", method="dmd2")
        from stepdistill.cache.precompute import cache_run
        from stepdistill.training.sources import open_dataset

        cache_run(run, open_dataset(run))


def _plan(argv: Sequence[str]) -> None:
    """Forecast memory and hours of a run from configurations alone; exit 1 where it won't fit."""
    from stepdistill.config.files import parse_run_config

    parser = argparse.ArgumentParser(prog="stepdistill plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--gpu", default="rtx4090")
    parser.add_argument("--memory_gb", type=float)
    own, rest = parser.parse_known_args(argv)
    try:
        run = parse_run_config(rest, prog="stepdistill plan")
        from stepdistill.planning.report import print_plan

        fits = print_plan(run, own.num_gpus, own.gpu, own.memory_gb)
    except (ValueError, TypeError) as err:
        sys.exit(f"error: {err}")
    sys.exit(0 if fits else 1)


def _demo(args: argparse.Namespace) -> None:
    """Distil a teacher of handwritten digits to 1 and 4 steps and write a report."""
    from stepdistill.demo.run import run_demo

    run_demo(
        output_dir=args.output_dir,
        method=args.method,
        student=args.student,
        seconds=args.seconds,
        seed=args.seed,
    )


def _pairs(args: argparse.Namespace) -> None:
    """Make noise-image pairs with the teacher's solver, or of real images, for reflow."""
    from stepdistill.pairs.teacher import make_pairs

    folder = make_pairs(
        args.pretrained_model_name_or_path,
        args.prompts_file,
        args.pairs_dir,
        num_pairs=args.num_pairs,
        train_data_dir=args.invert,
        num_steps=args.num_steps,
        guidance=args.guidance,
        resolution=args.resolution,
        batch_size=args.batch_size,
        seed=args.seed,
        revision=args.revision,
        variant=args.variant,
        teacher_lora=args.teacher_lora,
        single_file_config=args.single_file_config,
    )
    print(folder)


def _sample(args: argparse.Namespace) -> None:
    """Sample an exported pipeline with the steps and guidance it was trained for."""
    from stepdistill.export.run import sample_export

    for path in sample_export(
        args.model_dir, args.prompt, args.output_dir, args.num_steps, args.seed
    ):
        print(path)


def _export(args: argparse.Namespace) -> None:
    """Export the newest checkpoint of a run as a pipeline or a LoRA."""
    from stepdistill.trainers import trainer_of_run

    trainer = trainer_of_run(args.run_dir, args.checkpoint)
    print(trainer.export(args.out_dir, args.num_steps, args.format))


def _merge(args: argparse.Namespace) -> None:
    """Merge LoRA files with weights, or average two exported pipelines."""
    from stepdistill.export.merge import merge_sources

    print(merge_sources(args.sources, args.output, args.method))


def _push(args: argparse.Namespace) -> None:
    """Upload an exported folder to the Hub."""
    from stepdistill.export.hub import dry_run, push_folder

    if args.dry_run:
        for path in dry_run(args.folder, args.repo_id, args.dry_run):
            print(path)
    else:
        print(push_folder(args.folder, args.repo_id, private=not args.public))


def _report(args: argparse.Namespace) -> None:
    """Draw a run's report.html again from its records."""
    from pathlib import Path

    from stepdistill.monitoring.run_report import write_run_report
    from stepdistill.storage.files import write_text

    print(write_run_report(Path(args.run_dir), write_text))


def _list(args: argparse.Namespace) -> None:
    """Show methods with their status, and pipeline families."""
    from rich.console import Console
    from rich.table import Table

    from stepdistill.families.registry import FAMILIES, family_class
    from stepdistill.methods import METHODS

    facts = ("method", "also called", "paper", "steps", "data", "status")
    methods = Table(*facts, title="methods")
    for name, cls in METHODS.items():
        steps = ", ".join(map(str, cls.steps))
        methods.add_row(name, ", ".join(cls.aliases), cls.paper, steps, cls.data, cls.status)
    families = Table("family", "pipeline classes", "conditioning", title="families")
    for name in FAMILIES:
        cls = family_class(name)
        families.add_row(name, ", ".join(cls.pipelines), cls.conditioning)
    console = Console()
    console.print(methods)
    console.print(families)


def _check(args: argparse.Namespace) -> None:
    """Compare our adapter with the stock pipeline; exit 1 where they differ."""
    from stepdistill.testing.parity import print_check

    sys.exit(print_check(args.model_dir, args.base_quantization))


if __name__ == "__main__":
    main()
