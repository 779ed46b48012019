"""`data.workers=auto`."""

import os

import pytest
import torch

from mmpretrain.workers import count_workers, measured_workers, own_cores


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


def test_what_is_measured_is_done_twice() -> None:
    done: list[str] = []
    product = torch.ones(600, 600)

    def read() -> None:
        done.append("read")

    def step() -> None:
        done.append("step")
        _ = product @ product

    assert measured_workers(read, step, torch.device("cpu")) == 1
    assert done == ["read", "read", "step", "step"]
