"""SIGTERM and SIGINT: a checkpoint and exit code 85, from the first import on. Imports nothing that takes time."""

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

PREEMPTED_EXIT_CODE = 85
_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_ANSWER_EVERY_SECONDS = 0.5
_ending = threading.Lock()


class Stopped(Exception):
    """A signal asked for the end; what is saved stands."""


class _Listener:
    """A thread that hears of signals at once: Python's handlers wait until a collective or a backward pass returns.

    Args:
        heard: called in the thread with a signal's number, for those of `_NUMBERS`.
    """

    def __init__(self, heard: Callable[[int], None]) -> None:
        self._heard = heard
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] in _NUMBERS:
                self._heard(number[0])

    def close(self) -> None:
        """Hear nothing any more. Waits for what is being answered."""
        signal.set_wakeup_fd(self._previous)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)


# A forked worker would write the signals that it gets itself into its parent's pipe.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class StopSignal:
    """Inside the block SIGTERM and SIGINT are noted, so that the loop can save and end.

    A second SIGINT ends at once. A second SIGTERM is ignored, since launchers forward duplicates.

    Args:
        answer: called by another thread twice a second from the first signal to the end of the block, with the seconds
            since the signal: it may end a process whose loop does not come to it.
    """

    def __init__(self, answer: Callable[[float], None]) -> None:
        self.received = False
        self._answer = answer
        self._is_over = threading.Event()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def _wait_for_end(self, number: int) -> None:
        self.received, began = True, time.monotonic()
        while not self._is_over.wait(_ANSWER_EVERY_SECONDS):
            self._answer(time.monotonic() - began)

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._receive) for number in _NUMBERS}
        self._listener = _Listener(self._wait_for_end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers; after a signal ignore further ones, since the process ends with its own exit code."""
        self._is_over.set()
        self._listener.close()
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.received and kind is SystemExit else handler)


def exit_when_asked() -> None:
    """Until training begins there is nothing to save: end with exit code 85 at once."""
    for number in _NUMBERS:
        signal.signal(number, lambda number, frame: _exit(number))
    _Listener(_exit)


def _exit(number: int) -> None:
    if not _ending.acquire(blocking=False):  # the other of listener and handler is at it
        return
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped by a signal; the same command goes on\n")
    os._exit(PREEMPTED_EXIT_CODE)  # an exception could be caught by whatever is being imported or built


def train() -> None:
    """The command `mmpretrain-train`: signals are answered while PyTorch is imported, which takes seconds."""
    exit_when_asked()
    importlib.import_module("mmpretrain.train").main()
