"""The forecast as a table, what would make it fit, and how long a thousand steps take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.table import Table

from stepdistill.config.run import RunConfig
from stepdistill.monitoring.validation_line import line_of
from stepdistill.planning.costs import Cost, Forecast
from stepdistill.planning.recipes import verdict

GIB = 2**30
# Peak dense bf16 rates, TFLOP/s, and memory, GB: NVIDIA's data sheets of these cards.
GPUS: dict[str, tuple[float, float]] = {
    "rtx4090": (165.2, 24),
    "rtx5090": (209.5, 32),
    "l40s": (362.0, 48),
    "a100": (312.0, 80),
    "h100": (989.4, 80),
    "h200": (989.4, 141),
}
UTILISATION = 0.4  # the share of the peak rate that large diffusion training usually reaches


def hours_per_1k(plan: Forecast, gpu: str) -> float:
    """Estimated hours of a thousand student steps on one GPU, at UTILISATION of its peak."""
    return plan.flops_per_step * 1000 / (GPUS[gpu][0] * 1e12 * UTILISATION) / 3600


def print_plan(
    run: RunConfig,
    num_gpus: int,
    gpu: str,
    memory_gb: float | None,
    stored: Forecast | None = None,
    complete: Callable[[], RunConfig] | None = None,
) -> bool:
    """Print the table and, where it does not fit, what would; returns whether the run fits.

    Args: stored: the forecast of a run that is known by it, and that `complete` then gives with
        its method's options: what would fit is traced, which the table needs not.
    Errors: ValueError for an unknown GPU.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu: expected one of {sorted(GPUS)}, got {gpu!r}.")
    room = (memory_gb or GPUS[gpu][1]) * 1e9
    plan, console = stored or _traced(run), Console()
    console.print(table(plan, run))
    for sharding in ("ddp", "fsdp2") if num_gpus > 1 else ("ddp",):
        size = plan.peak_on(num_gpus, sharding)
        text = f"{num_gpus} x {sharding}" if num_gpus > 1 else "one process"
        console.print(f"{text}: {size / GIB:.2f} GiB on each device")
    console.print(
        f"{plan.flops_per_step / 1e12:.1f} TFLOP a step; estimate: "
        f"{hours_per_1k(plan, gpu):.2f} h per 1,000 steps on {gpu} "
        f"({UTILISATION:.0%} of its peak rate), "
        f"{hours_per_1k(plan, gpu) * run.max_train_steps / 1000:.2f} h for {run.max_train_steps:,}"
    )
    if plan.validation:
        console.print(line_of(plan.validation))
    peak = plan.peak_on(num_gpus)
    if (fit := verdict(peak, room)) != "no":
        tight = f"tight ({peak / room:.0%} of it is forecast): " if fit == "tight" else ""
        console.print(f"{tight}fits {room / 1e9:g} GB")
        return True
    console.print(f"does not fit {room / 1e9:g} GB")
    for text, smaller in suggestions(complete() if complete else run, plan):
        size = _traced(smaller).peak_on(num_gpus)
        fit = "fits" if size <= room else "does not fit either"
        console.print(f"  {text}: {size / GIB:.2f} GiB, {fit}")
        if size <= room:
            break
    return False


def _traced(run: RunConfig) -> Forecast:
    from stepdistill.planning.forecast import forecast  # Torch and Diffusers

    return forecast(run)


