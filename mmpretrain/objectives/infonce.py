"""InfoNCE between images and texts: CLIP (Radford et al. 2021)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmpretrain.losses import info_nce
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives import Encodings
from mmpretrain.usage import check_number


class InfoNCE(nn.Module):
    """The symmetric contrastive loss with a learned temperature.

    Args:
        model: unused; every objective gets it.
        init_logit_scale: s at the start; the loss sees exp of the parameter.
        max_logit_scale: s never leaves [1, this].
        stream: where the pairs come from.
    """

    def __init__(
        self,
        model: ImageTextModel,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        stream: str = "pairs",
    ) -> None:
        super().__init__()
        self.streams = (stream,)
        check_number("objective.infonce.max_logit_scale", max_logit_scale, above=1)
        check_number("objective.infonce.init_logit_scale", init_logit_scale, at_least=1, at_most=max_logit_scale)
        self.max_logit_scale = max_logit_scale
        self.logit_scale = nn.Parameter(torch.tensor([math.log(init_logit_scale)]))

    def embed(self, encodings: Encodings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows: image [b, e], text [b, e], ids int64 [b]; shared: logit_scale [1]."""
        (stream,) = self.streams
        rows = {
            "image": encodings.image_embedding(stream),
            "text": encodings.text_embedding(stream),
            "ids": encodings.samples(stream).ids,
        }
        return rows, {"logit_scale": self.logit_scale.exp()}

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """`losses.info_nce` over the whole batch."""
        return info_nce(rows["image"], rows["text"], shared["logit_scale"], rows["ids"])

    @torch.no_grad()
    def constrain(self) -> None:
        """After a step: s back into its bounds. (A clamp in the forward pass would stop s for good.)"""
        self.logit_scale.clamp_(0, math.log(self.max_logit_scale))
