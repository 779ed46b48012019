"""SIGTERM and SIGINT: a checkpoint and exit code 85, from the first import on. Imports nothing that takes time."""

import importlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

PREEMPTED_EXIT_CODE = 85
_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_EVERY_SECONDS = 0.5
_END = 0  # no signal's number
_ending, _is_told = threading.Lock(), threading.Event()


class Stopped(Exception):
    """A signal asked for the end; what is saved stands."""


_own_pipes: set[int] = set()


class _Listener:
    """A thread that hears of signals at once: Python's handlers wait until a collective or a backward pass returns.

    Args:
        heard: called in the thread with the number of a signal, those of `_NUMBERS` alone; from the first one on also with
            None, twice a second.
    """

    def __init__(self, heard: Callable[[int | None], None]) -> None:
        self._heard = heard
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        _own_pipes.add(self._writer)
        self.previous = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        timeout = None
        while True:
            if not select.select([self._reader], [], [], timeout)[0]:
                self._heard(None)
                continue
            number = os.read(self._reader, 1)[0]
            if number == _END:
                return
            if number in _NUMBERS:
                self._heard(number)
                timeout = _EVERY_SECONDS

    def close(self) -> None:
        """Hear nothing any more. Waits for what is being answered."""
        signal.set_wakeup_fd(self.previous)
        # The thread would wait for the pipe's end for as long as a forked process has it open.
        os.write(self._writer, bytes([_END]))
        self._thread.join()
        _own_pipes.remove(self._writer)
        os.close(self._writer)
        os.close(self._reader)


def _forget_pipe() -> None:
    """In a forked process: the signals that it gets itself are none of its parent's."""
    if (pipe := signal.set_wakeup_fd(-1)) not in _own_pipes:
        signal.set_wakeup_fd(pipe)


os.register_at_fork(after_in_child=_forget_pipe)


class StopSignal:
    """Inside the block SIGTERM and SIGINT are noted, so that the loop can save and end.

    A second SIGINT is left to whoever answered before: it ends a command at once. A second SIGTERM is ignored, since
    launchers forward duplicates.

    Args:
        answer: called by another thread twice a second from the first signal to the end of the block, with the seconds
            since the signal: it may end a process whose loop does not come to it.
    """

    def __init__(self, answer: Callable[[float], None]) -> None:
        self.received = False
        self._answer = answer
        self._began: float | None = None
        self._num_interrupts = 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def _hear(self, number: int | None) -> None:
        self.received = True
        if self._began is None:
            self._began = time.monotonic()
        self._num_interrupts += number == signal.SIGINT
        if number is None:
            self._answer(time.monotonic() - self._began)
        elif self._num_interrupts > 1 and self._listener.previous != -1:
            os.write(self._listener.previous, bytes([number]))

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._receive) for number in _NUMBERS}
        self._listener = _Listener(self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers. A command that a signal has ended says so once, however many follow."""
        if self.received:
            _is_told.set()
        self._listener.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def exit_when_asked() -> None:
    """Until training begins there is nothing to save: end with exit code 85 at once."""
    for number in _NUMBERS:
        signal.signal(number, lambda number, frame: _exit(number))
    _Listener(_exit)


def _exit(number: int | None) -> None:
    if not _ending.acquire(blocking=False):  # the other of listener and handler is at it
        return
    if os.environ.get("RANK", "0") == "0" and not _is_told.is_set():
        os.write(2, b"stopped by a signal; the same command goes on\n")
    os._exit(PREEMPTED_EXIT_CODE)  # an exception could be caught by whatever is being imported or built


def train() -> None:
    """The command `mmpretrain-train`: signals are answered while PyTorch is imported, which takes seconds."""
    exit_when_asked()
    importlib.import_module("mmpretrain.train").main()
