"""Background threads that fetch remote data before it is read."""

import itertools
import logging
import os
import queue
import threading
from collections.abc import Callable, Hashable

_THREADS = 4
_logger = logging.getLogger(__name__)


class Fetcher:
    """Queue of tasks in two priorities, for threads that start with the first task of each process.

    Errors of tasks are ignored: whoever reads the data tries again, and raises them.
    """

    def __init__(self) -> None:
        self._process = 0

    def submit(self, name: Hashable, task: Callable[[], object], is_urgent: bool) -> None:
        """Queue a task, unless the task `name` is queued in the same priority or runs.

        Args:
            name: name of the task.
            task: function to call in a thread.
            is_urgent: whether the task comes before those that are not urgent.
        """
        if self._process != os.getpid():  # threads do not survive a fork
            self._process = os.getpid()
            self._numbers = itertools.count()
            self._queue: queue.PriorityQueue[tuple[int, int, Hashable, Callable[[], object]]] = queue.PriorityQueue()
            self._pending: set[tuple[int, Hashable]] = set()
            for _ in range(_THREADS):
                threading.Thread(target=self._work, daemon=True).start()
        priority = 0 if is_urgent else 1
        if (priority, name) not in self._pending:
            self._pending.add((priority, name))
            self._queue.put((priority, next(self._numbers), name, task))

    def _work(self) -> None:
        while True:
            priority, _, name, task = self._queue.get()
            try:
                task()
            except Exception as error:  # see the docstring
                _logger.debug("%s was not fetched ahead: %s", name, error)
            finally:
                self._pending.discard((priority, name))
