"""Handling of SIGTERM, SIGINT, SIGUSR1 and SIGUSR2: write a checkpoint and exit with code 85, or requeue a job of submitit.

Signals are handled from the first import on. This module therefore imports only modules that load quickly.
"""

import glob
import importlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from types import FrameType, TracebackType

from mmpretrain.errors import TrainingError
from mmpretrain.launchers import queued_jobs

PREEMPTED_EXIT_CODE = 85
_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_FOR_USERS = (signal.SIGUSR1, signal.SIGUSR2)
_EVERY_SECONDS = 0.5
_END = 0  # not the number of any signal
_ending, _is_told = threading.Lock(), threading.Event()


def _numbers() -> list[int]:
    """Return the signals to handle. Those for users may have a handler already, such as submitit's."""
    taken = [number for number in _FOR_USERS if signal.getsignal(number) not in (signal.SIG_DFL, _exit_on)]
    return [number for number in _NUMBERS if number not in taken]


def _requeuing() -> list[int]:
    """Return the signals for users whose handler is submitit's. It requeues the job from task 0, wherever that stands."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return []
    handlers = {number: signal.getsignal(number) for number in _FOR_USERS}
    return [number for number, handler in handlers.items() if callable(handler) and handler is not _exit_on]


class Stopped(Exception):
    """A signal requested the end of the run."""


_own_pipes: set[int] = set()


class _Listener:
    """Thread that is notified of signals immediately.

    Python runs its signal handlers only after a collective or a backward pass returns.

    Args:
        heard: function called in the thread with the number of each signal in `numbers`. After the first signal it is
            also called with None twice a second.
        numbers: signals that have a handler.
    """

    def __init__(self, heard: Callable[[int | None], None], numbers: Collection[int]) -> None:
        self._heard, self._numbers = heard, numbers
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
            if number in self._numbers:
                self._heard(number)
                timeout = _EVERY_SECONDS

    def close(self) -> None:
        """Stop the thread, and wait until a call in progress returns."""
        signal.set_wakeup_fd(self.previous)
        # Write an end mark: a forked process may hold the pipe open, so that closing it here would not end the thread.
        os.write(self._writer, bytes([_END]))
        self._thread.join()
        _own_pipes.remove(self._writer)
        os.close(self._writer)
        os.close(self._reader)


def _forget_pipe() -> None:
    """Detach a forked process from its parent's pipe, so that its own signals are not reported to the parent."""
    if (pipe := signal.set_wakeup_fd(-1)) not in _own_pipes:
        signal.set_wakeup_fd(pipe)


os.register_at_fork(after_in_child=_forget_pipe)


