"""`stepdistill pairs`: a teacher pipeline and prompts (or real images) in, a pair set out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.options import PairSolver
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond
from stepdistill.data.images import ImageFolderDataset, LabelFileDataset
from stepdistill.data.metadata import beside_columns
from stepdistill.data.source import fitted
from stepdistill.data.stream import PromptDataset
from stepdistill.families.beside import fields_beside
from stepdistill.families.registry import TeacherFacts, load_family, teacher_facts
from stepdistill.families.size import size_fits
from stepdistill.loading.identity import differing
from stepdistill.loading.source import ModelSource
from stepdistill.loading.teacher_lora import lora_facts
from stepdistill.pairs.beside import RowsBeside
from stepdistill.pairs.dataset import generate_pairs
from stepdistill.pairs.files import MANIFEST
from stepdistill.pairs.inverted import invert_pairs
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.files import EXPORT_RECORD, read_json
from stepdistill.storage.ranks import owned_by_first, process_state, refusing_together


@refusing_together()
def make_pairs(
    teacher: str | Path | ModelSource,
    prompts_file: str | Path | None,
    pairs_dir: str | Path,
    *,
    num_pairs: int | None = None,
    train_data_dir: str | Path | None = None,
    invert: str | Path | None = None,
    num_steps: int = 50,
    solver: PairSolver = "ddim",
    guidance: float = 1.0,
    resolution: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Path:
    """Solve the teacher's guided ODE for num_pairs noises, or backwards for the images of a folder.

    Of a model that reads images beside the prompt, the noises are solved for the captioned rows of
    `train_data_dir` (first frames of videos, or images to edit), which travel in the set.

    Of a high-noise expert's student (a pipeline export of a run with --expert high) its own steps
    are taken, and the set holds the states in which they end: what the low-noise one is trained on.
    Run under `accelerate launch` to share the shards among processes. An interrupted call goes on
    where it stopped.
    Args: prompts_file, train_data_dir or invert: what to begin with; num_pairs: of a folder None
        takes all.
    Returns: the folder of the set.
    Errors: ValueError for a bad model, prompt file or existing set, before a weight is loaded.
    """
    source = ModelSource.of(teacher)
    facts = teacher_facts(source)
    given = {"prompts_file": prompts_file, "train_data_dir": train_data_dir, "invert": invert}
    _begins_fitly(facts, source, [name for name, value in given.items() if value is not None])
    prompts: Sequence[Any] = []
    folder: ImageFolderDataset | None = None
    if invert is not None:
        kind = facts.conditioning
        folder = ImageFolderDataset(invert, resolution, kind == "label", kind == "none")
    elif train_data_dir is not None:
        columns = beside_columns(fields_beside(facts.family))
        folder = ImageFolderDataset(train_data_dir, resolution, beside=columns)
    elif num_pairs is None:
        raise ValueError("pairs: expected --num_pairs with --prompts_file, got none.")
    elif facts.conditioning == "label":
        prompts = list(LabelFileDataset.from_file(str(prompts_file)).labels)
    else:
        prompts = list(PromptDataset.from_file(str(prompts_file)).prompts)
    record = _student_record(source, num_steps, guidance, invert)
    if solver != "ddim" and (invert is not None or record is not None):
        raise ValueError(
            "solver: expected ddim for real images inverted and for a student's own steps, got "
            f"{solver}. Leave it out."
        )
    with owned_by_first(Path(pairs_dir), "pairs_dir"):
        known_by = _same_teacher(Path(pairs_dir), source)
        state = process_state()
        family = load_family(source)
        size_fits(resolution, family)
        bank = RoleBank(family, {"teacher": Role()}, Tuning())
        family.pipeline.to(state.device)

        def encode(rows: Sequence[Any]) -> Cond:
            return family.encode(rows).to(state.device)

        def null(bsz: int) -> Cond:
            return family.null(bsz).to(state.device)

        common: dict[str, Any] = {
            "shape": family.sample_shape(resolution, resolution),
            "model": str(source),
            "teacher": known_by,
            "guidance": guidance,
            "times": uniform_grid(num_steps, family.shift_at(resolution, resolution)),
            "batch_size": batch_size,
            "device": state.device,
            "rank": state.process_index,
            "world_size": state.num_processes,
            "progress": state.is_main_process,
        }
        denoiser = bank["teacher"]
        count = len(folder) if num_pairs is None and folder is not None else num_pairs
        assert count is not None
        sized = fitted(folder, family.image_size(resolution), family.size_multiple)
        if invert is not None:
            invert_pairs(denoiser, encode, null, family.latents, sized, pairs_dir, count, **common)
        else:
            if sized is not None:
                common["beside"] = RowsBeside(family, sized, common["shape"], state.device)
                prompts = common["beside"].prompts
            if record is not None:
                grid, times = record["grid"], tuple(record["times"])
                until = (*grid, 0.0)[grid.index(times[-1]) + 1]
                common |= {"times": times, "kind": record["kind"], "until": until, "guidance": 1.0}
            common |= {"solver": solver, "seed": seed}
            generate_pairs(denoiser, encode, null, prompts, pairs_dir, count, **common)
        state.wait_for_everyone()
        return Path(pairs_dir)


def _begins_fitly(facts: TeacherFacts, source: ModelSource, given: Sequence[str]) -> None:
    """Errors: ValueError for other than one thing to begin with, or one that the model can't."""
    wanted = ["train_data_dir"] if facts.family.reads else []
    wanted += [] if facts.needs_images else ["prompts_file", "invert"]
    if len(given) == 1 and given[0] in wanted:
        return
    got = " and ".join(f"--{name}" for name in given) or "neither"
    if facts.needs_images:
        raise ValueError(
            "pairs: expected --train_data_dir FOLDER (captions with the images that "
            f"{source.model!r} reads beside the prompt), got {got}."
        )
    raise ValueError(
        "pairs: expected --prompts_file (noises solved to images) or --invert FOLDER (images "
        f"inverted to noises), got {got}."
    )


