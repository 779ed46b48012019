"""What a model is trained for. One file each; a class is an objective by having the methods of one protocol below.

An objective's `__init__` takes the model first, for its shapes alone, then the arguments of its YAML. It holds
the heads that it alone uses. No objective knows of ranks, micro-batches or other objectives.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from mmpretrain.batch import Batch, Samples
from mmpretrain.masking import MaskSpec, PatchMask
from mmpretrain.models.text import TextEncoding
from mmpretrain.models.vit import ImageEncoding


class Encodings(Protocol):
    """What an objective sees of a micro-batch (see `mmpretrain.task.Encodings`)."""

    batch: Batch

    def samples(self, stream: str) -> Samples: ...
    def pixels(self, stream: str) -> Tensor: ...
    def patch_mask(self, stream: str, spec: MaskSpec) -> PatchMask: ...
    def image(self, stream: str, mask: MaskSpec | None = None) -> ImageEncoding: ...
    def text(self, stream: str) -> TextEncoding: ...
    def image_embedding(self, stream: str) -> Tensor: ...
    def text_embedding(self, stream: str) -> Tensor: ...


@runtime_checkable
class IndependentObjective(Protocol):
    """A sum over independent terms, divided by their number in the whole batch; told from a coupled one by `count`."""

    streams: tuple[str, ...]

    def count(self, batch: Batch) -> Tensor:
        """The number of terms of a micro-batch, a scalar, from seeds and masks alone: no encoder runs for it."""
        ...

    def loss(self, encodings: Encodings) -> Tensor:
        """The SUM over the micro-batch's terms, a scalar."""
        ...


class CoupledObjective(Protocol):
    """A loss in which every sample of the batch meets every other."""

    streams: tuple[str, ...]

    def embed(self, encodings: Encodings) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """(rows: tensors [b, ...] of a micro-batch; shared: the objective's own scalars)."""
        ...

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """The loss of the whole batch, a scalar, from the rows [B, ...] of all of it; plain tensor code."""
        ...


Objective = IndependentObjective | CoupledObjective
Couple = Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor]], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""(objective, rows of this micro-batch, shared) -> (d loss / d rows, d loss / d shared)."""
