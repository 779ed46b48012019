"""The pairwise sigmoid loss between images and texts: SigLIP (Zhai et al. 2023)."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mmpretrain.errors import check_number
from mmpretrain.losses import sigmoid_loss
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Encodings
from mmpretrain.objectives.patch_drop import PatchDrop
from mmpretrain.schedules import Scheduled


class Sigmoid(nn.Module):
    """Every image-text pair of the batch is its own binary question; temperature and bias are learned.

    Args:
        model: its image encoder must be a plain ViT where patches are dropped.
        init_logit_scale: t at the start; it is not bounded, released models exceed 100.
        init_logit_bias: b at the start, about the log-odds of a pair among so many non-pairs.
        mask_ratio: the part of the patches that is dropped (FLIP, Li et al. 2023), 0 for none; a schedule with 0 at its
            end has FLIP's unmasked stage.
        mask_kind: `random` patches, or `block`: all but one rectangle of them.
        stream: where the pairs come from.
    """

    def __init__(
        self,
        model: ImageTextModel,
        init_logit_scale: float = 10.0,
        init_logit_bias: float = -10.0,
        mask_ratio: Scheduled = 0.0,
        mask_kind: Literal["random", "block"] = "random",
        stream: str = "pairs",
        config_path: str = "objective.sigmoid",
    ) -> None:
        super().__init__()
        self.streams = (stream,)
        self.patches = PatchDrop(model, mask_ratio, mask_kind, f"{config_path}.mask_ratio")
        check_number(f"{config_path}.init_logit_scale", init_logit_scale, above=0)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(init_logit_scale)]))
        self.logit_bias = nn.Parameter(torch.tensor([float(init_logit_bias)]))

    def embed(self, encodings: Encodings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows: image [b, e], text [b, e], ids int64 [b]; shared: logit_scale [1], logit_bias [1]."""
        (stream,) = self.streams
        rows = {
            "image": encodings.image_embedding(stream, self.patches(encodings.batch.progress)),
            "text": encodings.text_embedding(stream),
            "ids": encodings.samples(stream).ids,
        }
        # A product with one keeps the bias a graph node of its own, as exp does for the scale.
        return rows, {"logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias * 1}

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """`losses.sigmoid_loss` over the whole batch."""
        return sigmoid_loss(
            rows["image"], rows["text"], shared["logit_scale"], shared["logit_bias"], rows["ids"], split=True
        )
