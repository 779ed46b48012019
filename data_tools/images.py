"""One image file -> the bytes that go into a shard: upright 8-bit RGB or grey, its own bytes if they are."""

import io
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmpretrain.data.decode import WHITE, BadSample, open_image, to_rgb

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
WRITTEN_FORMATS = ("jpg", "png", "webp")
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
    """`short_side` in pixels (larger images are reduced to it); `format` None keeps the input's."""

    short_side: int | None = None
    format: str | None = None
    background: tuple[int, int, int] = WHITE
    quality: int = 95


def check_image(path: Path, options: ImageOptions) -> None:
    """Raises BadSample where `encode_image` would, without encoding."""
    data = read_bytes(path)
    image = _decode(data)
    if not can_keep(image, data, options):
        to_rgb(image, options.background)  # some modes fail only here


def _decode(data: bytes) -> Image.Image:
    image = open_image(data)
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise BadSample(f"the image does not decode ({type(error).__name__}: {error})".split("\n")[0]) from error
    return image


def read_bytes(path: Path) -> bytes:
    """A regular file's bytes; raises BadSample where there is none."""
    if not path.is_file():
        raise BadSample("no such file")
    return path.read_bytes()


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
    except (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error):
        return 1
    return value if value in range(1, 9) else 1


def encode_image(data: bytes, options: ImageOptions) -> tuple[str, bytes]:
    """(extension, bytes) for the shard: the image's own, or an upright RGB image anew; raises BadSample.

    Of an animation it is the first frame.
    """
    image = _decode(data)
    extension = options.format or EXTENSIONS.get(image.format or "", "jpg")
    if can_keep(image, data, options):
        return extension, data
    rgb = to_rgb(image, options.background)
    if (turn := orientation(image)) in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[turn])
    if options.short_side is not None and min(rgb.size) > options.short_side:
        scale = options.short_side / min(rgb.size)
        rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.LANCZOS)
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
