"""What a fake mode leaves behind in its process."""

from __future__ import annotations

import subprocess
import sys

FORK = """
import os
import torch
from stepdistill.planning.fakes import fake_mode

def learn():
    torch.ones(1, requires_grad=True).sum().backward()

with {mode}:
    torch.ones(1)
learn()
child = os.fork()
if not child:
    try:
        learn()
    except RuntimeError as err:
        print(err)
    os._exit(0)
os.waitpid(child, 0)
"""
PLAIN = "torch._subclasses.fake_tensor.FakeTensorMode()"


def test_a_process_forked_after_a_forecast_trains() -> None:
    """In processes that had no backward before, as a test's place in a suite would decide."""

    def said(mode: str) -> str:
        command = [sys.executable, "-c", FORK.format(mode=mode)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert said("fake_mode()") == ""
    assert "fork-based" in said(PLAIN)  # what it is for; where this fails, fake_mode can go