class StopSignal:
    """Set `received` when a signal arrives inside the block, so that the training loop can save and end.

    A second SIGINT goes to the previous handler, which ends a command immediately. Other repeated signals are ignored, since
    launchers forward duplicates.

    In a job of submitit, its handler is called when the loop has saved (see `exit_code`). There SIGTERM only asks for a
    checkpoint, since Slurm sends it before submitit's signal, or before it kills and requeues the job itself.

    Args:
        answer: function called in another thread twice a second from the first signal to the end of the block, with the
            number of seconds since that signal. It may end the process if the training loop hangs.
    """

    def __init__(self, answer: Callable[[float], None]) -> None:
        self.received = False
        self._answer = answer
        self._began: float | None = None
        self._num_interrupts = 0
        self._requeuing: list[int] = []
        self._requeue_number: int | None = None
        self._is_save_asked = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and self._requeuing:
            self._is_save_asked = True
            return
        self._note(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def _note(self, number: int | None) -> None:
        self.received = True
        if number in self._requeuing:
            self._requeue_number = number

    def _hear(self, number: int | None) -> None:
        self._note(number)
        if self._began is None:
            self._began = time.monotonic()
        self._num_interrupts += number == signal.SIGINT
        if number is None:
            self._answer(time.monotonic() - self._began)
        elif self._num_interrupts > 1 and self._listener.previous != -1:
            os.write(self._listener.previous, bytes([number]))

    def __enter__(self) -> "StopSignal":
        self._requeuing = _requeuing()
        self._previous = {number: signal.signal(number, self._receive) for number in {*_numbers(), *self._requeuing}}
        self._listener = _Listener(self._hear, self._previous.keys() - ({signal.SIGTERM} if self._requeuing else set()))
        return self

    def shared(self) -> int:
        """Return the number whose maximum the ranks share: 0 without a signal, 1 to end, and the signal to be requeued by."""
        return self._requeue_number or int(self.received)

    def share(self, largest: float) -> None:
        """Note the maximum of `shared()` over the ranks: task 0 requeues the job, also if only others had the signal."""
        if largest > 0:
            self._note(int(largest))

    def take_save(self) -> bool:
        """Return True once after a signal that asks for a checkpoint, but not for the end."""
        asked, self._is_save_asked = self._is_save_asked, False
        return asked

    def exit_code(self) -> int:
        """Let submitit requeue the job if it has sent the signal, and return the exit code.

        Raises: TrainingError if the job is not requeued.
        """
        if self._requeue_number is None:
            return PREEMPTED_EXIT_CODE
        handler = self._previous[self._requeue_number]
        assert callable(handler)  # see `_requeuing`
        try:
            handler(self._requeue_number, None)
        except SystemExit as requeued:
            return int(requeued.code or 0)
        except (RuntimeError, OSError, subprocess.SubprocessError) as refusal:
            raise TrainingError(
                f"submitit does not requeue the job ({str(refusal).rstrip('.')}); start the same command again, which "
                "goes on, or raise hydra.launcher.max_num_timeout"
            ) from refusal
        return 0  # submitit requeues from task 0, which Slurm might kill before if another task failed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the handlers. After a signal in the block, later signals print no further message."""
        if self.received:
            _is_told.set()
        self._listener.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def exit_when_asked() -> None:
    """Make signals end the process immediately with code 85, while there is nothing to save."""
    numbers = _numbers()
    for number in numbers:
        signal.signal(number, _exit_on)
    _Listener(_exit, numbers)


def _exit_on(number: int, frame: FrameType | None) -> None:
    _exit(number)


def _exit(number: int | None) -> None:
    if not _ending.acquire(blocking=False):  # called by both listener and handler: the first call ends the process
        return
    if any(_jobs()):
        # Wait for them in a new program. Of this one, threads of joblib would kill the other jobs when the first has ended.
        signal.pthread_sigmask(signal.SIG_BLOCK, set(_NUMBERS) - {signal.SIGINT})
        code = (
            f"import sys; sys.path[:] = {sys.path}; from mmpretrain.training import stop_signal; stop_signal.end_jobs()"
        )
        os.execv(sys.executable, [sys.executable, "-c", code])
    _say_and_exit()


def _say_and_exit() -> None:
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))  # of srun's tasks until they are adopted
    if rank == "0" and not _is_told.is_set():
        jobs = " ".join(sorted(queued_jobs))
        end = f"Slurm's jobs {jobs} go on; before the same command, wait for them or scancel {jobs}" if jobs else ""
        os.write(2, f"stopped by a signal; {end or 'the same command goes on'}\n".encode())
    os._exit(PREEMPTED_EXIT_CODE)  # an exception could be caught by code that is being imported


def _children(process: int, program: bytes) -> list[int]:
    """Return the children of a process whose command line has these bytes. There are none of processes that have ended."""
    found = []
    for listing in glob.glob(f"/proc/{process}/task/*/children"):
        with suppress(OSError), open(listing) as children:
            for child in children.read().split():
                with suppress(OSError), open(f"/proc/{child}/cmdline", "rb") as command:
                    found += [int(child)] if program in command.read() else []
    return found


def _jobs() -> tuple[set[int], set[int]]:
    """Return the processes on this machine that run jobs of this command's sweep, and those that start them."""
    workers = set(_children(os.getpid(), b"popen_loky_posix"))  # of joblib
    controllers = set(_children(os.getpid(), b"submitit.local._local"))
    tasks = {task for each in controllers for task in _children(each, b"submitit.core._submit")}
    return workers | tasks, controllers


def end_jobs() -> None:
    """Stop the jobs of a sweep that this process has started, wait until they have saved, and exit with code 85."""
    # In a task of submitit SIGTERM asks for a checkpoint alone. A second SIGINT, as from a terminal, would end without one.
    number = signal.SIGUSR2 if os.environ.get("SUBMITIT_PREEMPT_SIGNAL") == "USR1" else signal.SIGUSR1
    asked: set[int] = set()
    while any(found := _jobs()):
        for job in found[0] - asked:
            with suppress(ProcessLookupError):
                os.kill(job, number)
        asked |= found[0]
        time.sleep(0.05)
    _say_and_exit()


def train() -> None:
    """Run the command `mmpretrain-train`. Signals are handled already while PyTorch is imported, which takes seconds."""
    exit_when_asked()
    importlib.import_module("mmpretrain.train").main()
