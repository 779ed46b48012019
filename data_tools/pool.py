"""Parallel map of a function over tasks, with a progress bar on a terminal."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

TASKS_AHEAD = 4  # per worker

Task = TypeVar("Task")
Result = TypeVar("Result")


def num_cpus() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, description: str
) -> Iterator[Result]:
    """Yield function(task) in the order of the tasks. With one worker, tasks run in this process.

    Tasks are drawn from an iterator only a few ahead of the results, so neither tasks nor results must fit in memory.

    Raises: ValueError if a worker is killed; errors of the function.
    """
    total = len(tasks) if isinstance(tasks, Sized) else None
    if workers <= 1 or (total is not None and total <= 1):
        yield from _progress(map(function, tasks), total, description)
        return
    remaining = iter(tasks)
    with ProcessPoolExecutor(min(workers, total or workers), initializer=_end_with_parent) as pool:
        try:
            # Start the processes before the progress bar's thread, so that no fork copies a lock that is held.
            ahead = deque(pool.submit(function, task) for task in islice(remaining, TASKS_AHEAD * workers))
            more = (pool.submit(function, task) for task in remaining)
            yield from _progress(_results(ahead, more), total, description)
        except BrokenProcessPool as error:
            raise ValueError(
                f"{description}: a worker process was killed, as the system does for lack of memory; run the command "
                f"again, with fewer than --workers {workers}"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _results(ahead: deque[Future[Result]], more: Iterator[Future[Result]]) -> Iterator[Result]:
    while ahead:
        result = ahead.popleft().result()
        ahead.extend(islice(more, 1))
        yield result


def _progress(results: Iterator[Result], total: int | None, description: str) -> Iterator[Result]:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(results, total=total, description=description)


def _end_with_parent() -> None:
    """End this worker when its parent is killed; otherwise it would wait for tasks forever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
