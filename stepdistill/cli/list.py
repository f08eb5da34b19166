"""Show methods with their status, and pipeline families."""

from __future__ import annotations

from stepdistill.config.flags import CommandOptions


class Options(CommandOptions):
    """None of its own."""


def run(options: Options) -> None:
    from rich.console import Console
    from rich.table import Table

    from stepdistill.families.registry import FAMILIES
    from stepdistill.methods import METHODS

    facts = ("method", "also called", "paper", "steps", "data", "status")
    methods = Table(*facts, title="methods")
    for name, cls in METHODS.items():
        steps = ", ".join(map(str, cls.steps))
        methods.add_row(name, ", ".join(cls.aliases), cls.paper, steps, cls.data, cls.status)
    facts = ("family", "pipeline classes", "conditioning", "LoRA loaded by")
    families = Table(*facts, title="families")
    for name, family in FAMILIES.items():
        told = "prompt and image" if family.reads_image else family.conditioning
        loader = "Diffusers" if family.has_lora_loader() else "PEFT"
        families.add_row(name, ", ".join(family.pipelines), told, loader)
    console = Console()
    console.print(methods)
    console.print(families)
