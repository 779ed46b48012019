"""Augmentations of cropped images before batching, drawn from the sample's seed."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from mmpretrain.seeds import hash64, torch_seed

Augmentation = Callable[[Tensor], Tensor]
"""Function from an image, uint8 [c, h, w], to one of the same dtype and shape.

It draws from the global generators of torch, NumPy or Python.
"""


def augmented(image: Tensor, augmentations: Sequence[Augmentation], seed: int) -> Tensor:
    """Apply augmentations to one image, uint8 [c, h, w]. All global generators are seeded from the sample's seed.

    Raises: ValueError if the dtype or shape changes, since the copy into a uint8 batch would convert it silently.
    """
    if not augmentations:
        return image
    expected = _described(image)
    own = hash64(seed, "augment")
    random.seed(own)
    np.random.seed(own % 2**32)  # noqa: NPY002, timm draws from it
    with torch_seed(own):
        for augmentation in augmentations:
            image = augmentation(image)
    if _described(image) != expected:
        raise ValueError(
            f"{', '.join(type(each).__name__ for each in augmentations)} turned an image {expected} into "
            f"{_described(image)}; an augmentation keeps type and shape: end `augment` with one that converts back "
            "(torchvision.transforms.v2.ToDtype, v2.Resize), or leave out what changes it"
        )
    return image


def _described(image: Tensor) -> str:
    return (
        f"{image.dtype} {list(image.shape)}".removeprefix("torch.") if isinstance(image, Tensor) else repr(type(image))
    )


class TimmAugment:
    """Automatic augmentation of timm: RandAugment, AugMix or AutoAugment.

    Args:
        policy: policy as in timm's `--aa`, such as `rand-m9-mstd0.5-inc1`, `augmix-m3-w3` or `original`.

    Raises: ValueError if timm does not know the policy.
    """

    def __init__(self, policy: str) -> None:
        # The fill colour of pixels that a rotation uncovers is CLIP's mean, in grey levels.
        fill = {"translate_const": 100, "img_mean": (123, 117, 104)}
        try:
            if policy.startswith("rand"):
                self._apply = auto_augment.rand_augment_transform(policy, fill)
            elif policy.startswith("augmix"):
                self._apply = auto_augment.augment_and_mix_transform(policy, fill)
            else:
                self._apply = auto_augment.auto_augment_transform(policy, fill)
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(f"policy is {policy!r}; expected one of timm's, such as rand-m9-mstd0.5-inc1") from error

    def __call__(self, image: Tensor) -> Tensor:
        """Augment an image, uint8 [3, h, w]. Raises: ValueError for another number of channels."""
        if len(image) != 3:
            raise ValueError(f"TimmAugment got images of {len(image)} channels; expected 3, or augmentation=none")
        picture = self._apply(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
