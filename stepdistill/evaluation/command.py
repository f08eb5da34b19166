"""The flags of `stepdistill evaluate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .images import FILTERS
from .presets import PRESETS


def parser() -> argparse.ArgumentParser:
    """Flags by the names of `run.Options`; those left out take a preset's or its defaults."""
    told = "\n".join(f"  {name}: {one.about}\n    {one.files}" for name, one in PRESETS.items())
    made = argparse.ArgumentParser(
        prog="stepdistill evaluate",
        description="Compare a teacher at N steps with students: same prompts, same seeds.",
        epilog=f"presets:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=None,
    )
    add = made.add_argument
    add("--teacher", required=True, help="pipeline folder or Hub id")
    add("--student", nargs="+", required=True, help="exports, run folders or other pipelines")
    add("--steps", type=int, nargs="+", help="step counts to export a run for")
    add("--teacher_steps", type=int, nargs="+", help="default 50; the most is the reference")
    add("--prompts_file", help="one prompt (or class label) a line")
    add("--first_frames", metavar="DIR", help="of an image-to-video pipeline, in place of prompts: "
        "images and metadata.jsonl (file_name, text)")  # fmt: skip
    add("--output_dir")
    add("--features", nargs="+", metavar="NET",
        help="digits, inception:FILE, clip:MODEL[,WEIGHTS], dino:DIR_OR_HUB_ID, "
        "MODULE:NAME, or a folder of a Transformers vision model")  # fmt: skip
    add("--reference", help="folder of real images; none: the teacher's own are the reference")
    add("--preset", choices=sorted(PRESETS))
    add("--num_prompts", type=int, help="the first ones; default all")
    add("--num_images_per_prompt", type=int, help="default 1; 2 or more for diversity")
    add("--num_reference", type=int, help="the first images by name; default all")
    add("--seeds", type=int, nargs="+", help="noise seeds, a whole set of images each; default 0")
    add("--batch_size", type=int, help="default 8; changes times alone")
    add("--shard_images", type=int, help="images between files, which processes share; default 64")
    add("--guidance", type=float, help="of the teacher, null + g (cond - null)")
    add("--student_guidance", type=float, help="of students without distillation.json; default 1")
    add("--teacher_lora", action="append", help="path[:scale], merged")
    add("--single_file_config", help="pipeline folder of a single-file teacher")
    add("--resolution", type=int, help="height and width in px")
    add("--num_frames", type=int, help="of a video; default the model's own")
    add("--frames", metavar="first|all|N", help="of a video that are seen; default 4, evenly apart")
    add("--size_px", type=int, help="resize to that side before the feature network")
    add("--crop_px", type=int, help="take the middle patch of that side first")
    add("--resize_filter", choices=sorted(FILTERS))
    add("--nearest_k", type=int, help="neighbours of precision and recall; default 3")
    add("--dtype", choices=("float32", "bf16", "fp16"))
    add("--clip", metavar="MODEL[,WEIGHTS]", help="CLIP score, an open_clip model; "
        "with a file of OpenAI's weights the one named -quickgelu")  # fmt: skip
    add("--hps", metavar="FILE", help="HPSv2 weights")
    add("--aesthetic", metavar="HEAD[,WEIGHTS]", help="linear head on OpenAI's CLIP "
        "ViT-L/14 (ViT-L-14-quickgelu); WEIGHTS: a local file of it")  # fmt: skip
    add("--num_previews", type=int, help="images shown of each; default 12")
    return made


def main(argv: Sequence[str]) -> None:
    """Run it; a user's mistake ends with one line and status 1."""
    given = vars(parser().parse_args(list(argv)))
    from stepdistill.demo.classifier import register_digits

    from .report import print_report
    from .run import evaluate, options_of

    register_digits()
    try:
        report = evaluate(options_of(given.pop("preset"), **given))
    except (ValueError, TypeError, OSError) as err:
        sys.exit("error: " + " ".join(str(err).split()))
    print_report(report)
