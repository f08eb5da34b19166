"""Show the recipes: model, method, steps, data, and the memory they take at real size."""

from __future__ import annotations

from stepdistill.config.flags import CommandOptions


class Options(CommandOptions):
    """What is shown."""

    refresh: bool = False
    """Forecast the memory anew, as `plan` does, and write the file that the table is read from."""


def run(options: Options) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    from stepdistill.planning.recipes import CARDS, listed, refresh, sized, verdict

    if options.refresh:
        refresh(sized())
    table = Table(
        *(Column(name, no_wrap=True) for name in ("recipe", "model", "method")),
        "steps",
        "data",
        *(Column(name, no_wrap=True, justify="right") for name in ("GiB", *map(str, CARDS))),
        Column("what it makes", min_width=24),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.caption = (
        "GiB: peak of one process as the recipe stands, by `plan`; does it fit a card of "
        f"{', '.join(map(str, CARDS))} GB (tight: above 90 % of it). `stepdistill plan --recipe "
        "NAME` tells what makes it fit (of several trainings NAME/TRAINING; GiB is the largest).\n"
        "stepdistill train --recipe NAME --pretrained_model_name_or_path MODEL --data..."
    )
    for name, (about, methods, peak) in listed().items():
        model = "below 50 M" if about.size == "small" else about.model
        memory = ["-"] * (1 + len(CARDS))
        if peak is not None:
            memory = [f"{peak / 2**30:.1f}", *(verdict(peak, card * 1e9) for card in CARDS)]
        steps = ", ".join(map(str, about.steps)) or "-"
        table.add_row(name, model, ", ".join(methods), steps, about.data, *memory, about.about)
    console = Console()
    Console(width=console.width if console.is_terminal else 150).print(table)
