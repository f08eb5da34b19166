"""The methods: every module here that holds one, and those of other packages' entry points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepdistill.core.registry import Registry

if TYPE_CHECKING:
    from stepdistill.core.method import Method

_FACTS = ("aliases", "paper", "steps", "data", "status", "trainer")
METHODS: Registry[Method[Any]] = Registry(__name__, "stepdistill.core.method:Method", _FACTS)
