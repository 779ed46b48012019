"""Mixing of two images and their classes: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019)."""

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor

from mmpretrain.errors import UsageError, check_number
from mmpretrain.seeds import hash64, uniform


class Mix:
    """Mix each image with another one of its source, by a share that is drawn from a Beta distribution.

    timm mixes the images of a batch with each other, so that an image depends on the batch. Here the other image is drawn
    from the sample's seed among all samples of the source: the result does not depend on ranks or micro-batches. It is
    decoded in addition.

    Args:
        mixup_alpha: parameter of mixup's Beta distribution; 0: no mixup.
        cutmix_alpha: parameter of CutMix's Beta distribution; 0: no CutMix.
        prob: fraction of the images that are mixed.
        switch_prob: fraction of the mixed images that are mixed by CutMix if both are on.

    Raises: UsageError if a number is out of range, or both parameters are 0.
    """

    def __init__(
        self, mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0, prob: float = 1.0, switch_prob: float = 0.5
    ) -> None:
        check_number("mixup_alpha", mixup_alpha, at_least=0)
        check_number("cutmix_alpha", cutmix_alpha, at_least=0)
        check_number("prob", prob, at_least=0, at_most=1)
        check_number("switch_prob", switch_prob, at_least=0, at_most=1)
        if not mixup_alpha and not cutmix_alpha:
            raise UsageError("mixup_alpha and cutmix_alpha are 0; expected one above 0, or no mix: mix=null")
        self._mixup_alpha, self._cutmix_alpha, self._prob = mixup_alpha, cutmix_alpha, prob
        self._cutmix_share = switch_prob if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)

    def is_mixed(self, seed: int) -> bool:
        """Return True if the image of the sample with this seed is mixed."""
        return uniform(hash64(seed, "mix"), 0) < self._prob

    def __call__(self, image: Tensor, other: Tensor, seed: int) -> float:
        """Mix `other` into `image` in place, uint8 [c, h, w] each.

        Mixup: share * other + (1 - share) * image, rounded. CutMix: a rectangle of `image` is replaced by that of `other`.

        Returns: the share of `other`, in [0, 1].
        """
        own = hash64(seed, "mix")
        is_cutmix = uniform(own, 1) < self._cutmix_share
        alpha = self._cutmix_alpha if is_cutmix else self._mixup_alpha
        np.random.seed(own % 2**32)  # noqa: NPY002, timm draws the rectangle from it
        kept = float(np.random.beta(alpha, alpha))  # noqa: NPY002
        if is_cutmix:
            (top, bottom, left, right), kept = cutmix_bbox_and_lam(image.shape, kept)
            image[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        else:
            image.copy_(torch.lerp(other.float(), image.float(), kept).round_())
        return 1.0 - float(kept)
