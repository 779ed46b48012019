"""One function over many tasks, in this process or several, with a progress bar where someone watches."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Task = TypeVar("Task")
Result = TypeVar("Result")


def num_cpus() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, description: str
) -> Iterator[Result]:
    """Yields function(task) in the tasks' order; one worker is this process."""
    if workers <= 1 or len(tasks) <= 1:
        yield from _progress(map(function, tasks), len(tasks), description)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), initializer=_end_with_parent) as pool:
        try:
            # The processes start here, before the progress bar's thread: a fork copies no half-held lock.
            yield from _progress(pool.map(function, tasks), len(tasks), description)
        finally:
            pool.shutdown(cancel_futures=True)


def _progress(results: Iterator[Result], total: int, description: str) -> Iterator[Result]:
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
