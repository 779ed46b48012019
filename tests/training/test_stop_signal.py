"""Signals that end a run, and those that belong to a launcher."""

import os
import signal
import subprocess
import sys

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


def test_a_command_that_a_task_of_submitit_starts_has_no_handler_of_submitit() -> None:
    code = (
        "import os, signal; from mmpretrain.training import stop_signal as s; s.exit_when_asked()\n"
        "with s.StopSignal(print) as stop: os.kill(os.getpid(), signal.SIGTERM); print(stop.received, stop.exit_code())"
    )
    environment = {**os.environ, "SUBMITIT_EXECUTOR": "local"}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "True 85\n"
