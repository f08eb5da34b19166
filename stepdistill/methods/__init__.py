"""The table of methods: name -> class and status. A new method adds its lines here."""

from __future__ import annotations

from stepdistill.core.method import MethodInfo
from stepdistill.methods.dmd2 import DMD2

METHODS: dict[str, MethodInfo] = {
    "dmd2": MethodInfo(DMD2, "checked on analytic teachers"),
}
