"""Number of decoding processes, measured for `data.workers=auto`."""

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

_HEADROOM = 1.25  # factor on the average need, since batches differ in reading time


def own_cores() -> int:
    """Return the number of CPU cores per local rank."""
    return max(1, len(os.sched_getaffinity(0)) // distributed.local_world_size())


def count_workers(read_seconds: float, step_seconds: float, cores: int) -> int:
    """Return the number of processes that read 1.25 times as fast as the device computes, from 1 to `cores`."""
    return max(1, min(math.ceil(_HEADROOM * read_seconds / step_seconds), cores))


def measured_workers(
    upcoming: Iterator[Batch], step: Callable[[list[Batch]], object], device: torch.device, num_batches: int
) -> int:
    """Measure the reading and computing time of a micro-batch, and return `count_workers` for them.

    Args:
        upcoming: micro-batches, read when requested.
        step: function that computes a step on the given micro-batches; it may be a collective.
        device: device that computes the step.
        num_batches: number of micro-batches that are read and passed to `step`.

    The first micro-batch and the first step warm up. Reading uses one thread, as a worker does. Ranks may get different
    results.
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
        "data.workers: %d (reading a micro-batch takes one process %.0f ms, computing it %.0f ms; %d cores)",
        workers, 1000 * read_seconds, 1000 * step_seconds, own_cores(),
    )  # fmt: skip
    return workers
