"""The methods: every module here that holds one, and those of other packages' entry points."""

from __future__ import annotations

from typing import Any

from stepdistill.core.method import Method
from stepdistill.core.registry import Registry

METHODS: Registry[Method[Any]] = Registry("stepdistill.methods", Method)
