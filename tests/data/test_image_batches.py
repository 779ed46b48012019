"""Batches of images for evaluation: in order, and with few descriptors."""

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmpretrain.data.decode import BadSample
from mmpretrain.data.image_batches import image_batches, split
from tests import runs


def read(number: int, out: Tensor) -> str:
    if number % 7 == 3:
        raise BadSample(f"no image {number}")
    out.fill_(number % 256)
    return f"sample {number}"


def read_until_20(number: int, out: Tensor) -> None:
    if number == 20:
        raise OSError(5, "Input/output error", "disk")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_in_order_and_name_what_is_refused(workers: int) -> None:
    numbers = range(5, 45)
    batches = list(image_batches(read, split(numbers, 16), 3, 4, workers))
    assert [len(batch.samples) + len(batch.refused) for batch in batches] == [16, 16, 8]
    samples = [number for batch in batches for number in batch.samples]
    assert samples == [number for number in numbers if number % 7 != 3]
    assert [value for batch in batches for value in batch.values] == [f"sample {number}" for number in samples]
    assert [each for batch in batches for each in batch.refused] == [
        (number, f"no image {number}") for number in numbers if number % 7 == 3
    ]
    images = torch.cat([batch.images for batch in batches])
    assert images.dtype == torch.uint8 and images.shape == (len(samples), 3, 4, 4)
    assert images[:, 0, 0, 0].tolist() == samples


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_is_no_property_of_a_sample_is_raised(workers: int) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        list(image_batches(read_until_20, split(range(40), 8), 3, 4, workers))


def _read_with_few_descriptors(folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    kept: list[Any] = []
    most = 0
    for batch in image_batches(read, split(range(1200), 300), 3, 4, 4):
        kept.append(batch)  # all of them, so that none is closed
        most = max(most, len(os.listdir("/proc/self/fd")))
    Path(folder, "descriptors").write_text(f"{len(kept)} {most}")


def test_four_workers_and_batches_of_300_need_few_descriptors(tmp_path: Path) -> None:
    process = runs.start(_read_with_few_descriptors, str(tmp_path))
    process.join(runs.DEADLINE_SECONDS)
    assert process.exitcode == 0
    num_batches, most = map(int, (tmp_path / "descriptors").read_text().split())
    assert num_batches == 4 and most < 64