def _student_record(
    source: ModelSource, num_steps: int, guidance: float, images: object
) -> dict[str, Any] | None:
    """distillation.json of a high-noise expert's student; None of other models.

    Errors: ValueError where it hands over to nobody, or for options that its own steps overrule.
    """
    file = Path(source.model) / EXPORT_RECORD
    record = read_json(file) if file.is_file() else {}
    if record.get("expert", "both") == "both" or "lora" in record:
        return None
    if record["expert"] != "high" or record["grid"][-1] == record["times"][-1]:
        raise ValueError(
            "pairs: expected the export of a run with --expert high that hands over to a low-noise "
            f"expert, got one of {record['expert']} at {record['times']} of {record['grid']}."
        )
    if images is not None or guidance != 1.0 or num_steps != 50:
        raise ValueError(
            "pairs: expected prompts or first frames alone with a high-noise expert's student, "
            f"whose own steps are taken without guidance, got guidance {guidance:g}, num_steps "
            f"{num_steps}{', --invert' if images is not None else ''}. Leave those out."
        )
    return record


def _same_teacher(folder: Path, source: ModelSource) -> dict[str, Any]:
    """What the teacher is: its files by hash, and the LoRAs merged into it.

    Errors: ValueError where the folder holds pairs of another one under the same settings.
    """
    loras = [
        {key: fact[key] for key in fact if key not in ("source", "weight_name")}
        if fact.keys() & {"sha256", "commit"}
        else fact
        for fact in lora_facts(source.teacher_lora)
    ]
    files = source.identity()
    manifest = folder / MANIFEST
    was = read_json(manifest).get("teacher") if manifest.is_file() else None
    odd = differing(was["files"], files) if was else None
    if odd:
        raise ValueError(
            f"pairs: expected the teacher that {folder} was made with, got another content of "
            f"{odd[0] or 'its file'} in {source.model}. Put the earlier files back, or use a new "
            "folder."
        )
    return {"files": files, "teacher_lora": loras}
