"""What a step sees.

Shape legend, used throughout: b samples of a micro-batch, B of a batch, L text tokens, N image tokens,
K kept image tokens, d encoder width, e embedding width, h x w pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpretrain.schedules import TrainingProgress


@dataclass(frozen=True)
class Refused:
    """A sample that could not be used."""

    stream: str
    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Packing:
    """Texts of a micro-batch that stand behind one another in rows of one length (see `models.rows`)."""

    slots: Tensor
    """int64 [b], where each text's first token stands among the `num_rows * row_length`."""
    turns: Tensor
    """int64 [b], how many texts stand before it in its row."""
    num_rows: int
    row_length: int
    most: int
    """The most texts in a row; like the numbers above it known on the host, so that nothing synchronises."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Packing":
        """`fn` of each tensor."""
        return replace(self, slots=fn(self.slots), turns=fn(self.turns))

    def __getstate__(self) -> dict[str, Any]:
        return _by_value(self)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        _restore(self, state)


def _by_value(of: Any, shared: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields for a pickle, tensors but those `shared` as arrays.

    What a worker sends as a tensor lies in shared memory of its own and holds a file descriptor until it is freed.
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
    """One stream's part of a micro-batch."""

    positions: Tensor
    """int64 [b], each row's position in its stream."""
    ids: Tensor
    """int64 [b], which sample of the data it is; equal ids are copies of one sample."""
    seeds: Tensor
    """int64 [b], the 64 random bits that belong to the row."""
    images: Tensor | None = None
    """uint8 [b, 3, h, w]."""
    text: Tensor | None = None
    """int64 [b, L], token ids."""
    lengths: Tensor | None = None
    """int64 [b], the number of tokens of each row, start and end tokens included."""
    packing: Packing | None = None
    """How the texts are computed, several in a row; None: each in its own."""
    word_starts: Tensor | None = None
    """bool [b, L], where a word begins; None where the tokenizer does not say."""
    views: Tensor | None = None
    """uint8 [b, v, 3, h, w], further views of the images (see `data.train.<stream>.views`)."""
    groups: Tensor | None = None
    """int64 [b]; rows with equal numbers belong together (see `data.train.<stream>.group`)."""

    def __len__(self) -> int:
        return len(self.positions)

    def rows(self, rows: Tensor) -> "Samples":
        """Some of the samples, by their rows; their texts are not packed."""
        return replace(self, packing=None).map(lambda tensor: tensor[rows.to(tensor.device)])

    def to(self, device: torch.device) -> "Samples":
        """The same samples on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Samples":
        """The same samples in page-locked memory (what `DataLoader(pin_memory=True)` calls)."""
        return self.map(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell CUDA's allocator that `stream` reads them, too."""
        self.map(lambda tensor: tensor.record_stream(stream) or tensor)  # type: ignore[func-returns-value]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Samples":
        """`fn` of each tensor."""
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
    """One micro-batch of one rank: a part of every stream."""

    streams: Mapping[str, Samples]
    seed: int = 0
    """Seeds PyTorch's generator, for what a model does not draw by sample: the first sample's seed, known on the host."""
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    """When in the run the step stands: what scheduled values are functions of."""
    refused: tuple[Refused, ...] = ()
    """What was replaced while this batch was read."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """The number of terms of independent objectives, as far as they were counted (see `Task.counted`)."""

    def images(self, stream: str) -> Tensor:
        """A stream's images, uint8 [b, 3, h, w]. Raises: ValueError if it has none."""
        images = self.streams[stream].images
        if images is None:
            raise ValueError(
                f"data.train.{stream}.transform is null, but an objective reads the stream's images; "
                "expected one, such as mmpretrain.data.transforms.CenterCrop"
            )
        return images

    def texts(self, stream: str) -> tuple[Tensor, Tensor]:
        """A stream's token ids int64 [b, L] and their numbers int64 [b]. Raises: ValueError if it has none."""
        samples = self.streams[stream]
        if samples.text is None or samples.lengths is None:
            raise ValueError(
                f"data.train.{stream}.caption is null, but an objective reads the stream's texts; "
                f"expected a field: data.train.{stream}.caption=txt"
            )
        return samples.text, samples.lengths

    def grid_size(self, stream: str, patch_size: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns of patches that a stream's images are cut into; what fills no patch is left out."""
        height, width = self.images(stream).shape[2:]
        return height // patch_size[0], width // patch_size[1]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return replace(self, streams={name: samples.to(device) for name, samples in self.streams.items()})

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        return replace(self, streams={name: samples.pin_memory() for name, samples in self.streams.items()})

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell CUDA's allocator that `stream` reads them, too."""
        for samples in self.streams.values():
            samples.record_stream(stream)
