"""An image as evaluation sees it: what `mmpretrain.load` hands out and the evaluators use themselves."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from mmpretrain.data.decode import MAX_IMAGE_BYTES, Crop, check_memory, check_size, decode_image, pixels_of, resized
from mmpretrain.data.transforms import CenterCrop, WholeImage


class Preprocess:
    """The largest centred square, or the whole image squashed, resized to the model's images.

    Normalisation is the model's own first layer, so that bytes are what travels.

    Args:
        image_size: the side of the result, in pixels.
        channels: 3, or 1 (grey) or 4 (with transparency).
        squash: whether the whole image is resized to a square.
        max_image_bytes: the most memory that decoding an image may take.
    """

    def __init__(
        self, image_size: int, channels: int = 3, squash: bool = False, max_image_bytes: int = MAX_IMAGE_BYTES
    ) -> None:
        self.image_size = image_size
        self.channels = channels
        self.max_image_bytes = max_image_bytes
        self._crop: Callable[[int, int], Crop] = WholeImage() if squash else CenterCrop()

    def __call__(self, image: Image.Image | bytes | str | Path, out: Tensor | None = None) -> Tensor:
        """An image, its encoded bytes or its file -> uint8 [channels, image_size, image_size].

        It is written to `out`, one of `decode.image_memory`'s, or to new memory. An image that Pillow has opened is
        decoded as Pillow does, which passes over damage to a JPEG; bytes and files are checked for it.

        Raises: ValueError (BadSample) if it cannot be decoded or takes too much memory; OSError if the file cannot be read.
        """
        if isinstance(image, str | Path):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            return decode_image(image, self._crop, self.image_size, self.channels, out, self.max_image_bytes)
        check_size(image.height, image.width)
        check_memory(image, b"", self.channels, self.max_image_bytes)
        return resized(pixels_of(image, self.channels), self._crop(image.height, image.width), self.image_size, out)
