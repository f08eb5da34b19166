"""Peak memory between two moments: of CUDA's allocator, or of this process where there is none."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Starts at construction; `gib` says the peak since then. kind: what is counted."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "CUDA allocator" if device.type == "cuda" else "resident set of the process"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                _RESET.write_text("5")  # Linux: the high-water mark starts anew
            except OSError:
                self.kind += ", since it started"

    @property
    def gib(self) -> float:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        if _STATUS.is_file():
            lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
            return int(lines["VmHWM"].split()[0]) / 2**20
        units = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units
