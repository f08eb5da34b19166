"""The demo about emoji: the shipped teacher, or one that `stepdistill demo teacher` made."""

# N images, S noise seeds

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from stepdistill.core.recipe import First
from stepdistill.demo.metrics import PREVIEWS_PER_CLASS, TEACHER_STEPS, Row
from stepdistill.demo.teacher import Teacher, TrainingRecord
from stepdistill.demo.verdict import Check, find_row, ratio_check
from stepdistill.evaluation.frechet import frechet_distance
from stepdistill.evaluation.manifold import manifold_scores
from stepdistill.evaluation.samples import Samples
from stepdistill.reporting.values import Measured
from stepdistill.storage.files import read_json, write_text
from stepdistill.storage.folders import LEDGER, replacing

from .captions import caption
from .data import SHIPPED, Emoji
from .judge import JUDGE_FILE, Retrieval, right_caption_first
from .ladder import draw_samples, image_features, wide_set
from .longer import an_hour
from .scorer import EmojiScorer, HeldOutEmojiScorer
from .teacher import MADE, PICTURES, emoji_teacher, load_pictures, refuse_missing

ONE_STEP_AIM = 1.5
WIDE, NARROW = 400, 100  # prompts that ask for a distribution, and for one picture
LONG = 600.0  # s: an update of `dmd2` takes four
COLUMNS = 10  # of a row's pictures: one line narrow, one line wide


class EmojiJudge:
    """Rows by Frechet distance and recall on wide captions, and by obedience on narrow ones (in
    the place of class accuracy); pixels are judged at 8 x 8 px."""

    def __init__(
        self, emoji: Emoji, net: Retrieval, wide: int = WIDE, narrow: int = NARROW
    ) -> None:
        self.emoji, self.net = emoji, net
        captions, self.real = wide_set(emoji, wide, seed=0)
        index = torch.randperm(len(emoji.entries), generator=torch.Generator().manual_seed(0))
        self.narrow = index[:narrow]
        self.shown = [emoji.entries[k] for k in self.narrow.tolist()]
        self.prompts = [*map(caption, self.shown), *captions]

    def floor(self, seeds: Sequence[int]) -> Row:
        """See RowJudge; the real pictures of other draws of wide captions."""
        narrow = self.emoji.images(0, self.narrow)
        wide = [wide_set(self.emoji, len(self.real), seed + 1)[1] for seed in seeds]
        sets = [torch.cat([narrow, one]) for one in wide]
        return self._row("real", "real", None, sets, None, None)

    def score(self, label: str, group: str, steps: int, samples: Sequence[Samples]) -> Row:
        """See RowJudge."""
        seconds = sum(made.seconds for made in samples) / (len(samples) * len(self.prompts))
        sets = [made.images for made in samples]
        return self._row(label, group, steps, sets, samples[0].network_calls, seconds)

    def teacher_rows(self, folder: Path, seeds: Sequence[int]) -> list[Row]:
        """See RowJudge; without guidance."""
        pipeline, rows = emoji_teacher(folder), []
        for steps in TEACHER_STEPS:
            made = [draw_samples(pipeline, self.prompts, steps, 1.0, seed) for seed in seeds]
            rows.append(self.score("teacher", "teacher", steps, made))
        return rows

    def _row(
        self,
        label: str,
        group: str,
        steps: int | None,
        sets: Sequence[Tensor],
        network_calls: float | None,
        seconds_per_image: float | None,
    ) -> Row:
        count = len(self.shown)
        real = image_features(self.net, self.real)
        wide = [image_features(self.net, images[count:]) for images in sets]
        small = [F.avg_pool2d(images[count:], 8).flatten(1) for images in sets]
        small_real = F.avg_pool2d(self.real, 8).flatten(1)
        right = [
            right_caption_first(self.net, images[:count], self.shown, self.emoji.entries)
            for images in sets
        ]
        lines = torch.stack([sets[0][:COLUMNS], sets[0][count : count + COLUMNS]], dim=1)
        return Row(
            label=label,
            group=group,
            steps=steps,
            frechet=Measured.of([frechet_distance(real, made) for made in wide]),
            frechet_pixels=Measured.of([frechet_distance(small_real, made) for made in small]),
            recall=Measured.of([manifold_scores(real, made).recall for made in wide]),
            accuracy=Measured.of([float(one.double().mean()) for one in right]),
            network_calls=network_calls,
            seconds_per_image=seconds_per_image,
            previews=lines.flatten(0, 1),  # PREVIEWS_PER_CLASS lines, a column after the other
        )


