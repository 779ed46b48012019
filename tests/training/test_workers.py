"""`data.workers=auto`."""

import os
from collections.abc import Iterator
from itertools import count

import pytest
import torch

from mmpretrain.batch import Batch
from mmpretrain.training.workers import count_workers, measured_workers, own_cores


@pytest.mark.parametrize(
    ("read", "step", "cores", "expected"),
    [
        (0.1, 1.0, 8, 1),  # reading is nothing beside computing
        (1.0, 1.0, 8, 2),  # just as fast is not enough: batches differ
        (4.0, 1.0, 8, 5),
        (40.0, 1.0, 8, 8),  # no more than there are cores
        (40.0, 1.0, 1, 1),
    ],
)
def test_as_many_workers_as_keep_up(read: float, step: float, cores: int, expected: int) -> None:
    assert count_workers(read, step, cores) == expected


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * own_cores()))
    assert own_cores() == 1


@pytest.mark.parametrize("num_batches", [1, 2])
def test_micro_batches_are_read_one_after_the_other_and_the_second_step_counts(num_batches: int) -> None:
    threads: list[int] = []
    given: list[list[int]] = []
    product = torch.ones(600, 600)

    def upcoming() -> Iterator[Batch]:
        for number in count():
            threads.append(torch.get_num_threads())
            yield Batch({}, number)

    def step(batches: list[Batch]) -> None:
        given.append([batch.seed for batch in batches])
        _ = product @ product

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert measured_workers(upcoming(), step, torch.device("cpu"), num_batches) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [2] + [1] * num_batches
    assert given == [list(range(1, 1 + num_batches))] * 2
