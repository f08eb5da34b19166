"""The table of methods: name -> class and status. A new method adds its lines here."""

from __future__ import annotations

from stepdistill.core.method import MethodInfo
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.f_distill import FDistill
from stepdistill.methods.lora_guidance import LoRAGuidance
from stepdistill.methods.pcm import PCM
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.rfpp import RFPP
from stepdistill.methods.slimflow import SlimFlow
from stepdistill.methods.tscd import TSCD
from stepdistill.methods.vsd import VSD

METHODS: dict[str, MethodInfo] = {
    "consistency": MethodInfo(Consistency, "checked on analytic teachers"),
    "dmd2": MethodInfo(DMD2, "trained on real data here"),
    "f_distill": MethodInfo(FDistill, "checked on analytic teachers"),
    "lora_guidance": MethodInfo(LoRAGuidance, "checked on analytic teachers"),
    "pcm": MethodInfo(PCM, "checked on analytic teachers"),
    "reflow": MethodInfo(Reflow, "checked on analytic teachers"),
    "rfpp": MethodInfo(RFPP, "checked on analytic teachers"),
    "slimflow": MethodInfo(SlimFlow, "checked on analytic teachers"),
    "tscd": MethodInfo(TSCD, "checked on analytic teachers"),
    "vsd": MethodInfo(VSD, "checked on analytic teachers"),
}
