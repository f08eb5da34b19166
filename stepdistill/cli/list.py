"""Show methods with their status, and pipeline families."""

from __future__ import annotations

from stepdistill.config.flags import CommandOptions


class Options(CommandOptions):
    """What is shown."""

    where: bool = False
    """Print only the folder that holds configs/, pipelines/ and train/:
    accelerate launch "$(stepdistill list --where)/train/reflow.py" ..."""
    method: str | None = None
    """FILE.py:CLASS of a method of your own to show too. The file is run, and its content noted:
    export finds the method of a run by its record only where that is one you have named."""
    family: str | None = None
    """FILE.py:CLASS of a family of your own, likewise."""


def run(options: Options) -> None:
    if options.where:
        from stepdistill.storage.bundled import project_folder

        print(project_folder())
        return
    from rich.console import Console
    from rich.table import Column, Table

    from stepdistill.families import FAMILIES
    from stepdistill.methods import METHODS
    from stepdistill.storage.own_code import named_by_user

    for registry, text in ((METHODS, options.method), (FAMILIES, options.family)):
        if text is not None:
            named_by_user(registry, text)

    def table(title: str, *columns: str) -> Table:
        return Table(*(Column(name, overflow="fold") for name in columns), title=title)

    methods = table("methods", "method", "also called", "paper", "steps", "data", "status")
    for name, facts in METHODS.index.items():
        steps, called = ", ".join(map(str, facts["steps"])), ", ".join(facts["aliases"])
        methods.add_row(name, called, facts["paper"], steps, facts["data"], facts["status"])
    families = table("families", "family", "pipeline classes", "conditioning", "LoRA loaded by")
    for name, facts in FAMILIES.index.items():
        images = (f"{name}" if needed else f"({name})" for name, needed in facts["reads"].items())
        reads = " and ".join((facts["conditioning"], *images))
        loader = "Diffusers" if facts["has_lora_loader"] else "PEFT"
        families.add_row(name, ", ".join(facts["pipelines"]), reads, loader)
    for registry, made in ((METHODS, methods), (FAMILIES, families)):
        for name, place in registry.others.items():
            made.add_row(name, place)
    console = Console()
    console.print(methods)
    console.print(families)
