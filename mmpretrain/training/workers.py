"""How many processes decode, where `data.workers=auto` leaves it to a measurement."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator

import torch

from mmpretrain import distributed
from mmpretrain.batch import Batch
from mmpretrain.reporting.profiling import synchronize

log = logging.getLogger(__name__)

_HEADROOM = 1.25  # times as many as keep up on average: batches differ


def own_cores() -> int:
    """The cores that this process may use, its neighbours on the machine having as many."""
    return max(1, len(os.sched_getaffinity(0)) // distributed.local_world_size())


def count_workers(read_seconds: float, step_seconds: float, cores: int) -> int:
    """The fewest processes that read as fast as the device computes, with some headroom; at most one for each core."""
    return max(1, min(math.ceil(_HEADROOM * read_seconds / step_seconds), cores))


def measured_workers(
    upcoming: Iterator[Batch], step: Callable[[list[Batch]], object], device: torch.device, num_batches: int
) -> int:
    """`count_workers` for a micro-batch: what one process takes to read it, and what the device takes to compute it.

    The first micro-batch and the first step warm up; each further micro-batch is read anew, in one thread as a worker
    does, and a step takes `num_batches` of them. `step` may be a collective; the answer is this process's own.
    """
    next(upcoming)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    batches = [next(upcoming) for _ in range(num_batches)]
    read_seconds = (time.perf_counter() - started) / num_batches
    torch.set_num_threads(threads)
    batches = [batch.to(device) for batch in batches]
    for _ in range(2):
        synchronize(device)
        started = time.perf_counter()
        step(batches)
        synchronize(device)
    step_seconds = (time.perf_counter() - started) / num_batches
    workers = count_workers(read_seconds, step_seconds, own_cores())
    log.info(
        "data.workers: %d (to read a micro-batch takes one process %.0f ms, to compute it %.0f ms; %d cores)",
        workers, 1000 * read_seconds, 1000 * step_seconds, own_cores(),
    )  # fmt: skip
    return workers
