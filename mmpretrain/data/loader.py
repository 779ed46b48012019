"""From positions to batches: a map-style data set whose items are whole micro-batches of one rank.

The order decides what a micro-batch holds; workers only decide who decodes it. A `DataLoader` hands items out
in order, so what was prefetched and not consumed is simply dropped at a kill.
"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping

from torch.utils.data import DataLoader, Dataset, Sampler

from mmpretrain.batch import Batch
from mmpretrain.data.order import step_positions, step_range
from mmpretrain.data.stream import Stream, StreamItem
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.schedules import Clock, Now

MicroBatchItem = tuple[int, Mapping[str, StreamItem]]
"""(samples seen before the step, what of each stream)."""


class MicroBatches(Dataset[Batch]):
    """The map-style data set: (samples seen, {stream: (positions, sources, ids)}) -> Batch."""

    def __init__(self, streams: Mapping[str, Stream], tokenizer: Tokenizer, clock: Clock) -> None:
        self._streams = streams
        self._tokenizer = tokenizer
        self._clock = clock

    def __getitem__(self, item: MicroBatchItem) -> Batch:
        now = Now(item[0], self._clock)
        parts = {
            name: self._streams[name].read(stream_item, self._tokenizer, now) for name, stream_item in item[1].items()
        }
        first_stream = next(iter(parts.values()))[0]
        seed = int(first_stream.seeds[first_stream.positions.argmin()])
        refused = tuple(refusal for _, refusals in parts.values() for refusal in refusals)
        return Batch({name: samples for name, (samples, _) in parts.items()}, seed, now, refused)


class StepSampler(Sampler[MicroBatchItem]):
    """Every micro-batch of one rank, step after step, from step `first_step` to `num_steps`."""

    def __init__(
        self,
        streams: Mapping[str, Stream],
        clock: Clock,
        first_step: int,
        num_steps: int,
        rank: int,
        world_size: int,
        num_micro_batches: int,
    ) -> None:
        self._streams = streams
        self._clock = clock
        self._steps = range(first_step, num_steps)
        self._place = (rank, world_size, num_micro_batches)

    def __iter__(self) -> Iterator[MicroBatchItem]:
        for step in self._steps:
            parts = {
                name: step_positions(stream.order, step_range(stream.batch_size, step, self._clock), *self._place)
                for name, stream in self._streams.items()
            }
            for i in range(self._place[2]):
                yield step * self._clock.batch_size, {name: part[i] for name, part in parts.items()}


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
) -> DataLoader[Batch]:
    """A loader whose items are the micro-batches of one rank, in order: `num_micro_batches` items a step.

    Raises: ValueError if a stream's batch size does not divide over the ranks and micro-batches.
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
        sampler=StepSampler(streams, clock, first_step, num_steps, rank, world_size, num_micro_batches),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # others would import torch in every worker
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )


def ignore_signals(worker: int) -> None:
    """In a worker: a signal to the whole process group is the trainer's to answer; SIGTERM from the trainer ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_exit_when_parent_says, daemon=True).start()


def _exit_when_parent_says() -> None:
    # Were SIGTERM ignored whoever sends it, a run that ends with an error would wait for its workers for ever.
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
