"""A small teacher of sound, distilled to four steps and one, and inpainted by its first noise.

    python tests/benchmarks/sound.py --output_dir runs/sound

Sounds are made here (stepdistill/demo/sound): melodies of a timbre, a register and a rhythm, which
their captions name. A judge trained on real sounds says how many samples are what their caption
says (each of the three), and gives features for a Frechet distance to held-out real ones. Teacher
in its own 25 ODE steps, in four and in one; the student (STUDENTS) in four and in one; then
`optimise_latent` on its four-step export: the middle of held-out sounds is made anew, and what was
to stay is compared before and after. All is seeded; a call that was cut off goes on.
Writes results.json, report.html and WAV files.
"""

# Shapes: B batch, C channels, L length, D features.

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stepdistill import TrainConfig, Tuning
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.demo.sound.data import KINDS, RATE, RHYTHMS, SAMPLES, caption, sounds
from stepdistill.demo.sound.mdct_vae import to_latents
from stepdistill.demo.sound.teacher import SoundTeacher, channel_spread, train
from stepdistill.evaluation.frechet import frechet_distance
from stepdistill.export.card import call_options
from stepdistill.loading.project_code import optimise_module
from stepdistill.loading.safe_files import load_stock
from stepdistill.loading.source import ModelSource
from stepdistill.reporting.blocks import Facts, Text
from stepdistill.reporting.page import Report
from stepdistill.reporting.sound import Sounds, write_wav
from stepdistill.reporting.values import counted
from stepdistill.sampling import sample_latents
from stepdistill.trainers import DistillationTrainer, trainer_class

TEACHER_STEPS, SHELL = 25, 0.5  # SHELL: weight that holds the noise near unit noise
HELD_OUT = 77_000_000  # index of sounds that nothing is trained on
PARTS = [(0.0, 0.36), (0.68, SAMPLES / RATE)]  # seconds of a sound that stay
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Jumps to any time by deterministic steps: no noise comes in that a weak student can't remove.
    "tcd": ("tscd", {"segments": (4, 1), "stage_starts": (0.4,), "loss": "l2"}),
    "consistency": ("consistency", {"target": "self"}),
}
GROUPS = [[kind[i] for kind in KINDS] for i in range(3)]
ANSWERS = [[sorted(set(group)).index(word) for word in group] for group in GROUPS]


def real(kinds: Sequence[int], spread: Tensor, seed: int, first: int) -> Tensor:
    """Latents (B, C, L) of real sounds."""
    return to_latents(sounds(kinds, seed, first), spread)


class SoundData(Dataset[dict[str, Any]]):
    """Latents with their captions."""

    def __init__(self, spread: Tensor, seed: int, number: int) -> None:
        self.kinds = [i % len(KINDS) for i in range(number)]
        self.x0 = real(self.kinds, spread, seed, 1_000_000)

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x0": self.x0[index], "prompt": caption(self.kinds[index])}


class Judge(nn.Module):
    """Timbre, register and rhythm of the energy in latents."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(32 * 32, 64), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(64, len(set(group))) for group in GROUPS)

    def features(self, latents: Tensor) -> Tensor:
        """(B, D)"""
        energy = nn.functional.avg_pool2d((latents.float().square()).unsqueeze(1), 2).squeeze(1)
        return self.hidden((energy + 0.02).log().flatten(1) / 4)  # type: ignore[no-any-return]

    def right(self, latents: Tensor, kinds: Sequence[int]) -> list[float]:
        """Share of samples whose timbre, register, rhythm is its caption's."""
        made, index = self.features(latents), list(kinds)
        return [
            float((head(made).argmax(1) == torch.tensor(words)[index]).float().mean())
            for head, words in zip(self.heads, ANSWERS, strict=True)
        ]


