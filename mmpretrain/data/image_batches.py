"""Ordered image batches for evaluation and `embed`; each batch is sent as one tensor."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmpretrain.data.decode import BadSample, image_memory
from mmpretrain.data.loader import ignore_signals, received

Read = Callable[[int, Tensor], Any]
"""Function of (sample number, output tensor uint8 [c, h, w]) that writes the image and returns the sample's other values.

Raises: BadSample.
"""


@dataclass(frozen=True)
class ImageBatch:
    """Batch of consecutive samples, in their order."""

    images: Tensor
    """Images of the k readable samples, uint8 [k, c, h, w]."""
    samples: list[int]
    """Numbers of the k readable samples."""
    values: list[Any]
    """Return value of `read` for each of the k readable samples."""
    refused: list[tuple[int, str]]
    """(number, reason) of each unreadable sample."""


class _ImageBatches(Dataset[ImageBatch]):
    def __init__(self, read: Read, channels: int, size: int) -> None:
        self._read, self._channels, self._size = read, channels, size

    def __getitem__(self, numbers: range) -> ImageBatch:
        # One tensor per batch, since each tensor that a worker sends holds a file descriptor.
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


def split(numbers: range, batch_size: int) -> list[range]:
    """Cut consecutive numbers into batches; the last one may be smaller."""
    return [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]


def image_batches(
    read: Read,
    batches: Sequence[range],
    channels: int,
    size: int,
    workers: int,
    timeout_seconds: float = 600.0,
) -> Generator[ImageBatch, None, None]:
    """Read batches of samples.

    Args:
        read: function that reads one sample; runs in the workers, if any.
        batches: numbers of each batch's samples.
        channels: number of image channels.
        size: side length of the images, in pixels.
        workers: number of worker processes; 0 reads in this process.
        timeout_seconds: maximum time to wait for one batch, as in `loader.received`.

    Returns: generator of batches, as `loader.received` returns it; close it if it is not read to its end.
    Raises: LoaderError if a worker is lost.
    """
    loader = DataLoader(
        _ImageBatches(read, channels, size),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # other methods import torch in every worker
        worker_init_fn=ignore_signals,
    )
    return received(loader, timeout_seconds)
