"""Pairwise sigmoid loss between images and texts: SigLIP (Zhai et al. 2023)."""

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
    """Pairwise sigmoid loss: a binary classification of every image-text combination of the batch as a pair or not.

    The temperature and the bias are learned.

    Args:
        model: its image encoder must be a plain ViT if patches are dropped.
        init_logit_scale: initial value of t. It is not bounded, since t of released models exceeds 100.
        init_logit_bias: initial value of b, about the log-odds of a pair, which are low because non-pairs dominate.
        mask_ratio: fraction of the patches that is dropped (FLIP, Li et al. 2023), or a schedule of it; 0: none. A schedule
            that ends with 0 corresponds to FLIP's unmasked stage.
        mask_kind: `random` drops patches at random; `block` keeps one rectangle.
        stream: data stream of the pairs.
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
        """Compute the inputs of the loss for a micro-batch.

        Returns: (rows: image [b, e], text [b, e], ids int64 [b]; shared: logit_scale [1], logit_bias [1]).
        """
        (stream,) = self.streams
        rows = {
            "image": encodings.image_embedding(stream, self.patches(encodings.batch.progress)),
            "text": encodings.text_embedding(stream),
            "ids": encodings.samples(stream).ids,
        }
        # Multiplying by 1 makes the bias a graph node separate from the parameter, as exp does for the scale.
        return rows, {"logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias * 1}

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """Compute `losses.sigmoid_loss` over the whole batch."""
        return sigmoid_loss(
            rows["image"], rows["text"], shared["logit_scale"], shared["logit_bias"], rows["ids"], split=True
        )
