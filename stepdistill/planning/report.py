"""The forecast as a table, what would make it fit, and how long a thousand steps take."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from stepdistill.config.run import RunConfig
from stepdistill.monitoring.own_validation import line_of
from stepdistill.planning.forecast import Forecast, forecast

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


def print_plan(run: RunConfig, num_gpus: int, gpu: str, memory_gb: float | None) -> bool:
    """Print the table and, where it does not fit, what would; returns whether the run fits.

    Errors: ValueError for an unknown GPU.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu: expected one of {sorted(GPUS)}, got {gpu!r}.")
    room = (memory_gb or GPUS[gpu][1]) * 1e9
    plan, console = forecast(run), Console()
    console.print(table(plan, run))
    for sharding in ("ddp", "fsdp2") if num_gpus > 1 else ("ddp",):
        size = plan.peak_on(num_gpus, sharding)
        told = f"{num_gpus} x {sharding}" if num_gpus > 1 else "one process"
        console.print(f"{told}: {size / GIB:.2f} GiB on each device")
    console.print(
        f"{plan.flops_per_step / 1e12:.1f} TFLOP a step; estimate: "
        f"{hours_per_1k(plan, gpu):.2f} h per 1,000 steps on {gpu} "
        f"({UTILISATION:.0%} of its peak rate)"
    )
    if plan.validation:
        console.print(line_of(plan.validation))
    if plan.peak_on(num_gpus) <= room:
        console.print(f"fits {room / 1e9:g} GB")
        return True
    console.print(f"does not fit {room / 1e9:g} GB")
    for told, smaller in suggestions(run, plan.checkpointing):
        size = forecast(smaller).peak_on(num_gpus)
        verdict = "fits" if size <= room else "does not fit either"
        console.print(f"  {told}: {size / GIB:.2f} GiB, {verdict}")
        if size <= room:
            break
    return False


def table(plan: Forecast, run: RunConfig) -> Table:
    """What is held, in GiB."""
    packed = "" if plan.quantization == "none" else f", {plan.quantization}"
    made = Table("what", "GiB", title=f"{plan.method} on {plan.model}")
    rows = [
        (f"frozen denoiser ({plan.num_parameters / 1e6:,.0f} M parameters{packed})", plan.frozen),
        *((f"trained: {role}", size) for role, size in plan.trained.items()),
        ("averaged weights", plan.averaged),
        ("optimiser", plan.optimizer),
        ("text encoders and VAE", plan.encoders),
        ("encoding a prompt, above that", plan.encoding),
        *((f"phase {c.phase}: gradients and activations", c.activations) for c in plan.phases),
        ("peak of one process", plan.peak),
    ]
    for name, size in rows:
        made.add_row(name, f"{size / GIB:.2f}")
    checkpointing = "on" if plan.checkpointing else "off"
    made.caption = f"batch {run.train_batch_size}, gradient checkpointing {checkpointing}"
    return made


def suggestions(run: RunConfig, checkpointing: bool = False) -> Iterator[tuple[str, RunConfig]]:
    """Cheaper runs, the mildest change first, each keeping the changes before it.

    Args: checkpointing: whether the run recomputes activations already.
    """
    told: list[str] = []

    def step(name: str, **changes: object) -> tuple[str, RunConfig]:
        nonlocal run
        told.append(name)
        run = run.model_copy(update=changes)
        return ", ".join(told), run

    if not checkpointing:
        yield step("gradient_checkpointing", gradient_checkpointing=True)
    if run.mixed_precision == "no":
        yield step("mixed_precision=bf16", mixed_precision="bf16")
    if not run.offload_encoders:
        yield step("offload_encoders", offload_encoders=True)
    if "full" in (run.tuning.student, run.tuning.fake) and run.tuning.student_config is None:
        tuning = run.tuning.model_copy(update={"student": "lora", "fake": "lora"})
        yield step("student=lora, fake=lora", tuning=tuning)
    if run.train_batch_size > 1:
        yield step("batch 1 with accumulation", train_batch_size=1)
    if run.optimizer == "adamw":
        yield step("optimizer=adamw_8bit", optimizer="adamw_8bit")
    lora = run.tuning.student == run.tuning.fake == "lora"
    if lora and run.tuning.base_quantization == "none":
        tuning = run.tuning.model_copy(update={"base_quantization": "int8"})
        yield step("base_quantization=int8", tuning=tuning)
    if run.ema_decay:
        yield step("ema_decay=0", ema_decay=0.0)
    if run.tuning.rank > 16:
        yield step("rank=16", tuning=run.tuning.model_copy(update={"rank": 16, "alpha": None}))
    if lora and run.tuning.base_quantization == "int8":
        tuning = run.tuning.model_copy(update={"base_quantization": "nf4"})
        yield step("base_quantization=nf4", tuning=tuning)
