"""Upload an exported folder to the Hub."""

from __future__ import annotations

from pydantic_settings import CliPositionalArg

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Export


class Options(CommandOptions):
    folder: CliPositionalArg[Export]
    """Exported folder."""
    repo_id: CliPositionalArg[str]
    """user/name; private unless it exists."""
    public: bool = False
    """Make a new repository public."""
    dry_run: str | None = None
    """Folder to write what would be sent to; nothing is sent."""


def run(options: Options) -> None:
    from stepdistill.export.hub import dry_run, push_folder

    if options.dry_run:
        for path in dry_run(options.folder, options.repo_id, options.dry_run):
            print(path)
    else:
        print(push_folder(options.folder, options.repo_id, private=not options.public))
