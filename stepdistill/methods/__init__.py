"""The table of methods: name -> class and status. A new method adds its lines here."""

from __future__ import annotations

from stepdistill.core.method import MethodInfo
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd import DMD
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
    "consistency": MethodInfo(Consistency, "trained on real data here"),
    "dmd": MethodInfo(DMD, "trained on real data here"),
    "dmd2": MethodInfo(DMD2, "trained on real data here"),
    "f_distill": MethodInfo(FDistill, "trained on real data here"),
    "lora_guidance": MethodInfo(LoRAGuidance, "trained on real data here"),
    "pcm": MethodInfo(PCM, "trained on real data here"),
    "reflow": MethodInfo(Reflow, "trained on real data here"),
    "rfpp": MethodInfo(RFPP, "trained on real data here"),
    "slimflow": MethodInfo(SlimFlow, "trained on real data here"),
    "tscd": MethodInfo(TSCD, "trained on real data here"),
    "vsd": MethodInfo(VSD, "trained on real data here"),
}
