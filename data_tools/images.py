"""One image file -> the bytes that go into a shard: upright 8-bit RGB or grey, its own bytes if they are."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_tools.files import read_file
from mmpretrain.data.decode import (
    MAX_IMAGE_BYTES,
    WHITE,
    BadSample,
    check_jpeg,
    check_memory,
    open_image,
    to_rgb,
    with_end_marker,
)

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
WRITTEN_FORMATS = ("jpg", "png", "webp")
MAX_FILE_BYTES = 1 << 29  # uncompressed 8-bit RGBA of as many pixels as `decode` takes has 400 MB
MAX_SIDE = {"jpg": 65500, "webp": 16383}  # libjpeg's and libwebp's
STRIP_PIXELS = 1 << 18
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageOptions:
    """`short_side` in pixels (larger images are reduced to it); `format` None keeps the input's.

    `max_bytes` is the most memory that decoding may take by the image's header, as `data.max_image_bytes` in training.
    """

    short_side: int | None = None
    format: str | None = None
    background: tuple[int, int, int] = WHITE
    quality: int = 95
    max_bytes: int = MAX_IMAGE_BYTES


def check_image(path: Path, options: ImageOptions) -> tuple[int, int]:
    """An image file's size in bytes and modification time in ns.

    Raises: BadSample where `read_image` or `encode_image` would, without encoding.
    """
    data, state = read_file(path, MAX_FILE_BYTES)
    image = _decode(data, options)
    if not can_keep(image, data, options):
        _check_sides(image, options)
        for _, strip in _strips(image):
            to_rgb(strip, options.background)  # some modes fail only here
    return state.st_size, state.st_mtime_ns


def read_image(path: Path, options: ImageOptions) -> bytes:
    """An image file's bytes. Raises: BadSample where it cannot be read or is too large."""
    return read_file(path, MAX_FILE_BYTES)[0]


def _decode(data: bytes, options: ImageOptions) -> Image.Image:
    """A decoded image. Raises: BadSample where training, too, refuses the bytes, and where Pillow cannot decode them."""
    data = with_end_marker(data)
    image = open_image(data)
    check_memory(image, data, 3, options.max_bytes, "--max-image-bytes")
    check_jpeg(image, data)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # nothing is read here but these bytes, and Pillow says what it dislikes in many ways
        raise BadSample(f"the image does not decode ({type(error).__name__}: {error})".split("\n")[0]) from error
    return image


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """Strips of a decoded image and their boxes: of a large one converted whole, Pillow would hold several copies."""
    height = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        box = (0, top, image.width, min(top + height, image.height))
        yield box, image.crop(box)


def _in_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """`to_rgb` of a decoded image, strip by strip."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rgb = Image.new("RGB", image.size)
    for box, strip in _strips(image):
        rgb.paste(to_rgb(strip, background), box)
    return rgb


def _written_extension(image: Image.Image, options: ImageOptions) -> str:
    return options.format or EXTENSIONS.get(image.format or "", "jpg")


def _reduced(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    if short_side is None or min(size) <= short_side:
        return size
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def _check_sides(image: Image.Image, options: ImageOptions) -> None:
    """Raises: BadSample if a side is longer than the format that is written allows."""
    extension = _written_extension(image, options)
    width, height = _reduced(image.size, options.short_side)
    if max(width, height) > MAX_SIDE.get(extension, max(width, height)):
        raise BadSample(
            f"{width} x {height} pixels, {extension} allows sides of {MAX_SIDE[extension]}: --format png, or a "
            "smaller --image-size"
        )


def can_keep(image: Image.Image, data: bytes, options: ImageOptions) -> bool:
    """Whether an open image's bytes already are what `encode_image` would have to make of them."""
    extension = EXTENSIONS.get(image.format or "")
    return (
        extension is not None
        and extension == (options.format or extension)
        and image.mode in ("RGB", "L")  # so not CMYK, which many JPEG decoders refuse, nor palettes, nor alpha
        and "transparency" not in image.info
        and not (image.format == "PNG" and data[24] > 8)  # Pillow opens 16-bit RGB as 8-bit RGB
        and not getattr(image, "is_animated", False)
        and (options.short_side is None or min(image.size) <= options.short_side)
        and orientation(image) == 1
    )


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; damaged EXIF, frequent on the web, counts as none, as in viewers."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # as above
        return 1
    return value if value in range(1, 9) else 1


def encode_image(data: bytes, options: ImageOptions) -> tuple[str, bytes]:
    """(extension, bytes) for the shard: the image's own, or an upright RGB image anew; raises BadSample.

    Of an animation it is the first frame; a JPEG that lacks only its end marker is kept as it is.
    """
    image = _decode(data, options)
    extension = _written_extension(image, options)
    if can_keep(image, data, options):
        return extension, data
    _check_sides(image, options)
    rgb, turn = _in_rgb(image, options.background), orientation(image)
    del image  # its memory
    if turn in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[turn])
    if (size := _reduced(rgb.size, options.short_side)) != rgb.size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.info = {}  # neither EXIF, which the turn has made untrue, nor a palette's transparency
    if extension == "png":
        rgb.save(buffer, "PNG")
    else:
        rgb.save(buffer, "JPEG" if extension == "jpg" else "WEBP", quality=options.quality)
    return extension, buffer.getvalue()


def parse_color(text: str) -> tuple[int, int, int]:
    """`R,G,B` or `#rrggbb` -> (red, green, blue), each 0 to 255; raises ValueError."""
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        red, green, blue = bytes.fromhex(text[1:])
        return red, green, blue
    if re.fullmatch(r"\d{1,3},\d{1,3},\d{1,3}", text):
        red, green, blue = map(int, text.split(","))
        if max(red, green, blue) <= 255:
            return red, green, blue
    raise ValueError(f"--background {text!r}: expected R,G,B with values from 0 to 255, or #rrggbb")