class EmojiSubject:
    """See Subject. Args: source: the teacher's folder."""

    name = "emoji"
    title = "Emoji"
    prompt = "slice of pizza in fluent style"
    pictures = "narrow captions above, wide ones below"
    note = (
        "Each row from the same noise and the same prompts: full names above, groups such as "
        "“fruit” below. The first row is real."
    )
    data = "Fluent and Noto emoji, 64 x 64 px, with the names of emoji-datasource"
    seeds: Sequence[int] = (0, 1)
    seconds: float | None = 110.0  # of a network 24 times that of the digits
    num_pairs = 2560
    aim_seconds = (300.0, 300.0)
    right = ("right caption", "right")
    scorers = (EmojiScorer.kind, HeldOutEmojiScorer.kind)

    def __init__(self, source: Path = SHIPPED) -> None:
        refuse_missing(source)
        self.source = source

    def teacher(self, folder: Path, seconds: float | None) -> Teacher:
        """See Subject."""
        made = folder / MADE
        if folder.exists() and not made.is_file():
            raise ValueError(
                f"output_dir: expected an empty folder or an earlier demo of emoji, got {folder}, "
                "the teacher of something else. Name another one: --output_dir."
            )
        if not folder.exists() or made.read_bytes() != (self.source / MADE).read_bytes():
            with replacing(folder, "teacher folder") as partial:
                shutil.copytree(self.source, partial, ignore=shutil.ignore_patterns(LEDGER))
        spent = read_json(made, ["spent"])["spent"]
        total = sum(one["cpu_seconds"] for one in spent.values())
        return Teacher(folder, TrainingRecord(spent["denoiser"]["updates"], total, 0.0), True)

    def write_data(self, folder: Path) -> Path:
        """See Subject; a prompt for every picture and as many wide ones."""
        with zipfile.ZipFile(self.source / PICTURES) as archive:
            archive.extractall(folder)
        emoji = load_pictures(self.source)
        captions = [*map(caption, emoji.entries), *wide_set(emoji, len(emoji.entries), 0)[0]]
        write_text(folder / "prompts.txt", "".join(f"{text}\n" for text in captions))
        return folder / "prompts.txt"

    def first(self, first: First, seconds: float | None) -> First:
        """See Subject; where a student's own training has time for a few updates alone, the first
        one has it all: it comes further. A student of sizes of its own is half as wide."""
        tuning = first.settings.get("tuning", {})
        if "student_config" in tuning:
            widths = "block_out_channels"
            teacher = read_json(self.source / "unet" / "config.json", [widths])
            half = {widths: [width // 2 for width in teacher[widths]]}
            tuning = {**tuning, "student_config": half}
            first = replace(first, settings={**first.settings, "tuning": tuning})
        if first.always or seconds is None or seconds > LONG:
            return first
        return replace(first, share=1.0, settings={**first.settings, "train_batch_size": 32})

    def judge(self) -> EmojiJudge:
        """See Subject."""
        net = Retrieval.load(self.source / JUDGE_FILE.name)
        return EmojiJudge(load_pictures(self.source), net)

    def more_time(self, rows: Sequence[Row], method: str, student: str) -> list[tuple[str, str]]:
        """See Subject; measured with the shipped teacher alone."""
        shipped = self.source == SHIPPED and student == "full"
        return an_hour(rows, method) if shipped else []

    def checks(self, rows: Sequence[Row]) -> list[Check]:
        """See Subject."""
        one, fifty = find_row(rows, "student", 1), find_row(rows, "teacher", 50)
        if one is None or fifty is None:
            return []
        claim = f"1-step student at most {ONE_STEP_AIM} × the teacher's at 50 steps"
        return [ratio_check(claim, one, fifty, ONE_STEP_AIM)]


assert PREVIEWS_PER_CLASS == 2
