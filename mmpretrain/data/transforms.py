"""Image crops, in pixels of the original image, drawn from the sample's seed."""

import math
from typing import Protocol

from mmpretrain.data.decode import Crop
from mmpretrain.seeds import hash64, uniform

_ATTEMPTS = 10


class Transform(Protocol):
    """Function of (height, width, sample seed) that returns the crop."""

    def __call__(self, height: int, width: int, seed: int) -> Crop: ...


def _center(height: int, width: int, crop_height: int, crop_width: int) -> Crop:
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


class CenterCrop:
    """Take the largest centred square."""

    def __call__(self, height: int, width: int, seed: int = 0) -> Crop:
        side = min(height, width)
        return _center(height, width, side, side)


class RandomResizedCrop:
    """Take a random crop (Szegedy et al. 2015), drawn as in torchvision, with a random horizontal flip.

    Args:
        scale: smallest and largest fraction of the image area.
        ratio: smallest and largest aspect ratio, width / height; drawn log-uniformly.
        horizontal_flip: probability of a horizontal flip.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.9, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.0,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale is {list(scale)}; expected two numbers with 0 < smallest <= largest <= 1")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio is {list(ratio)}; expected two numbers with 0 < smallest <= largest")
        if not 0 <= horizontal_flip <= 1:
            raise ValueError(f"horizontal_flip is {horizontal_flip}; expected a probability between 0 and 1")
        self.scale = scale
        self.ratio = ratio
        self.horizontal_flip = horizontal_flip

    def __call__(self, height: int, width: int, seed: int) -> Crop:
        """Draw the crop of a height x width image; fall back to a central crop if ten draws do not fit."""
        seed = hash64(seed, "crop")
        flip = uniform(seed, 0) < self.horizontal_flip
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(_ATTEMPTS):
            u = [uniform(seed, 1 + 4 * attempt + i) for i in range(4)]
            area = height * width * (self.scale[0] + u[0] * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + u[1] * (high - low))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top, left = int(u[2] * (height - crop_height + 1)), int(u[3] * (width - crop_width + 1))
                return Crop(top, left, crop_height, crop_width, flip)
        crop_width = min(width, max(1, round(height * self.ratio[1])))
        crop_height = min(height, max(1, round(width / self.ratio[0])))
        center = _center(height, width, crop_height, crop_width)
        return Crop(center.top, center.left, crop_height, crop_width, flip)