def table(plan: Forecast, run: RunConfig) -> Table:
    """What is held, in GiB."""
    packed = "" if plan.quantization == "none" else f", {plan.quantization}"
    made = Table("what", "GiB", title=f"{plan.method} on {plan.model}")
    rows = [
        (f"frozen denoiser ({plan.num_parameters / 1e6:,.0f} M parameters{packed})", plan.frozen),
        *((("frozen beside it, in every call", plan.beside),) if plan.beside else ()),
        *((f"trained: {role}", size) for role, size in plan.trained.items()),
        ("averaged weights", plan.averaged),
        ("optimiser", plan.optimizer),
        ("text encoders" if plan.judges else "text encoders and VAE", plan.encoders),
        *((("scorers, and what decodes for them", plan.judges),) if plan.judges else ()),
        ("encoding a prompt, above that", plan.encoding),
        *((f"phase {_name(c)}: gradients and activations", c.activations) for c in plan.phases),
        ("peak of one process", plan.peak),
    ]
    for name, size in rows:
        made.add_row(name, f"{size / GIB:.2f}")
    checkpointing = "on" if plan.checkpointing else "off"
    made.caption = f"batch {run.train_batch_size}, gradient checkpointing {checkpointing}"
    return made


def _name(cost: Cost) -> str:
    return f"{cost.phase} from step {cost.since}" if cost.since else cost.phase


def suggestions(run: RunConfig, plan: Forecast) -> Iterator[tuple[str, RunConfig]]:
    """Cheaper runs, the change that saves most first, each keeping the changes before it.

    Which saves most is estimated from the run's forecast; a harsher form of a change (nf4 after
    int8) is offered once the milder one is made.
    """
    lines: list[str] = []
    done: set[str] = set()
    while True:
        left = [change for change in _changes(run, plan) if change[1] not in done]
        if not left:
            return
        _, name, changes = max(left, key=lambda change: change[0])
        lines.append(name)
        done.add(name)
        run = run.model_copy(update=dict(changes))
        yield ", ".join(lines), run


def _changes(run: RunConfig, plan: Forecast) -> Iterator[tuple[float, str, Mapping[str, object]]]:
    """(bytes that it saves about, name, options) of each change that the run has not made yet."""
    tuning = run.tuning
    activations = max((c.activations for c in plan.phases), default=0) - plan.gradients
    trained = sum(plan.trained.values()) + plan.gradients + plan.optimizer
    wide = 0.5 if run.frozen_dtype.itemsize == 4 else 0.0
    if not plan.checkpointing and run.gradient_checkpointing is not True:
        yield 0.7 * activations, "gradient_checkpointing", {"gradient_checkpointing": True}
    if run.mixed_precision == "no":
        saved = wide * (plan.frozen + plan.beside + plan.encoders) + 0.5 * activations
        yield saved, "mixed_precision=bf16", {"mixed_precision": "bf16"}
    if not run.offload_encoders:
        yield plan.encoders, "offload_encoders", {"offload_encoders": True}
    if "full" in (tuning.student, tuning.fake) and tuning.student_config is None:
        lora = tuning.model_copy(update={"student": "lora", "fake": "lora"})
        yield 0.9 * trained, "student=lora, fake=lora", {"tuning": lora}
    if run.train_batch_size > 1:
        share = 1 - 1 / run.train_batch_size
        steps = run.gradient_accumulation_steps * run.train_batch_size
        smaller = {"train_batch_size": 1, "gradient_accumulation_steps": steps}
        yield share * activations, "batch 1 with accumulation", smaller
    if run.optimizer == "adamw":
        saved = plan.optimizer - plan.optimizer_8bit
        yield saved, "optimizer=adamw_8bit", {"optimizer": "adamw_8bit"}
    lora_alone = tuning.student == tuning.fake == "lora"
    for kind, before, share in (("int8", "none", 0.5), ("nf4", "int8", 0.25)):
        if lora_alone and tuning.base_quantization == before:
            packed = tuning.model_copy(update={"base_quantization": kind})
            yield share * plan.frozen, f"base_quantization={kind}", {"tuning": packed}
    if run.ema_decay:
        yield plan.averaged, "ema_decay=0", {"ema_decay": 0.0}
    if tuning.rank > 16:
        saved = trained * (1 - 16 / tuning.rank) if lora_alone else 0.0
        small = tuning.model_copy(update={"rank": 16, "alpha": None})
        yield saved, "rank=16", {"tuning": small}
