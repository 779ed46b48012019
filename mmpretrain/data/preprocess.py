"""Image preprocessing for evaluation, as `mmpretrain.load` returns it and the evaluators use it."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from mmpretrain.data.decode import MAX_IMAGE_BYTES, Crop, check_memory, check_size, decode_image, pixels_of, resized
from mmpretrain.data.transforms import CenterCrop, WholeImage


class Preprocess:
    """Crop the largest centred square, or squash the whole image, and resize it to the model's image size.

    The result is uint8: the model normalises images in its first layer, so that only bytes are transferred.

    Args:
        image_size: side length of the result, in pixels.
        channels: 3 (RGB), 1 (grey) or 4 (with transparency).
        squash: resize the whole image to a square, without a crop.
        max_image_bytes: memory limit for decoding one image, in bytes.
    """

    def __init__(
        self, image_size: int, channels: int = 3, squash: bool = False, max_image_bytes: int = MAX_IMAGE_BYTES
    ) -> None:
        self.image_size = image_size
        self.channels = channels
        self.max_image_bytes = max_image_bytes
        self._crop: Callable[[int, int], Crop] = WholeImage() if squash else CenterCrop()

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
            return decode_image(image, self._crop, self.image_size, self.channels, out, self.max_image_bytes)
        check_size(image.height, image.width)
        check_memory(image, b"", self.channels, self.max_image_bytes)
        return resized(pixels_of(image, self.channels), self._crop(image.height, image.width), self.image_size, out)
