"""Show the recipes: model, method, steps, data, and with --plan the memory they take."""

from __future__ import annotations

from stepdistill.config.flags import CommandOptions


class Options(CommandOptions):
    """What is shown."""

    plan: bool = False
    """Forecast the memory of one process at the models' real size; takes minutes a model."""


def run(options: Options) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from stepdistill.config.layers import recipe_files
    from stepdistill.planning.recipes import cards, forecast_gib, method_of, sized

    known = {n: forecast_gib(one) for n, one in sized().items()} if options.plan else {}
    memory = ("GiB", "fits") if options.plan else ()
    table = Table(
        Column("recipe", no_wrap=True), "model", "method", "steps", "data", *memory, "about"
    )
    table.caption = (
        "stepdistill train --recipe NAME --pretrained_model_name_or_path MODEL --data..."
    )
    if options.plan:
        table.caption += " GiB of one process as it stands; fits: cards in GB."
    for name, layers in recipe_files().items():
        about = layers[-1].recipe
        if about is None:
            continue
        model = "< 50 M parameters" if about.size == "small" else about.model
        size = known.get(name)
        fits = "" if size is None else ", ".join(map(str, cards(size))) or "none"
        held = ("" if size is None else f"{size:g}", fits) if options.plan else ()
        steps = ", ".join(map(str, about.steps)) or "-"
        table.add_row(name, model, method_of(layers), steps, about.data, *held, about.about)
    Console().print(table)
