"""Whom a signal reaches, what is handed back, and which processes have lost their launcher."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from stepdistill.core import stopping
from stepdistill.core.stopping import PARENT, STOP_SIGNALS, Stopped, handling, raise_stopped


@pytest.fixture(params=[signal.SIG_DFL, lambda *_: None], ids=["default", "own"])
def earlier(request):
    """The handler that was there before, of SIGUSR1."""
    before = signal.signal(signal.SIGUSR1, request.param)
    yield request.param
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_goes_to_the_handler_and_then_to_the_earlier_one_again(earlier) -> None:
    heard = []
    with handling(lambda number, _: heard.append(number), STOP_SIGNALS):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) == earlier


@pytest.mark.parametrize("ignored", [True, False])
def test_a_ctrl_c_that_is_ignored_stays_so(ignored, monkeypatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        signals = (signal.SIGINT, signal.SIGUSR1)
        with handling(raise_stopped, signals):
            now = [signal.getsignal(number) for number in signals]
        assert now == [signal.SIG_IGN if ignored else raise_stopped, raise_stopped]
    finally:
        signal.signal(signal.SIGINT, before)


def test_beside_the_main_thread_nothing_is_set() -> None:
    before, within = signal.getsignal(signal.SIGUSR1), []

    def work() -> None:
        with handling(raise_stopped, STOP_SIGNALS):
            within.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert within == [before]


def test_stopped_names_its_signal() -> None:
    with pytest.raises(Stopped, match="SIGTERM"):
        raise_stopped(signal.SIGTERM, None)


@pytest.mark.parametrize("launched", [True, False])
@pytest.mark.parametrize("gone", [True, False])
def test_an_orphan_is_a_launched_process_whose_parent_is_another(
    launched, gone, monkeypatch
) -> None:
    for name in stopping._LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv(PARENT, "1")
    monkeypatch.setattr(stopping, "_parent", -1 if gone else os.getppid())
    assert stopping.orphaned() == (launched and gone)
    if launched and gone:
        with pytest.raises(Stopped, match="launcher is gone"):
            stopping.stop_if_orphaned()
    else:
        stopping.stop_if_orphaned()
