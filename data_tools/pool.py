"""One function over many tasks, in this process or several, with a progress bar where someone watches."""

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

TASKS_AHEAD = 4  # for each worker

Task = TypeVar("Task")
Result = TypeVar("Result")


def num_cpus() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int, description: str
) -> Iterator[Result]:
    """Yields function(task) in the tasks' order; one worker is this process.

    Of an iterator, tasks are drawn a few ahead of the results: neither need fit into memory.

    Raises: ValueError if a worker is killed, and what the function does.
    """
    total = len(tasks) if isinstance(tasks, Sized) else None
    if workers <= 1 or (total is not None and total <= 1):
        yield from _progress(map(function, tasks), total, description)
        return
    remaining = iter(tasks)
    with ProcessPoolExecutor(min(workers, total or workers), initializer=_end_with_parent) as pool:
        try:
            # The processes start here, before the progress bar's thread: a fork copies no half-held lock.
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
    """Ends this worker when its parent is killed; else it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
