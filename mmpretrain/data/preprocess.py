"""Image preprocessing for evaluation, as `mmpretrain.load` returns it and the evaluators use it."""

from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from mmpretrain.data.decode import (
    DEEP_GREY,
    MAX_IMAGE_BYTES,
    check_memory,
    check_resized,
    check_size,
    decode_whole,
    image_memory,
    load,
    pixels_of,
    to_rgb,
)

Interpolation = Literal["bicubic", "bilinear"]


class Preprocess:
    """Resize an image and crop its centre with Pillow, as the transforms of open_clip and timm do for evaluation.

    Results equal those transforms bit for bit, except that transparency is flattened onto white and 16-bit grey is scaled
    to 8 bits, as in training. The result is uint8: the model normalises images in its first layer, so that only bytes are
    transferred.

    Args:
        image_size: side length of the result, in pixels.
        channels: 3 (RGB), 1 (grey) or 4 (with transparency).
        squash: resize both sides to the same length; if False, the aspect ratio is kept.
        max_image_bytes: memory limit for decoding or resizing one image, in bytes.
        interpolation: interpolation of the resize, antialiased.
        crop_pct: `image_size` divided by the length, rounded down, to which the shorter side is resized.
    """

    def __init__(
        self,
        image_size: int,
        channels: int = 3,
        squash: bool = False,
        max_image_bytes: int = MAX_IMAGE_BYTES,
        interpolation: Interpolation = "bicubic",
        crop_pct: float = 1.0,
    ) -> None:
        self.image_size = image_size
        self.channels = channels
        self.squash = squash
        self.max_image_bytes = max_image_bytes
        self._resample = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
        self._shorter_side = int(image_size / crop_pct)

    def __call__(self, image: Image.Image | bytes | str | Path, out: Tensor | None = None) -> Tensor:
        """Preprocess an opened image, encoded bytes or an image file.

        Bytes and files are checked for JPEG damage. An image that Pillow has opened is decoded by Pillow, which ignores
        such damage.

        Args:
            image: the image, its encoded bytes or the path of its file.
            out: tensor to write to, one image of `decode.image_memory`; None allocates new memory.

        Returns: uint8 [channels, image_size, image_size].
        Raises: ValueError (BadSample) if it cannot be decoded or takes too much memory; OSError if the file cannot be read.
        """
        if isinstance(image, str | Path):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            image = decode_whole(image, self.channels, self.max_image_bytes)
        else:
            check_size(image.height, image.width)
            check_memory(image, b"", self.channels, self.max_image_bytes)
            load(image)
        pixels = torch.from_numpy(pixels_of(self._resized(image), self.channels)).permute(2, 0, 1)
        out = image_memory(1, self.channels, self.image_size)[0] if out is None else out
        return out.copy_(pixels)

    def _resized(self, image: Image.Image) -> Image.Image:
        """Resize an image, in its own mode, and crop its centre."""
        height, width = self._resized_size(image.height, image.width)
        check_resized(height, width, self.max_image_bytes)
        if image.mode in DEEP_GREY:
            image = to_rgb(image)
        image = image.resize((width, height), self._resample)
        top, left = round((height - self.image_size) / 2), round((width - self.image_size) / 2)
        return image.crop((left, top, left + self.image_size, top + self.image_size))

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which an image of height x width pixels is resized before the crop."""
        side = self._shorter_side
        if self.squash:
            return side, side
        return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)
