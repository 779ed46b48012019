"""Patch dropping for contrastive objectives (FLIP, Li et al. 2023)."""

from typing import Literal

from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import MaskSpec
from mmpretrain.schedules import Scheduled, ScheduledValue, TrainingProgress


class PatchDrop:
    """Patch mask of a contrastive objective as a function of the samples seen (FLIP, Li et al. 2023).

    Objectives with the same stream, ratio and kind share one pass of the encoder.

    Args:
        model: its image encoder must be a plain ViT if patches are dropped.
        ratio: fraction of the patches that is dropped, or a schedule of it; 0: none.
        kind: see `masking.MaskSpec`.
        key: configuration key of the ratio, for error messages.

    Raises: ValueError if patches are dropped and the encoder is not a plain ViT, or the ratio is outside [0, 1).
    """

    def __init__(self, model: ImageTextModel, ratio: Scheduled, kind: Literal["random", "block"], key: str) -> None:
        self._ratio = ScheduledValue(ratio, key, at_least=0, below=1)
        self._kind: Literal["random", "block"] = kind
        if max(self._ratio.values) > 0 and not model.image_encoder.is_vit:
            raise ValueError(
                f"{key} is {ratio}, but model.image cannot drop patches; expected a plain ViT (vit_*), or 0"
            )

    def __call__(self, progress: TrainingProgress) -> MaskSpec | None:
        """Return the parameters of the patch mask at `progress`; None if no patch is dropped."""
        ratio = self._ratio(progress)
        return MaskSpec("contrast", (ratio, ratio), self._kind) if ratio else None
