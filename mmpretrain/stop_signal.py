"""SIGTERM and SIGINT: a checkpoint and exit code 85, from the first import on. Imports nothing that takes time."""

import importlib
import os
import signal
import time
from types import FrameType, TracebackType

PREEMPTED_EXIT_CODE = 85
_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A signal asked for the end; what is saved stands."""


class StopSignal:
    """Inside the block SIGTERM and SIGINT are noted, so that the loop can save and end.

    A second SIGINT ends at once. A second SIGTERM is ignored, since launchers forward duplicates.
    """

    def __init__(self) -> None:
        self.received_at: float | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in _NUMBERS}

    @property
    def received(self) -> bool:
        """Whether a signal came."""
        return self.received_at is not None

    def is_overdue(self, seconds: float) -> bool:
        """Whether a signal came at least so many seconds ago."""
        return self.received_at is not None and time.monotonic() - self.received_at >= seconds

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received_at is None:
            self.received_at = time.monotonic()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers; after a signal ignore further ones, since the process ends with its own exit code."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.received and kind is SystemExit else handler)


def exit_when_asked() -> None:
    """Until training begins there is nothing to save: end with exit code 85 at once."""
    for number in _NUMBERS:
        signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped by a signal; the same command goes on\n")
    os._exit(PREEMPTED_EXIT_CODE)  # an exception could be caught by whatever is being imported or built


def train() -> None:
    """The command `mmpretrain-train`: signals are answered while PyTorch is imported, which takes seconds."""
    exit_when_asked()
    importlib.import_module("mmpretrain.train").main()
