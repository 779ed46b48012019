"""Data loader: a map-style data set whose items are whole micro-batches of one rank.

The sample order determines the content of each micro-batch; workers only decode it. A `DataLoader` returns items in
order, so items that were prefetched but not consumed may be dropped when the run is killed.
"""

import faulthandler
import os
import queue
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset, Sampler

from mmpretrain import distributed
from mmpretrain.batch import Batch
from mmpretrain.data.order import step_positions, step_range
from mmpretrain.data.stream import Stream, StreamItem
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.schedules import Clock, TrainingProgress

Item = TypeVar("Item")

_POLL_SECONDS = 1.0
_DEATH_SECONDS = 10.0  # the kernel may close a killed worker's sockets some time before it reports its end
_SHOW_STACK, _STACK_SECONDS = signal.SIGRTMIN, 1.0  # a signal that nobody else sends

_CAUSES = {
    signal.SIGKILL: ", with more memory if it ran out",
    signal.SIGBUS: " when /dev/shm has space and no data file is cut off or written to",
    signal.SIGSEGV: "; if it crashes again, a library cannot read the data or the worker's code has a fault",
    signal.SIGABRT: "; if it crashes again, a library cannot read the data or the worker's code has a fault",
}
"""What a signal that ends a worker usually comes from, as the end of a sentence."""

MicroBatchItem = tuple[int, Mapping[str, StreamItem], Mapping[str, StreamItem]]
"""Samples seen before the step, the item of each stream by name, and the later items of remote streams to fetch ahead."""


class MicroBatches(Dataset[Batch]):
    """Map-style data set: maps (samples seen, {stream: (positions, sources, ids)}, the same of a later step) to a Batch."""

    def __init__(self, streams: Mapping[str, Stream], tokenizer: Tokenizer, clock: Clock) -> None:
        self._streams = streams
        self._tokenizer = tokenizer
        self._clock = clock

    def __getitem__(self, item: MicroBatchItem) -> Batch:
        progress = TrainingProgress(item[0], self._clock)
        for name, later in item[2].items():
            self._streams[name].prefetch(item[1][name], is_urgent=True)
            self._streams[name].prefetch(later, is_urgent=False)
        parts = {
            name: self._streams[name].read(stream_item, self._tokenizer, progress)
            for name, stream_item in item[1].items()
        }
        first_stream = next(iter(parts.values()))[0]
        seed = int(first_stream.seeds[first_stream.positions.argmin()])
        refused = tuple(refusal for _, refusals in parts.values() for refusal in refusals)
        return Batch({name: samples for name, (samples, _) in parts.items()}, seed, progress, refused)


