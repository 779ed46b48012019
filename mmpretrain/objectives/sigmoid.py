"""The pairwise sigmoid loss between images and texts: SigLIP (Zhai et al. 2023)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmpretrain.losses import sigmoid_loss
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives import Encodings
from mmpretrain.usage import check_number


class Sigmoid(nn.Module):
    """Every image-text pair of the batch is its own binary question; temperature and bias are learned.

    Args:
        model: unused; every objective gets it.
        init_logit_scale: t at the start; it is not bounded, released models exceed 100.
        init_logit_bias: b at the start, about the log-odds of a pair among so many non-pairs.
        stream: where the pairs come from.
    """

    def __init__(
        self,
        model: ImageTextModel,
        init_logit_scale: float = 10.0,
        init_logit_bias: float = -10.0,
        stream: str = "pairs",
    ) -> None:
        super().__init__()
        self.streams = (stream,)
        check_number("objective.sigmoid.init_logit_scale", init_logit_scale, above=0)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(init_logit_scale)]))
        self.logit_bias = nn.Parameter(torch.tensor([float(init_logit_bias)]))

    def embed(self, encodings: Encodings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows: image [b, e], text [b, e], ids int64 [b]; shared: logit_scale [1], logit_bias [1]."""
        (stream,) = self.streams
        rows = {
            "image": encodings.image_embedding(stream),
            "text": encodings.text_embedding(stream),
            "ids": encodings.samples(stream).ids,
        }
        # A product with one keeps the bias a graph node of its own, as exp does for the scale.
        return rows, {"logit_scale": self.logit_scale.exp(), "logit_bias": self.logit_bias * 1}

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """`losses.sigmoid_loss` over the whole batch."""
        return sigmoid_loss(rows["image"], rows["text"], shared["logit_scale"], shared["logit_bias"], rows["ids"])
