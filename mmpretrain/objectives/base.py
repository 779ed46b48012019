"""What a model is trained for. One file each; a class is an objective by having the methods of one protocol below.

An objective's `__init__` takes the model first, for its shapes alone, then the arguments of its YAML. It holds
the heads that it alone uses. No objective knows of ranks, micro-batches or other objectives.

It may have, beside them: `num_views`, how many further views of its streams' images it reads; `constrain()`, called
after each step; `fit(tokenizer: TokenIds)`, called before the first; `examples(encodings, decode) -> list[Example]`,
something to look at of each sample of a few.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmpretrain.batch import Batch, Samples
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import MaskSpec, PatchMask, TokenMask, TokenMaskSpec
from mmpretrain.schedules import Now, Scheduled, Value

Terms = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""A sum over terms, a scalar; or with it further sums to be shown per term, such as hits as `accuracy`."""


Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, special tokens left out."""


@dataclass(frozen=True)
class Example:
    """What an objective made of one sample, to be looked at."""

    images: Sequence[Tensor]
    """Pictures beside each other, uint8 [3, h, w] each."""
    text: str


class TokenIds(Protocol):
    """What an objective may know of the tokenizer: the ids that it gives, and the mask token's, if it has one."""

    vocab_size: int

    @property
    def mask_id(self) -> int | None: ...


class Encodings(Protocol):
    """What an objective sees of a micro-batch (see `mmpretrain.training.task.Encodings`)."""

    batch: Batch

    def samples(self, stream: str) -> Samples: ...
    def num_terms(self, objective: "IndependentObjective") -> int | None: ...
    def pixels(self, stream: str) -> Tensor: ...
    def patch_mask(self, stream: str, spec: MaskSpec) -> PatchMask: ...
    def image(self, stream: str, mask: MaskSpec | None = None) -> Encoding: ...
    def view(self, stream: str, number: int) -> Encoding: ...
    def token_mask(self, stream: str, spec: TokenMaskSpec) -> TokenMask: ...
    def text(self, stream: str, mask: TokenMaskSpec | None = None) -> Encoding: ...
    @property
    def token_embeddings(self) -> Tensor: ...
    def with_text(self, stream: str, text: Tensor, lengths: Tensor) -> "Encodings": ...
    def to_images(self, pixels: Tensor) -> Tensor: ...
    def image_embedding(self, stream: str, mask: MaskSpec | None = None) -> Tensor: ...
    def text_embedding(self, stream: str) -> Tensor: ...


@runtime_checkable
class IndependentObjective(Protocol):
    """A sum over independent terms, divided by their number in the whole batch; told from a coupled one by `count`."""

    @property
    def streams(self) -> tuple[str, ...]: ...

    def count(self, batch: Batch) -> Tensor:
        """The number of terms of a micro-batch, a scalar, from seeds and masks alone: no encoder runs for it.

        In training the micro-batch is still on the host: nothing waits for the device.
        """
        ...

    def loss(self, encodings: Encodings) -> Terms:
        """The SUM over the micro-batch's terms, a scalar; further sums beside it are shown per term."""
        ...


class CoupledObjective(Protocol):
    """A loss in which every sample of the batch meets every other."""

    @property
    def streams(self) -> tuple[str, ...]: ...

    def embed(self, encodings: Encodings) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """(rows: tensors [b, ...] of a micro-batch; shared: the objective's own scalars)."""
        ...

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """The loss of the whole batch, a scalar, from the rows [B, ...] of all of it; plain tensor code."""
        ...


Objective = IndependentObjective | CoupledObjective
Couple = Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor]], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""(objective, rows of this micro-batch, shared) -> (d loss / d rows, d loss / d shared)."""


class DroppedPatches:
    """Which patches a contrastive objective drops at some moment (FLIP, Li et al. 2023).

    All objectives that drop the same part of a stream's patches share one pass of the encoder.

    Args:
        model: its image encoder must be a plain ViT where any are dropped.
        ratio: the part that is dropped, 0 for none.
        kind: see `masking.MaskSpec`.
        key: the configuration key of the ratio, for messages.

    Raises: ValueError if the encoder cannot drop patches, or the ratio leaves [0, 1).
    """

    def __init__(self, model: ImageTextModel, ratio: Scheduled, kind: Literal["random", "block"], key: str) -> None:
        self._ratio = Value(ratio, key, at_least=0, below=1)
        self._kind: Literal["random", "block"] = kind
        if max(self._ratio.values) > 0 and not model.image.is_vit:
            raise ValueError(
                f"{key} is {ratio}, but model.image cannot drop patches; expected a plain ViT (vit_*), or 0"
            )

    def __call__(self, now: Now) -> MaskSpec | None:
        """The mask at `now`; None where nothing is dropped."""
        ratio = self._ratio(now)
        return MaskSpec("contrast", (ratio, ratio), self._kind) if ratio else None


def next_tokens(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What is predicted at each place but the last: (the token after it int64 [b, L - 1], whether there is one, bool)."""
    places = torch.arange(ids.shape[1] - 1, device=ids.device)
    return ids[:, 1:], places < (lengths - 1)[:, None]


Places = tuple[Tensor, Tensor]
"""(rows, columns), int64 [n] each."""


def places(mask: Tensor, number: int | None) -> Places:
    """Where a mask, bool [b, L], is true: an index as the mask itself is.

    `number`: how many there are, exactly; None: not known, so that the host waits for the device to count them.
    """
    found = mask.nonzero() if number is None else torch.nonzero_static(mask, size=number)
    return found[:, 0], found[:, 1]
