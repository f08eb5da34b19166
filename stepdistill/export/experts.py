"""Students of a model with two denoisers: the boundary their calls are told apart by, the names of
their files, and one pipeline of two runs.

The stock call asks `transformer` where t >= boundary_ratio * num_train_timesteps, with the times
that its scheduler lists: exact ones (FlowMatchEuler) or whole numbers below them (UniPC). A grid
may come upon the boundary (shift 7: 875 of .875), where rounding would decide; then the ratio is
put between the two times.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from math import floor
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from stepdistill.config.tuning import Tuning
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Role
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import SAME_TIME
from stepdistill.export.weights import stock_net
from stepdistill.families.experts import PARTS
from stepdistill.families.family import Family
from stepdistill.loading.expert_files import EXPERT
from stepdistill.loading.safe_files import load_part
from stepdistill.loading.source import ModelSource
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.files import EXPORT_RECORD, read_json

_MARGIN = 1e-3  # of a model time: what float32 leaves of one


def calls_of(times: Sequence[float], boundary: float) -> tuple[int, int]:
    """(calls of the high expert, calls of the low one) of a grid of path times."""
    high = sum(t >= boundary - SAME_TIME for t in times)
    return high, len(times) - high


def boundary_ratio(times: Sequence[float], boundary: float, total: int = 1000) -> float | None:
    """The ratio by which the stock call asks the experts as `boundary` does, whether its scheduler
    lists exact times or whole numbers: the boundary itself where both do, else one between the two
    times; None where the low expert is never asked.

    Args: times: descending path times in (0, 1]. total: num_train_timesteps.
    """
    high, low = calls_of(times, boundary)
    if not low:
        return None
    after = total * times[high]
    before = floor(total * times[high - 1]) if high else float(total + 1)
    ratio = boundary
    if not after + _MARGIN < total * boundary <= before - _MARGIN:
        ratio = 0.5 * (after + before) / total
    for listed in (times, [floor(total * t) / total for t in times]):
        asked = sum(total * t >= ratio * total for t in listed)
        if asked != high:
            raise ValueError(
                f"export: expected a boundary_ratio that sends {high} of {[*times]} to the "
                f"high-noise expert, got {asked} at {ratio:g}: two times are within one of "
                f"{total}. Take fewer steps, or another shift."
            )
    return ratio


def trained_boundary(family: Family) -> float | None:
    """The boundary that the students of a family with two experts were trained at; None without."""
    if family.expert != "both":
        low, high = family.owned
        return low if family.expert == "high" else high
    ratio: float | None = family.pipeline.config.get("boundary_ratio")
    return ratio


def expert_facts(family: Family, times: Sequence[float]) -> dict[str, Any] | None:
    """What the record says of the experts' shares of a grid; None for a model of one denoiser."""
    ratio = trained_boundary(family)
    if ratio is None:
        return None
    chosen = boundary_ratio(times, ratio, family.pipeline.scheduler.config.num_train_timesteps)
    calls = dict(zip(("high", "low"), calls_of(times, ratio), strict=True))
    return {"boundary_ratio": chosen, "trained_boundary": ratio, "calls": calls}


def settle_experts(family: Family, pipeline: Any, times: Sequence[float]) -> dict[str, Any] | None:
    """Set boundary_ratio of a pipeline with both experts for that grid; see `expert_facts`."""
    facts = expert_facts(family, times)
    if facts is not None and family.expert == "both":
        if facts["boundary_ratio"] is None:  # one expert is a pipeline of one transformer
            pipeline.register_modules(**{PARTS["low"]: None})
        pipeline.register_to_config(boundary_ratio=facts["boundary_ratio"])
    return facts


def expert_part(family: Family, component: str) -> str:
    """The component of the whole pipeline that a denoiser of this family's is: of one expert alone,
    which is loaded as the first, perhaps the second."""
    return PARTS["low"] if family.expert == "low" else component


def expert_at(family: Family, component: str) -> str | None:
    """ "high" or "low" of a component of the whole pipeline; None for a model of one denoiser."""
    named = {name: expert for expert, name in PARTS.items()}
    return None if trained_boundary(family) is None else named[component]


def expert_name(name: str, expert: str) -> str:
    """A LoRA file's name with its expert's in it, as such files are known by."""
    stem = name.removesuffix(".safetensors")
    return f"{'' if stem == 'pytorch_lora_weights' else stem + '_'}{expert}_noise_lora.safetensors"


def mark(file: Path, expert: str, boundary: float | None) -> None:
    """Say in a LoRA file's header which expert it is for: nothing else in it does."""
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
    metadata |= {EXPERT: f"{expert}_noise", "boundary_ratio": f"{boundary:g}"}
    save_file(load_file(file), file, metadata=metadata)


# ------------------------------------------------------------- two runs, one pipeline
def joined(
    family: Family, bank: RoleBank, role: str, spec: SamplerSpec, high: str | Path | None
) -> tuple[Family, Denoiser, nn.Module, SamplerSpec]:
    """(family, denoiser, network, sampler) of both students: the low-noise one of this bank, and
    the high-noise one of the folder `high`, a pipeline export of its own run.

    Errors: ValueError where that is no such export, of another base, grid or rule, before a weight
        is read.
    """
    record = _high_record(high)
    wanted = {"grid": list(spec.grid), "kind": spec.kind, "family": family.name}
    differ = {key: (record.get(key), value) for key, value in wanted.items()}
    differ = {key: pair for key, pair in differ.items() if pair[0] != pair[1]}
    if differ:
        raise ValueError(
            f"high_student: expected the high-noise student of the same steps, got (its, this "
            f"run's) {differ} in {high}. Train both with the same num_steps, shift and sampler."
        )
    net: Any = stock_net(bank, role)
    index = ModelSource(str(high)).index
    other = load_part(str(high), index, family.net_name, torch_dtype=net.dtype)
    pipeline = copy.copy(family.pipeline)
    named = {PARTS["high"]: other.to(net.device), PARTS["low"]: net}
    pipeline.register_modules(**named)
    pipeline.register_to_config(boundary_ratio=family.owned[1])
    both = type(family)(pipeline)
    plain = RoleBank(both, {role: Role()}, Tuning())
    return both, plain[role], both.net, spec.whole


def _high_record(folder: str | Path | None) -> Mapping[str, Any]:
    """distillation.json of a high-noise student's export."""
    if folder is None:
        raise ValueError(
            "high_student: expected the pipeline export of the high-noise expert's run beside a "
            "low-noise student, which alone makes nothing, got none. Give --high_student FOLDER, "
            "or export --format lora."
        )
    file = Path(folder) / EXPORT_RECORD
    record = read_json(file) if file.is_file() else {}
    if record.get("expert") != "high" or "lora" in record:
        got = f"one of {record['expert']}" if "expert" in record else "none"
        raise ValueError(
            f"high_student: expected a pipeline export of a run with --expert high in {folder}, "
            f"got {got}. Export that run: stepdistill export HIGH_RUN OUT."
        )
    return record
