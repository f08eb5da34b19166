"""Show methods with their status, and pipeline families."""

from __future__ import annotations

from stepdistill.config.flags import CommandOptions


class Options(CommandOptions):
    """What is shown."""

    where: bool = False
    """Print only the folder that holds configs/, pipelines/ and train/:
    accelerate launch "$(stepdistill list --where)/train/reflow.py" ..."""


def run(options: Options) -> None:
    if options.where:
        from stepdistill.storage.bundled import project_folder

        print(project_folder())
        return
    from rich.console import Console
    from rich.table import Table

    from stepdistill.families.registry import FAMILIES
    from stepdistill.methods import METHODS

    methods = Table("method", "also called", "paper", "steps", "data", "status", title="methods")
    for name, cls in METHODS.items():
        steps = ", ".join(map(str, cls.steps))
        methods.add_row(name, ", ".join(cls.aliases), cls.paper, steps, cls.data, cls.status)
    told = ("pipeline classes", "conditioning", "LoRA loaded by")
    families = Table("family", *told, title="families")
    for name, family in FAMILIES.items():
        reads = "prompt and image" if family.reads_image else family.conditioning
        loader = "Diffusers" if family.has_lora_loader() else "PEFT"
        families.add_row(name, ", ".join(family.pipelines), reads, loader)
    console = Console()
    console.print(methods)
    console.print(families)
