"""What is done to a cropped image before it is batched, drawn from the sample's seed like everything else."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor

from mmpretrain.seeds import hash64, torch_seed

Augmentation = Callable[[Tensor], Tensor]
"""uint8 [c, h, w] -> the same; draws from torch's, NumPy's or Python's global generators."""


def augmented(image: Tensor, augmentations: Sequence[Augmentation], seed: int) -> Tensor:
    """Apply augmentations to one image, uint8 [c, h, w], every generator seeded from the sample's seed.

    Raises: ValueError if they leave another type or shape, which a batch of uint8 images would hold changed unseen.
    """
    if not augmentations:
        return image
    expected = _described(image)
    own = hash64(seed, "augment")
    random.seed(own)
    np.random.seed(own % 2**32)  # noqa: NPY002, what timm draws from
    with torch_seed(own):
        for augmentation in augmentations:
            image = augmentation(image)
    if _described(image) != expected:
        raise ValueError(
            f"{', '.join(type(each).__name__ for each in augmentations)} turned an image {expected} into "
            f"{_described(image)}; an augmentation returns what it gets: end `augment` with one that converts back "
            "(torchvision.transforms.v2.ToDtype, v2.Resize), or leave out what changes it"
        )
    return image


def _described(image: Tensor) -> str:
    return (
        f"{image.dtype} {list(image.shape)}".removeprefix("torch.") if isinstance(image, Tensor) else repr(type(image))
    )


class TimmAugment:
    """timm's automatic augmentation by its policy's name: RandAugment, AugMix or AutoAugment.

    Args:
        policy: such as `rand-m9-mstd0.5-inc1`, `augmix-m3-w3` or `original`, as timm's `--aa` takes it.

    Raises: ValueError if timm does not know the policy.
    """

    def __init__(self, policy: str) -> None:
        # Image statistics, which fill what a rotation uncovers: CLIP's mean, in grey levels.
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
        """uint8 [3, h, w] -> the same. Raises: ValueError for another number of channels."""
        if len(image) != 3:
            raise ValueError(f"TimmAugment got images of {len(image)} channels; expected 3, or augmentation=none")
        picture = self._apply(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
