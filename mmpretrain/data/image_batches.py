"""Images of evaluation and of `embed`: read in order, in batches that travel as one tensor each."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmpretrain.data.decode import BadSample, image_memory
from mmpretrain.data.loader import ignore_signals, received

Read = Callable[[int, Tensor], Any]
"""(number of a sample, where its image uint8 [c, h, w] is written) -> what else is known of it. Raises: BadSample."""


@dataclass(frozen=True)
class ImageBatch:
    """Some samples, in their order."""

    images: Tensor
    """uint8 [k, c, h, w], of those that could be read."""
    samples: list[int]
    """Their numbers, k of them."""
    values: list[Any]
    """What else was read of each, k of them."""
    refused: list[tuple[int, str]]
    """(number, reason) of those that could not be read."""


class _ImageBatches(Dataset[ImageBatch]):
    def __init__(self, read: Read, channels: int, size: int) -> None:
        self._read, self._channels, self._size = read, channels, size

    def __getitem__(self, numbers: range) -> ImageBatch:
        # One tensor a batch: each tensor that a worker sends holds a file descriptor.
        images = image_memory(len(numbers), self._channels, self._size)
        samples: list[int] = []
        values: list[Any] = []
        refused: list[tuple[int, str]] = []
        for number in numbers:
            try:
                values.append(self._read(number, images[len(samples)]))
                samples.append(number)
            except BadSample as error:
                refused.append((number, str(error)))
        return ImageBatch(images[: len(samples)], samples, values, refused)


def image_batches(
    read: Read,
    numbers: range,
    batch_size: int,
    channels: int,
    size: int,
    workers: int,
    timeout_seconds: float = 600.0,
) -> Generator[ImageBatch, None, None]:
    """Read samples batch by batch, the last one shorter.

    Args:
        read: reads one sample; in a worker, where there are any.
        numbers: of the samples.
        batch_size: samples of a batch.
        channels, size: of the images, in pixels.
        workers: processes that read; 0 for this one.
        timeout_seconds: as in `loader.received`, whose result this is.

    Raises: LoaderError for a worker that is lost.
    """
    batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    loader = DataLoader(
        _ImageBatches(read, channels, size),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # others would import torch in every worker
        worker_init_fn=ignore_signals,
    )
    return received(loader, timeout_seconds)
