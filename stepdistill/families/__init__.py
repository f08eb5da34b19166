"""The families: every module here that holds one, and those of other packages' entry points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepdistill.core.registry import Registry

if TYPE_CHECKING:
    from stepdistill.families.family import Family

_FACTS = ("pipelines", "conditioning", "needs_images", "reads", "has_lora_loader")
FAMILIES: Registry[Family] = Registry(__name__, "stepdistill.families.family:Family", _FACTS)
