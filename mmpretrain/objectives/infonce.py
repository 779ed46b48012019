"""InfoNCE between images and texts: CLIP (Radford et al. 2021)."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mmpretrain.errors import check_number
from mmpretrain.losses import info_nce, multi_positive_info_nce
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Encodings
from mmpretrain.objectives.patch_drop import PatchDrop
from mmpretrain.schedules import Scheduled, TrainingProgress


class InfoNCE(nn.Module):
    """Symmetric contrastive loss with a learned temperature.

    Args:
        model: its image encoder must be a plain ViT if patches are dropped.
        init_logit_scale: initial value of s = exp(parameter).
        max_logit_scale: upper bound of s; the lower bound is 1.
        mask_ratio: fraction of the patches that is dropped (FLIP, Li et al. 2023), or a schedule of it; 0: none. A schedule
            that ends with 0 corresponds to FLIP's unmasked stage.
        mask_kind: `random` drops patches at random; `block` keeps one rectangle.
        stream: data stream of the pairs.
        positives: `pair`: the positive of an image is its own text. `group`: all texts of its group are positives (see
            `data.train.<stream>.group`), and likewise for texts.
    """

    def __init__(
        self,
        model: ImageTextModel,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        mask_ratio: Scheduled = 0.0,
        mask_kind: Literal["random", "block"] = "random",
        stream: str = "pairs",
        positives: Literal["pair", "group"] = "pair",
        config_path: str = "objective.infonce",
    ) -> None:
        super().__init__()
        self.streams, self._config_path = (stream,), config_path
        self.patches = PatchDrop(model, mask_ratio, mask_kind, f"{config_path}.mask_ratio")
        self.positives = positives
        check_number(f"{config_path}.max_logit_scale", max_logit_scale, above=1)
        check_number(f"{config_path}.init_logit_scale", init_logit_scale, at_least=1, at_most=max_logit_scale)
        self.max_logit_scale = max_logit_scale
        self.logit_scale = nn.Parameter(torch.tensor([math.log(init_logit_scale)]))

    def embed(self, encodings: Encodings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the inputs of the loss for a micro-batch.

        Returns: (rows: image [b, e], text [b, e], ids or groups int64 [b]; shared: logit_scale [1]).

        Raises: ValueError if `positives` is `group` and the stream has no groups.
        """
        (stream,) = self.streams
        samples = encodings.samples(stream)
        rows = {
            "image": encodings.image_embedding(stream, self.patches(encodings.batch.progress)),
            "text": encodings.text_embedding(stream),
        }
        if self.positives == "pair":
            rows["ids"] = samples.ids
        elif samples.groups is not None:
            rows["groups"] = samples.groups
        else:
            raise ValueError(
                f"{self._config_path}.positives is 'group', but data.train.{stream}.group is null; set it to caption, id, "
                "cls or json.<field>"
            )
        return rows, {"logit_scale": self.logit_scale.exp()}

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """Compute `losses.info_nce` or `losses.multi_positive_info_nce` over the whole batch."""
        if self.positives == "group":
            return multi_positive_info_nce(
                rows["image"], rows["text"], shared["logit_scale"], rows["groups"], split=True
            )
        return info_nce(rows["image"], rows["text"], shared["logit_scale"], rows["ids"], split=True)

    @torch.no_grad()
    def after_step(self, model: ImageTextModel, progress: TrainingProgress, skipped: Tensor) -> None:
        """Clamp s to its bounds. (Clamped in the forward pass, s would get no gradient beyond a bound.)"""
        self.logit_scale.clamp_(0, math.log(self.max_logit_scale))
