"""`stepdistill pairs`: a teacher pipeline and prompts in, a pair set on disk out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from stepdistill.core.method import Role
from stepdistill.core.times import uniform_grid
from stepdistill.data.images import LabelFileDataset
from stepdistill.data.pairs import generate_pairs
from stepdistill.data.stream import PromptDataset
from stepdistill.models.registry import family_for, load_family, pipeline_class_of
from stepdistill.models.rolebank import RoleBank
from stepdistill.models.tuning import Tuning


def make_pairs(
    model: str,
    prompts_file: str | Path,
    pairs_dir: str | Path,
    *,
    num_pairs: int,
    num_steps: int = 50,
    guidance: float = 1.0,
    resolution: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    revision: str | None = None,
    variant: str | None = None,
    teacher_lora: Sequence[str] = (),
    single_file_config: str | None = None,
) -> Path:
    """Solve the teacher's guided ODE for num_pairs noises; returns the folder.

    Run under `accelerate launch` to share the shards among processes. An interrupted call goes on
    where it stopped.
    Errors: ValueError for a bad model, prompt file or existing set, before a weight is loaded.
    """
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    cls = family_for(pipeline_class_of(model, single_file_config, **hub))
    if cls.reads_image:
        raise ValueError(
            f"pairs: expected a model that a prompt is enough for, got {model!r}, which reads a "
            "first frame too. Give the trainer a dataset of image, x0 and noise instead."
        )
    if cls.conditioning == "label":
        prompts: list[Any] = list(LabelFileDataset.from_file(prompts_file).labels)
    else:
        prompts = list(PromptDataset.from_file(prompts_file).prompts)
    state = PartialState(cpu=not torch.cuda.is_available())
    family = load_family(
        model,
        revision=revision,
        variant=variant,
        teacher_lora=teacher_lora,
        single_file_config=single_file_config,
    )
    bank = RoleBank(family, {"teacher": Role()}, Tuning())
    family.pipeline.to(state.device)
    generate_pairs(
        bank["teacher"],
        lambda rows: family.encode(rows).to(state.device),
        lambda bsz: family.null(bsz).to(state.device),
        prompts,
        pairs_dir,
        num_pairs,
        shape=family.sample_shape(resolution, resolution),
        model=" + ".join([model, *teacher_lora]),
        guidance=guidance,
        times=uniform_grid(num_steps, family.shift_at(resolution, resolution)),
        seed=seed,
        batch_size=batch_size,
        device=state.device,
        rank=state.process_index,
        world_size=state.num_processes,
        progress=state.is_main_process,
    )
    state.wait_for_everyone()
    return Path(pairs_dir)
