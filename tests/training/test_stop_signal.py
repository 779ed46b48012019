"""Signals that end a run, and those that belong to a launcher."""

import os
import signal

from mmpretrain.training.stop_signal import StopSignal


def test_a_launchers_own_handler_stays() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with StopSignal(lambda seconds: None) as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert heard == [signal.SIGUSR2] and not stop.received
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.received
    finally:
        signal.signal(signal.SIGUSR2, before)