class StepSampler(Sampler[MicroBatchItem]):
    """Iterate over the micro-batches of one rank, from step `first_step` to step `num_steps - 1`."""

    def __init__(
        self,
        streams: Mapping[str, Stream],
        clock: Clock,
        first_step: int,
        num_steps: int,
        rank: int,
        world_size: int,
        num_micro_batches: int,
        passed_over: Mapping[str, int],
    ) -> None:
        self._streams, self._passed_over = streams, passed_over
        self._clock = clock
        self._steps = range(first_step, num_steps)
        self._place = (rank, world_size, num_micro_batches)

    def __iter__(self) -> Iterator[MicroBatchItem]:
        for step in self._steps:
            parts, later = {}, {}
            for name, stream in self._streams.items():
                passed_over = self._passed_over.get(name, 0)
                taken = step_range(stream.batch_size, step, self._clock, passed_over)
                parts[name] = step_positions(stream.order, taken, *self._place)
                if stream.prefetch_samples:
                    ahead = -(-stream.prefetch_samples // len(taken))
                    last = self._steps.stop - 1
                    taken = step_range(stream.batch_size, min(step + ahead, last), self._clock, passed_over)
                    later[name] = step_positions(stream.order, taken, *self._place)
            for i in range(self._place[2]):
                item, later_item = ({name: part[i] for name, part in each.items()} for each in (parts, later))
                yield step * self._clock.batch_size, item, later_item


def build_loader(
    streams: Mapping[str, Stream],
    tokenizer: Tokenizer,
    clock: Clock,
    first_step: int,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_micro_batches: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    passed_over: Mapping[str, int] | None = None,
) -> DataLoader[Batch]:
    """Build a loader of the micro-batches of one rank, in order: `num_micro_batches` items per step.

    The first step begins after `passed_over` positions that no step takes, by stream.

    Raises: ValueError if a stream's batch size is not divisible by `world_size * num_micro_batches`.
    """
    for name, stream in streams.items():
        for size in stream.batch_size.values:
            if size % (world_size * num_micro_batches):
                raise ValueError(
                    f"data.train.{name}.batch_size is {size}; expected a multiple of {world_size} processes x "
                    f"{num_micro_batches} micro-batches: change it, the number of processes, or trainer.micro_batch_size"
                )
    return DataLoader(
        MicroBatches(streams, tokenizer, clock),
        sampler=StepSampler(
            streams, clock, first_step, num_steps, rank, world_size, num_micro_batches, passed_over or {}
        ),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # other methods import torch in every worker
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )


class LoaderError(RuntimeError):
    """A worker was killed or does not respond. The message is one line that names the worker."""


def received(loader: DataLoader[Item], timeout_seconds: float) -> Generator[Item, None, None]:
    """Iterate over the loader's items, with a timeout and a check for dead workers.

    A separate thread receives items from the workers, since a worker that is stopped while it sends a tensor blocks the
    receiver forever. Close the generator if it is not read to its end; otherwise this process waits for stopped workers
    when it exits.

    Args:
        loader: the loader; its workers are started by this call.
        timeout_seconds: maximum time to wait for one item from the workers; in a group at most .9 of the timeout of its
            collectives, so that the rank whose worker hangs tells of it before the others fail.

    Raises: LoaderError if a worker was killed or does not respond; any exception that a worker raises. All workers are
        killed first.
    """
    before = signal.getsignal(signal.SIGCHLD)
    iterator: Any = iter(loader)
    if not loader.num_workers:
        return (item for item in iterator)
    if threading.current_thread() is threading.main_thread():
        # PyTorch's handler would raise the error of a dead worker anywhere in this process, even during a save.
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
    limit = distributed.within_timeout(timeout_seconds)
    option = "data.timeout_seconds" if limit == timeout_seconds else ".9 of parallel.timeout_seconds"
    return _received(iterator, iterator._workers, limit, option)


def _received(
    iterator: Iterator[Item], workers: list[BaseProcess], timeout_seconds: float, option: str
) -> Generator[Item, None, None]:
    taken: queue.Queue[Item | BaseException] = queue.Queue(maxsize=1)
    is_wanted = True

    def take() -> None:
        try:
            while is_wanted:
                taken.put(next(iterator))
        except BaseException as error:  # passed to the consumer, which raises it
            taken.put(error)

    threading.Thread(target=take, daemon=True).start()
    try:
        began = time.monotonic()
        while True:
            try:
                item = taken.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                _check_alive(workers)
                if time.monotonic() - began > timeout_seconds:
                    told = _stopped(workers) or _show_stack(iterator, workers)
                    raise LoaderError(f"no batch came in {timeout_seconds:g} seconds ({option}): {told}") from None
                continue
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                if isinstance(item, ConnectionError | EOFError):  # a worker ended while it sent a tensor
                    ended = wait([worker.sentinel for worker in workers], timeout=_DEATH_SECONDS)
                    for worker in workers:
                        if worker.sentinel in ended:  # its files are closed; its exit code comes a moment later
                            worker.join(_DEATH_SECONDS)
                _check_alive(workers)
                raise item
            yield item
            began = time.monotonic()
    finally:
        is_wanted = False
        for worker in workers:  # a stopped worker handles no signal but SIGKILL, and would block the exit
            worker.kill()
        while not taken.empty():  # the thread may be blocked on a full queue
            taken.get_nowait()


def _check_alive(workers: list[BaseProcess]) -> None:
    """Raise LoaderError if a worker was killed or failed."""
    ended = {i: worker for i, worker in enumerate(workers) if worker.exitcode}
    if ended:
        told = ", ".join(
            f"worker {i} of the data loader (process {worker.pid}) {_how(worker.exitcode)}"
            for i, worker in ended.items()
        )
        cause = next((text for code, text in _CAUSES.items() if -code in {w.exitcode for w in ended.values()}), "")
        raise LoaderError(f"{told}; start the same command again{cause}")


def _how(code: int | None) -> str:
    assert code is not None
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _stopped(workers: list[BaseProcess]) -> str:
    """Describe the workers that are stopped or blocked, by their state in Linux; empty if there are none."""
    states = {"T": "is stopped", "t": "is stopped by a debugger", "D": "waits for a disk or a network file system"}
    told = []
    for i, worker in enumerate(workers):
        try:
            state = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # the worker has just ended
            continue
        if state in states:
            told.append(f"worker {i} of the data loader (process {worker.pid}) {states[state]}")
    return ", ".join(told)


def _show_stack(iterator: Any, workers: list[BaseProcess]) -> str:
    """Make the worker whose item is next write its stacks to stderr, and describe it."""
    number, *_ = iterator._task_info[iterator._rcvd_idx]
    pid = workers[number].pid
    assert pid is not None
    with suppress(ProcessLookupError):
        os.kill(pid, _SHOW_STACK)
    workers[number].join(_STACK_SECONDS)  # gives it the time to write
    return (
        f"worker {number} of the data loader (process {pid}) hangs, is slow, or waits for storage, and its stack is above; "
        "raise the limit if it is only slow"
    )


def ignore_signals(worker: int) -> None:
    """Ignore signals to the process group in a worker, since the trainer handles them; exit on the trainer's SIGTERM.

    On `_SHOW_STACK`, the worker writes its stacks to stderr.
    """
    faulthandler.register(_SHOW_STACK, file=2)  # in C, so that it works in a worker that hangs in C
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_exit_when_parent_says, daemon=True).start()


def _exit_when_parent_says() -> None:
    # SIGTERM from the parent must end the worker: a run that ends with an error would wait for its workers forever.
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
