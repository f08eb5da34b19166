"""Show methods with their status, and pipeline families."""

from __future__ import annotations

from stepdistill.config.flags import CommandOptions


class Options(CommandOptions):
    """None of its own."""


def run(options: Options) -> None:
    from rich.console import Console
    from rich.table import Table

    from stepdistill.families.registry import FAMILIES, family_class
    from stepdistill.methods import METHODS

    facts = ("method", "also called", "paper", "steps", "data", "status")
    methods = Table(*facts, title="methods")
    for name, method in METHODS.items():
        steps, aliases = ", ".join(map(str, method.steps)), ", ".join(method.aliases)
        methods.add_row(name, aliases, method.paper, steps, method.data, method.status)
    families = Table("family", "pipeline classes", "conditioning", title="families")
    for name in FAMILIES:
        cls = family_class(name)
        families.add_row(name, ", ".join(cls.pipelines), cls.conditioning)
    console = Console()
    console.print(methods)
    console.print(families)