def train_judge(spread: Tensor, seed: int, steps: int) -> Judge:
    torch.manual_seed(seed)
    judge = Judge()
    kinds = [i % len(KINDS) for i in range(60 * len(KINDS))]
    x0 = real(kinds, spread, seed, 5_000_000)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3, weight_decay=1e-4)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(kinds), (64,), generator=draw)
        made = judge.features(x0[index] + 0.05 * torch.randn(64, *x0.shape[1:], generator=draw))
        chosen = [torch.tensor(words)[torch.tensor(kinds)[index]] for words in ANSWERS]
        loss = sum(
            nn.functional.cross_entropy(head(made), words)
            for head, words in zip(judge.heads, chosen, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    return judge.eval().requires_grad_(False)


def distil(
    teacher: Path, out: Path, data: SoundData, kind: str, updates: int, seed: int, guidance: float
) -> DistillationTrainer:
    """The trained student's trainer. Args: kind: of STUDENTS."""
    method, settings = STUDENTS[kind]
    options: dict[str, Any] = {
        "output_dir": str(out),
        "tuning": Tuning(student="full"),
        "max_train_steps": updates,
        "train_batch_size": 16,
        "learning_rate": 5e-4,
        "ema_decay": 0.98,
        "seed": seed,
        "checkpointing_steps": max(updates // 4, 1),
        "validation_prompts": [caption(0), caption(20)],
        "num_validation_images": 2,
        "validation_steps": updates,
        "validation_teacher_steps": TEACHER_STEPS,
    }
    if list(out.glob("checkpoint-*")):
        options["resume_from_checkpoint"] = "latest"
    trainer = trainer_class(method)(
        str(teacher),
        TrainConfig(**options),
        data,
        method=method,
        method_config={**settings, "guidance_range": (guidance, guidance), "num_grid": 40},
    )
    trainer.train()
    return trainer


def inpaint(
    export: Path, spread: Tensor, seed: int, iterations: int, number: int
) -> dict[str, Any]:
    """What stays of held-out sounds: its error in the latents' spread before and after, in the
    export's own steps, optimised through one; and the sounds."""
    record = json.loads((export / "distillation.json").read_text())
    pipe = optimise_module().OptimiseLatentPipeline.from_pipe(
        load_stock(export, ModelSource.of(export).index)
    )
    pipe.set_progress_bar_config(disable=True)
    call, made = call_options(record), []
    kinds = [(7 * i + 3) % len(KINDS) for i in range(number)]
    for i, kind in enumerate(kinds):
        target = sounds([kind], seed, HELD_OUT + 500 + i)[0]
        keep = optimise_module().Keep(target, PARTS)
        more = {"iterations": iterations, "seed": seed + i, "shell": SHELL}
        result = pipe(caption(kind), loss=keep, **more, **call)
        first = torch.randn(result.noise.shape, generator=torch.Generator().manual_seed(seed + i))
        errors, waves = {}, {}
        for name, noise in (("before", first), ("after", result.noise)):
            draw = torch.Generator().manual_seed(seed + i)
            waves[name] = pipe(caption(kind), latents=noise, generator=draw, **call).audios[0]
            latents = to_latents(waves[name].unsqueeze(0), spread)
            errors[name] = float(keep(latents, RATE).sqrt() / keep.target.std())
        made.append(
            {
                "caption": caption(kind),
                "kept_rmse": errors,
                "radius": float(result.noise.square().mean().sqrt()),
                "waves": {"target": target, **waves},
            }
        )
    return {"sounds": made}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--teacher_steps", type=int, default=SoundTeacher.max_train_steps)
    parser.add_argument("--method", choices=STUDENTS, default="tcd")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--per_caption", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=70)
    parser.add_argument("--inpainted", type=int, default=3)
    parser.add_argument("--judge_steps", type=int, default=1500)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    out, seed, started = args.output_dir, args.seed, time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    config = SoundTeacher(seed=seed, max_train_steps=args.teacher_steps)
    teacher, took = train(config, out)
    spread = channel_spread(seed)
    judge = train_judge(spread, seed, args.judge_steps)
    data = SoundData(spread, seed, 8 * len(KINDS))
    how = (args.method, args.updates, seed, args.guidance)
    trainer = distil(teacher, out / f"run-{args.method}", data, *how)
    names = {n: out / f"{args.method}-{n}" for n in (4, 1)}
    exports = {n: trainer.export(str(folder), num_steps=n) for n, folder in names.items()}
    kinds = [k for k in range(len(KINDS)) for _ in range(args.per_caption)]
    prompts, family = [caption(k) for k in kinds], trainer.family
    wanted = real(kinds + kinds, spread, seed, HELD_OUT)
    base, grid = trainer.bank["teacher"], trainer.method.sampler()
    systems: dict[str, tuple[Any, SamplerSpec]] = {
        f"teacher, {n} steps": (base, SamplerSpec(uniform_grid(n), "ode", guidance=args.guidance))
        for n in (TEACHER_STEPS, 4, 1)
    }
    systems |= {f"student, {n} steps": (trainer.student(), grid.with_steps(n)) for n in (4, 1)}
    rows = {"real": real(kinds, spread, seed, HELD_OUT + 10_000)}
    for name, (denoiser, spec) in systems.items():
        parts = [
            sample_latents(denoiser, family, spec, prompts[i : i + 36], seed, first_index=i)
            for i in range(0, len(prompts), 36)
        ]
        rows[name] = torch.cat(parts)
    measured = {}
    for name, latents in rows.items():
        right = judge.right(latents, kinds)
        distance = frechet_distance(judge.features(wanted), judge.features(latents))
        measured[name] = {
            "timbre": right[0],
            "register": right[1],
            "rhythm": right[2],
            "frechet": distance,
        }
        print(name, json.dumps(measured[name]), flush=True)
    painted: dict[str, Any] = {"sounds": []}
    for steps, export in exports.items():
        more = inpaint(Path(export), spread, seed, args.iterations, args.inpainted)["sounds"]
        painted["sounds"] += [{"steps": steps, **one} for one in more]
    results = {
        "teacher": took,
        "method": args.method,
        "updates": args.updates,
        "guidance": args.guidance,
        "seed": seed,
        "samples": len(kinds),
        "measured": measured,
        "inpainted": [{k: v for k, v in one.items() if k != "waves"} for one in painted["sounds"]],
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_page(out, results, rows, painted, family, kinds)
    print(json.dumps(results["inpainted"], indent=1), results["cpu_seconds"], "s CPU")
    return results


def write_page(
    out: Path,
    results: dict[str, Any],
    rows: dict[str, Tensor],
    painted: dict[str, Any],
    family: Any,
    kinds: Sequence[int],
) -> None:
    """Spectrograms and sounds of every system, and of what was inpainted."""

    def sound(name: str, note: str, wave: Tensor) -> tuple[str, str, Path, Tensor]:
        file = out / f"{name.replace(', ', '-').replace(' ', '-')}.wav"
        write_wav(file, wave, RATE)
        return name, note, file, wave

    shown = [0, len(kinds) // 2]
    made = []
    with torch.no_grad():
        for name, latents in rows.items():
            waves = family.images(latents[shown])
            facts = results["measured"][name]
            note = ", ".join(f"{k} {v:.2f}" for k, v in facts.items())
            for i, wave in zip(shown, waves, strict=True):
                made.append(sound(f"{name}, {caption(kinds[i])}", note, wave))
    steered = [
        sound(
            f"{name}, {i}, {counted(one['steps'], 'step')}, {one['caption']}",
            f"kept part's error {one['kept_rmse'].get(name, 0.0):.3f} of the latents' spread",
            wave,
        )
        for i, one in enumerate(painted["sounds"])
        for name, wave in one["waves"].items()
    ]
    facts = Facts(
        [
            ("teacher", f"{results['teacher']}"),
            (
                "student",
                f"{results['method']}, {results['updates']} updates, seed {results['seed']}",
            ),
            ("kept", ", ".join(f"{a:g} to {b:g} s" for a, b in PARTS)),
            ("rhythms", ", ".join(RHYTHMS)),
        ]
    )
    note = Text(
        "Shares of samples that are what their caption says, and a Frechet distance (lower)."
    )
    sections = [
        ("Samples", [note, Sounds(made)]),
        ("Inpainted", [Sounds(steered)]),
        ("How", [facts]),
    ]
    page = Report("A small teacher of sound", sections)
    (out / "report.html").write_text(page.html(), encoding="utf-8")


if __name__ == "__main__":
    main()
