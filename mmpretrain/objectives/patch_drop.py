"""Patches that contrastive objectives drop (FLIP, Li et al. 2023)."""

from typing import Literal

from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import MaskSpec
from mmpretrain.schedules import Scheduled, ScheduledValue, TrainingProgress


class PatchDrop:
    """The patches that a contrastive objective drops, as a function of the samples seen (FLIP, Li et al. 2023).

    All objectives that drop the same part of a stream's patches share one pass of the encoder.

    Args:
        model: its image encoder must be a plain ViT where any are dropped.
        ratio: the part that is dropped, 0 for none.
        kind: see `masking.MaskSpec`.
        key: the configuration key of the ratio, for messages.

    Raises: ValueError if the encoder cannot drop patches, or the ratio leaves [0, 1).
    """

    def __init__(self, model: ImageTextModel, ratio: Scheduled, kind: Literal["random", "block"], key: str) -> None:
        self._ratio = ScheduledValue(ratio, key, at_least=0, below=1)
        self._kind: Literal["random", "block"] = kind
        if max(self._ratio.values) > 0 and not model.image.is_vit:
            raise ValueError(
                f"{key} is {ratio}, but model.image cannot drop patches; expected a plain ViT (vit_*), or 0"
            )

    def __call__(self, progress: TrainingProgress) -> MaskSpec | None:
        """The mask at `progress`; None where nothing is dropped."""
        ratio = self._ratio(progress)
        return MaskSpec("contrast", (ratio, ratio), self._kind) if ratio else None
