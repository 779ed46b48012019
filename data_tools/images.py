"""Encoding of image files for shards, as upright 8-bit RGB or grey. Bytes that already qualify are kept unchanged."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

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
from mmpretrain.data.plain_file import read_file

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
WRITTEN_FORMATS = ("jpg", "png", "webp")
MAX_FILE_BYTES = 1 << 29  # uncompressed 8-bit RGBA takes 400 MB at the pixel limit of `decode`
MAX_SIDE = {"jpg": 65500, "webp": 16383}  # limits of libjpeg and libwebp, in pixels
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
    """Options of the image encoding.

    `short_side` is the maximum short side in pixels; larger images are reduced to it. `format` None keeps the input's
    format. `max_bytes` limits the memory for decoding, estimated from the header, like training's
    `data.max_image_bytes`.
    """

    short_side: int | None = None
    format: str | None = None
    background: tuple[int, int, int] = WHITE
    quality: int = 95
    max_bytes: int = MAX_IMAGE_BYTES


def check_image(path: Path, options: ImageOptions) -> tuple[int, int]:
    """Check an image file without encoding it, and return its size in bytes and modification time in ns.

    Raises: BadSample in the same cases as `read_image` and `encode_image`.
    """
    data, state = read_file(path, MAX_FILE_BYTES)
    image = _decode(data, options)
    if not can_keep(image, data, options):
        _check_sides(image, options)
        for _, strip in _strips(image):
            to_rgb(strip, options.background)  # some modes fail only here
    return state.st_size, state.st_mtime_ns


def read_image(path: Path, options: ImageOptions) -> bytes:
    """Return the bytes of an image file. Raises: BadSample if it cannot be read or is too large."""
    return read_file(path, MAX_FILE_BYTES)[0]


def _decode(data: bytes, options: ImageOptions) -> Image.Image:
    """Decode an image. Raises: BadSample if training would refuse the bytes or Pillow cannot decode them."""
    data = with_end_marker(data)
    image = open_image(data)
    check_memory(image, data, 3, options.max_bytes, "--max-image-bytes")
    check_jpeg(image, data)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # only these bytes are read, and Pillow raises many exceptions
        raise BadSample(f"the image does not decode ({type(error).__name__}: {error})".split("\n")[0]) from error
    return image


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """Yield boxes and strips of a decoded image. Converting a large image whole would hold several copies in Pillow."""
    height = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        box = (0, top, image.width, min(top + height, image.height))
        yield box, image.crop(box)


def _in_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Apply `to_rgb` to a decoded image, strip by strip."""
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
    """Raise BadSample if a side is longer than the output format allows."""
    extension = _written_extension(image, options)
    width, height = _reduced(image.size, options.short_side)
    if max(width, height) > MAX_SIDE.get(extension, max(width, height)):
        raise BadSample(
            f"{width} x {height} pixels, {extension} allows sides of {MAX_SIDE[extension]}: --format png, or a "
            "smaller --image-size"
        )


def can_keep(image: Image.Image, data: bytes, options: ImageOptions) -> bool:
    """Return True if the bytes of an opened image already meet the options, so that `encode_image` can keep them."""
    extension = EXTENSIONS.get(image.format or "")
    return (
        extension is not None
        and extension == (options.format or extension)
        and image.mode in ("RGB", "L")  # excludes palettes, alpha, and CMYK, which many JPEG decoders refuse
        and "transparency" not in image.info
        and not (image.format == "PNG" and data[24] > 8)  # Pillow opens 16-bit RGB as 8-bit RGB
        and not getattr(image, "is_animated", False)
        and (options.short_side is None or min(image.size) <= options.short_side)
        and orientation(image) == 1
    )


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Damaged EXIF, frequent on the web, is ignored, as viewers do."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow raises many exceptions for damaged EXIF
        return 1
    return value if value in range(1, 9) else 1


def encode_image(data: bytes, options: ImageOptions) -> tuple[str, bytes]:
    """Return (extension, bytes) for the shard: the original bytes if possible, else a newly encoded upright RGB image.

    Only the first frame of an animation is encoded. A JPEG that lacks only its end marker is kept unchanged.

    Raises: BadSample if the image cannot be used.
    """
    image = _decode(data, options)
    extension = _written_extension(image, options)
    if can_keep(image, data, options):
        return extension, data
    _check_sides(image, options)
    rgb, turn = _in_rgb(image, options.background), orientation(image)
    del image  # free its memory
    if turn in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[turn])
    if (size := _reduced(rgb.size, options.short_side)) != rgb.size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.info = {}  # drop EXIF, whose orientation no longer holds, and a palette's transparency
    if extension == "png":
        rgb.save(buffer, "PNG")
    else:
        rgb.save(buffer, "JPEG" if extension == "jpg" else "WEBP", quality=options.quality)
    return extension, buffer.getvalue()


def parse_color(text: str) -> tuple[int, int, int]:
    """Parse `R,G,B` or `#rrggbb` to (red, green, blue), each from 0 to 255. Raises: ValueError."""
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        red, green, blue = bytes.fromhex(text[1:])
        return red, green, blue
    if re.fullmatch(r"\d{1,3},\d{1,3},\d{1,3}", text):
        red, green, blue = map(int, text.split(","))
        if max(red, green, blue) <= 255:
            return red, green, blue
    raise ValueError(f"--background {text!r}: expected R,G,B with values from 0 to 255, or #rrggbb")
