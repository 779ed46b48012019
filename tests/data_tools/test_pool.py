"""Tasks over processes."""

import os
import signal
from collections.abc import Iterator

import pytest

from data_tools.pool import TASKS_AHEAD, run_tasks


@pytest.mark.parametrize("workers", [1, 2])
def test_an_iterators_tasks_are_drawn_a_few_ahead_of_the_results(workers: int) -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(100):
            drawn.append(task)
            yield task

    for number, result in enumerate(run_tasks(abs, tasks(), workers, "counting")):
        assert result == number
        assert len(drawn) <= number + 1 + TASKS_AHEAD * workers
    assert drawn == list(range(100))


def kill_worker(task: int) -> int:
    if task == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_killed_worker_is_told_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^counting: a worker process was killed, .* fewer than --workers 2$"):
        list(run_tasks(kill_worker, range(20), 2, "counting"))
