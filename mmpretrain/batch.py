"""Micro-batches: the input of a training step.

Symbols of shapes, used throughout: b samples of a micro-batch, B of a batch, L text tokens, N image tokens,
K kept image tokens, d encoder width, e embedding width, h x w pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpretrain.schedules import TrainingProgress


class MissingField(ValueError):
    """An objective reads a field that a stream does not have.

    Args:
        message: the error message.
        field: `images`, `texts` or `labels`.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Refused:
    """Record of a sample that could not be used and was replaced."""

    stream: str
    shard: str
    key: str
    reason: str
    code: str = "unusable"
    """Kind of the reason (see `BadSample`)."""


@dataclass(frozen=True)
class Packing:
    """Placement of a micro-batch's texts, one after another, in rows of one length (see `models.rows`)."""

    slots: Tensor
    """int64 [b], index of each text's first token among the `num_rows * row_length` tokens of all rows."""
    turns: Tensor
    """int64 [b], index of each text within its row."""
    num_rows: int
    row_length: int
    most: int
    """Largest number of texts in a row. It is an int on the host, as are `num_rows` and `row_length`, so that reading it
    does not synchronise with the device."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Packing":
        """Apply `fn` to each tensor."""
        return replace(self, slots=fn(self.slots), turns=fn(self.turns))

    def __getstate__(self) -> dict[str, Any]:
        return _by_value(self)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        _restore(self, state)


def _by_value(of: Any, shared: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass for pickling, with CPU tensors as NumPy arrays, except those named in `shared`.

    A tensor sent by a worker gets its own shared memory and holds a file descriptor until it is freed. An array does not.
    """
    values = {each.name: getattr(of, each.name) for each in fields(of)}
    return {
        name: value.numpy()
        if isinstance(value, Tensor) and value.device.type == "cpu" and name not in shared
        else value
        for name, value in values.items()
    }


def _restore(to: Any, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        object.__setattr__(to, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


@dataclass(frozen=True)
class Samples:
    """Samples of one stream in a micro-batch."""

    positions: Tensor
    """int64 [b], position of each row in its stream."""
    ids: Tensor
    """int64 [b], id of each row's sample in the data; rows with equal ids are copies of one sample."""
    seeds: Tensor
    """int64 [b], 64 random bits per row, from which its random numbers are drawn."""
    images: Tensor | None = None
    """uint8 [b, 3, h, w]."""
    text: Tensor | None = None
    """int64 [b, L], token ids."""
    lengths: Tensor | None = None
    """int64 [b], number of tokens of each text, including start and end tokens."""
    packing: Packing | None = None
    """Placement of several texts per row; None: one text per row."""
    word_starts: Tensor | None = None
    """bool [b, L], True at the first token of a word; None if the tokenizer does not provide it."""
    views: Tensor | None = None
    """uint8 [b, v, 3, h, w], additional views of the images (see `data.train.<stream>.views`)."""
    groups: Tensor | None = None
    """int64 [b], group of each row (see `data.train.<stream>.group`)."""
    labels: Tensor | None = None
    """int64 [b], class of each row (see `data.train.<stream>.label`)."""
    mixed_labels: Tensor | None = None
    """int64 [b], class of the image that each image is mixed with (see `data.train.<stream>.mix`)."""
    mixed_shares: Tensor | None = None
    """float32 [b], share of that other image, in [0, 1]; 0 if the image is not mixed."""

    def __len__(self) -> int:
        return len(self.positions)

    def rows(self, rows: Tensor) -> "Samples":
        """Select samples by their row indices, without the packing of their texts."""
        return replace(self, packing=None).map(lambda tensor: tensor[rows.to(tensor.device)])

    def to(self, device: torch.device) -> "Samples":
        """Copy the samples to a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Samples":
        """Copy the samples to page-locked memory; called by `DataLoader(pin_memory=True)`."""
        return self.map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell CUDA's caching allocator that `stream` also uses the tensors."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        self.map(record)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Samples":
        """Apply `fn` to each tensor, including those of `packing`."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {
            name: fn(value) if isinstance(value, Tensor) else value for name, value in values.items()
        }
        if self.packing is not None:
            mapped["packing"] = self.packing.map(fn)
        return Samples(**mapped)

    def __getstate__(self) -> dict[str, Any]:
        return _by_value(self, shared=("images", "views"))

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        _restore(self, state)


@dataclass(frozen=True)
class Batch:
    """Micro-batch of one rank, with samples of every stream."""

    streams: Mapping[str, Samples]
    seed: int = 0
    """Seed of PyTorch's generator, for random numbers that are not drawn per sample. It is the first sample's seed, as an
    int on the host."""
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    """Progress of the run before the step, on which scheduled values depend."""
    refused: tuple[Refused, ...] = ()
    """Samples that were replaced while this batch was read."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Number of terms of each independent objective that has been counted (see `Task.counted`)."""

    def images(self, stream: str) -> Tensor:
        """Return a stream's images, uint8 [b, 3, h, w].

        Raises: MissingField if the stream has no images.
        """
        images = self.streams[stream].images
        if images is None:
            raise MissingField(
                f"data.train.{stream}.transform is null, but an objective reads the stream's images; "
                "expected one, such as mmpretrain.data.transforms.CenterCrop",
                "images",
            )
        return images

    def texts(self, stream: str) -> tuple[Tensor, Tensor]:
        """Return a stream's token ids, int64 [b, L], and the number of tokens of each text, int64 [b].

        Raises: MissingField if the stream has no texts.
        """
        samples = self.streams[stream]
        if samples.text is None or samples.lengths is None:
            raise MissingField(
                f"data.train.{stream}.caption is null, but an objective reads the stream's texts; "
                f"expected a field: data.train.{stream}.caption=txt",
                "texts",
            )
        return samples.text, samples.lengths

    def labels(self, stream: str) -> Tensor:
        """Return a stream's classes, int64 [b].

        Raises: MissingField if the stream has no labels.
        """
        labels = self.streams[stream].labels
        if labels is None:
            raise MissingField(
                f"data.train.{stream}.label is null, but an objective reads the stream's labels; "
                f"expected a field, such as data.train.{stream}.label=cls",
                "labels",
            )
        return labels

    def grid_size(self, stream: str, patch_size: tuple[int, int]) -> tuple[int, int]:
        """Return the number of rows and columns of whole patches in a stream's images."""
        height, width = self.images(stream).shape[2:]
        return height // patch_size[0], width // patch_size[1]

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device."""
        return replace(self, streams={name: samples.to(device) for name, samples in self.streams.items()})

    def pin_memory(self) -> "Batch":
        """Copy the batch to page-locked memory; called by `DataLoader(pin_memory=True)`."""
        return replace(self, streams={name: samples.pin_memory() for name, samples in self.streams.items()})

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell CUDA's caching allocator that `stream` also uses the tensors."""
        for samples in self.streams.values():
            samples.record_stream(stream)
