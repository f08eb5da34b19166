"""Several students, each on its share of the prompts, against one, at equal updates in all.

    python tests/benchmarks/several.py --output_dir runs/several --updates 96 --students 1 4

On the demo's emoji: one-step LoRA students of dmd2 (the recipe small-dmd2 at the demo's rates, rank
16, batch 64), as `stepdistill multi_student` trains them; those of K students have a K-th of the
updates and of the warm start each. Frechet distance, recall and right captions as in the demo's
rows, of the routed pipelines' own calls. Writes results.json; a part that is there is not made
again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepdistill.cli import main as stepdistill
from stepdistill.demo.emoji.subject import EmojiSubject
from stepdistill.demo.subject import RowJudge
from stepdistill.evaluation.samples import Samples

BATCH, RANK = 64, 16


def train(out: Path, teacher: Path, prompts: Path, count: int, updates: int, seed: int) -> float:
    """CPU seconds of a run of `count` students; 0 for one that was there."""
    if (out / "pipeline").is_dir():
        return 0.0
    began = time.process_time()
    stepdistill([
        "multi_student", "--num_students", str(count), "--recipe", "small-dmd2",
        "--pretrained_model_name_or_path", str(teacher), "--data.prompts_file", str(prompts),
        "--output_dir", str(out), "--seed", str(seed), "--train_batch_size", str(BATCH),
        "--learning_rate", "1e-3", "--role_learning_rates.fake", "2e-3",
        "--max_train_steps", str(updates // count), "--validation_steps", "0",
        "--method_config.num_steps", "1",
        "--method_config.warm_start.updates", str(updates // count // 4),
        "--tuning.student", "lora", "--tuning.fake", "lora", "--tuning.rank", str(RANK),
        "--tuning.alpha", str(RANK), "--disable_progress_bar",
    ])  # fmt: skip
    return time.process_time() - began


def row(judge: RowJudge, folder: Path, count: int, seeds: Sequence[int]) -> dict[str, Any]:
    """The figures of a routed pipeline's images, one noise seed after the other."""
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)

    def drawn(seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        parts = [judge.prompts[k : k + 100] for k in range(0, len(judge.prompts), 100)]
        began = time.perf_counter()
        made = [pipeline(part, generator=generator, output_type="pt").images for part in parts]
        return Samples(torch.cat(made), time.perf_counter() - began, 1.0)

    label = f"{count} students" if count > 1 else "1 student"
    scored = judge.score(label, "student", 1, [drawn(seed) for seed in seeds])
    measured = {"frechet": scored.frechet, "recall": scored.recall, "right": scored.accuracy}
    return {name: asdict(one) for name, one in measured.items() if one is not None}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--students", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--updates", type=int, default=96)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    out, subject = options.output_dir, EmojiSubject()
    teacher, prompts = subject.teacher(out / "teacher", None), subject.write_data(out / "data")
    judge, results = subject.judge(), out / "results.json"
    rows: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    for seed in options.seeds:
        for count in options.students:
            if (name := f"{count} of seed {seed}") not in rows:
                run = out / f"{count}_seed{seed}"
                seconds = train(run, teacher.folder, prompts, count, options.updates, seed)
                rows[name] = row(judge, run / "pipeline", count, subject.seeds)
                rows[name] |= {"updates": options.updates, "cpu_seconds": round(seconds, 1)}
                results.write_text(json.dumps(rows, indent=1))
            print(name, rows[name])


if __name__ == "__main__":
    main()
