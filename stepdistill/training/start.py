"""Where a student's first weights come from besides the teacher: another run or pipeline.

SwiftBrush v2 starts from SD-Turbo under a Stable Diffusion 2.1 teacher (arXiv:2408.14176): a full
student takes its weights, a LoRA student sits on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.config.run import TrainConfig
from stepdistill.families.decoder import decoder_config
from stepdistill.families.experts import PARTS
from stepdistill.families.family import Family
from stepdistill.families.registry import TeacherFacts, teacher_facts
from stepdistill.loading.place import absolute, is_hub_id
from stepdistill.loading.safe_files import no_pickles
from stepdistill.loading.stored_tensors import StoredTensors
from stepdistill.roles.rolebank import RoleBank
from stepdistill.training.checkpoint import saved_student


def is_pipeline(source: str) -> bool:
    """Whether it names a Diffusers pipeline, by folder or Hub id, rather than a run of ours."""
    folder = Path(source)
    if folder.exists():
        return (folder / "model_index.json").is_file()
    return is_hub_id(source)


def check_start(args: TrainConfig, teacher: TeacherFacts, training: bool) -> None:
    """Say what is wrong with init_student_from and, for training, with decoder; reads no weight.

    Errors: ValueError for a source without a student, for a pipeline of another family than the
        teacher's or of another prediction type.
    """
    if training and args.decoder is not None:
        decoder_config(args.decoder)
    source = args.init_student_from
    if source is None:
        return
    if not is_pipeline(source):
        saved_student(source)
        return
    try:
        start = teacher_facts(source)
    except OSError as err:
        raise ValueError(
            f"init_student_from: expected a run, a checkpoint, or a pipeline's folder or Hub id, "
            f"got {source!r}. {err}"
        ) from err
    of_all_times = teacher.setting.owned == (0.0, 1.0)  # one of two is looked for by its own name
    if of_all_times and teacher.num_nets != start.num_nets:
        raise ValueError(
            f"init_student_from: expected a pipeline of as many denoisers as the teacher's, "
            f"{teacher.num_nets}, got {source!r} with {start.num_nets}."
        )
    expected, got = ((facts.family, facts.setting.kind) for facts in (teacher, start))
    if expected != got:
        raise ValueError(
            f"init_student_from: expected a pipeline of the teacher's family and prediction type "
            f"({expected[0].name}, {expected[1]}), got {source!r} ({got[0].name}, {got[1]})."
        )


def student_base_of(args: TrainConfig) -> str | None:
    """The pipeline whose frozen network a LoRA student's adapter sits on; None: the teacher's.

    An adapter begins at no change, so a LoRA student that starts at a pipeline is one on it. A full
    student, or one that starts at a run, only takes weights.
    """
    source = args.init_student_from
    lora = args.tuning.student == "lora"
    return absolute(source) if lora and source is not None and is_pipeline(source) else None


def load_student_base(family: Family, source: str, dtype: torch.dtype) -> Any:
    """That network, in `dtype`. Errors: ValueError where it is not the teacher's architecture."""
    teacher: Any = family.net
    net = _denoiser_of(family, type(family.first_net), source, dtype)
    expected, got = teacher.config, net.config
    private = {"sample_size", "time_cond_proj_dim"}  # neither changes what an adapter sits on
    differ = [k for k in expected if k[0] != "_" and k not in private and expected[k] != got.get(k)]
    if differ:
        raise ValueError(
            f"init_student_from: expected a {family.net_name} of the teacher's architecture, got "
            f"{source!r}, whose config differs in {differ[:3]}."
        )
    return net


def _denoiser_of(family: Family, cls: Any, source: str, dtype: torch.dtype) -> Any:
    """The network of that class in another pipeline, by whichever parts this family's has."""
    names = (PARTS[family.expert],) if family.expert != "both" else family.net_parts
    options = {"use_safetensors": True, "dtype": dtype}
    with no_pickles("init_student_from"):
        nets = [cls.from_pretrained(source, subfolder=name, **options) for name in names]
    return family.net_of(nets).eval()


def start_student(bank: RoleBank, source: str) -> None:
    """Load another student into this one's weights, and into every role that follows it.

    Errors: ValueError where names or shapes differ.
    """
    if is_pipeline(source):
        bank.load_role_state("student", pipeline_student(bank, source))
    else:
        bank.load_role_state("student", StoredTensors(saved_student(source)))
    for role, spec in bank.roles.items():
        if spec.ema_of == "student":
            bank.ema_update(role, 0.0)


def pipeline_student(bank: RoleBank, source: str) -> dict[str, Tensor]:
    """The student's whole state from a pipeline's denoiser.

    A guidance input of the student's that the pipeline's network lacks keeps its zeros; one of
    the pipeline's that is all zeros does nothing and is left out (our exports may carry it).
    """
    net: Any = bank.nets["student"]
    cls = type(bank.family.parts_of(net)[bank.family.net_name])
    loaded = _denoiser_of(bank.family, cls, source, torch.float32)
    weights = net.state_dict()
    state = {
        name: value
        for name, value in loaded.state_dict().items()
        if name in weights or not name.endswith("cond_proj.weight") or bool(value.any())
    }
    if bank.roles["student"].extra_inputs:
        state = {**weights, **state}
    differ = [n for n in weights if n in state and state[n].shape != weights[n].shape]
    if differ or weights.keys() != state.keys():
        odd = [*sorted(weights.keys() ^ state.keys())[:3], *differ[:3]]
        raise ValueError(
            f"init_student_from: expected a {bank.family.net_name} of the student's architecture, "
            f"got {source!r}, which differs in {odd}."
        )
    return state
