"""Decoding of image bytes to uint8 pixels, with limits and checks for damage.

JPEGs are decoded by simplejpeg, for training at 1/2, 1/4 or 1/8 scale if the crop stays at least as large as the target;
all other images are decoded by Pillow. A JPEG is refused if libjpeg reports missing or overwritten data. JPEG and WebP
have no checksums, so two kinds of damage go undetected: overwritten JPEG data that happen to decode to the right number
of blocks, and damage to a WebP of full length. `decode_image` crops and resizes for training (bicubic, antialiased);
evaluation resizes whole images as the model prescribes (see `mmpretrain.data.preprocess`).
"""

import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_FORMATS_OF_ANIMATIONS = ("GIF", "PNG", "WEBP")
MAX_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 1 << 29
WHITE = (255, 255, 255)

# Silence Pillow's warnings about images: this module checks limits and damage itself, and the rest is harmless.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadSample(ValueError):
    """The bytes of a sample cannot be used.

    Args:
        reason: the reason in one line, which `quarantine.jsonl` records.
        code: kind of the reason, which is recorded beside it, to count and filter by.
    """

    def __init__(self, reason: str, code: str = "unusable") -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Crop:
    """Crop box in pixels of the original image; `flip` mirrors it horizontally."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def open_image(data: bytes) -> Image.Image:
    """Open an image of an allowed format without decoding it.

    Raises: BadSample if the format is not one of `FORMATS` or it has more than `MAX_PIXELS` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # Pillow's message contains a memory address
        raise BadSample(f"no readable image (none of {', '.join(FORMATS)})", "image_format") from error
    except Image.DecompressionBombError as error:
        raise BadSample(f"no readable image (DecompressionBombError: {error})", "image_size") from error
    except MemoryError:
        raise
    except Exception as error:  # only these bytes are read, and Pillow raises many exceptions
        raise _damaged("no readable image", error) from error
    check_size(image.height, image.width)
    return image


def _is_animated(image: Image.Image) -> bool:
    """Return True for an animation. Raises: BadSample if the second image of a file is damaged."""
    try:
        return image.format in _FORMATS_OF_ANIMATIONS and bool(getattr(image, "is_animated", False))
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many exceptions, as in `open_image`
        raise _damaged("the image does not decode", error) from error


def _damaged(what: str, error: Exception) -> BadSample:
    return BadSample(f"{what} ({type(error).__name__}: {error})".split("\n")[0], "image_damaged")


def check_size(height: int, width: int) -> None:
    """Raise BadSample if an image has more than `MAX_PIXELS` pixels."""
    if height * width > MAX_PIXELS:
        raise BadSample(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}", "image_size")


_STORED_RGB_BYTES = 4  # per pixel in Pillow
_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # likewise; other modes as RGB
_WEBP_BYTES = 9  # additional memory of libwebp, per pixel


def check_memory(
    image: Image.Image, data: bytes, channels: int, max_bytes: int, option: str = "data.max_image_bytes"
) -> None:
    """Raise BadSample if decoding an image would take more than `max_bytes` of memory.

    Args:
        image: opened image, not yet decoded.
        data: encoded bytes of the image; empty if unknown.
        channels: channels of the result, as in `decode_image`.
        max_bytes: memory limit, in bytes.
        option: option that sets the limit, named in the message.
    """
    stored = _STORED_BYTES.get(image.mode, _STORED_RGB_BYTES)
    each = stored + (5 if channels == 1 else channels)  # torch resizes one channel as if it were four
    if image.format == "WEBP":
        each += _WEBP_BYTES
    elif image.format in ("JPEG", "MPO") and image.height * image.width * (each + 8) > max_bytes:
        each += 2 * len(image.getbands()) * ("progressive" in image.info or _keeps_coefficients(data))
    num_bytes = image.height * image.width * each
    if image.format == "TIFF":
        num_bytes = max(num_bytes, image.height * image.width * stored + _strip_bytes(image))
    _check_bytes(image.height, image.width, num_bytes, max_bytes, option)


def _strip_bytes(image: Image.Image) -> int:
    """Return the memory of libtiff, in bytes, to decode a strip or tile of a compressed TIFF: its pixels and its data."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(259, 1) == 1:  # tag Compression is none; Pillow reads such files itself
        return 0
    samples, bits = tags.get(277, len(image.getbands())), max(tags.get(258, (1,)))
    rows = tags.get(323, tags.get(278))  # TileLength, RowsPerStrip
    if not isinstance(rows, int) or not 0 < rows < image.height:
        rows = image.height
    pixel_bits = max(samples * bits, 32 if tags.get(262) == 6 else 0)  # YCbCr is decoded as RGBA
    stored = max(tags.get(325, tags.get(279, (0,))))  # TileByteCounts, StripByteCounts
    return int(rows * image.width * pixel_bits) // 8 + stored


def check_resized(height: int, width: int, max_bytes: int) -> None:
    """Raise BadSample if resizing an image to height x width pixels would take more than `max_bytes` of memory."""
    _check_bytes(height, width, _STORED_RGB_BYTES * height * width, max_bytes, to="resize to")


def _check_bytes(
    height: int,
    width: int,
    num_bytes: float,
    max_bytes: int,
    option: str = "data.max_image_bytes",
    to: str = "decode",
) -> None:
    if num_bytes > max_bytes:
        raise BadSample(
            f"{width} x {height} pixels take {num_bytes / 2**20:.0f} MiB to {to}, more than the limit of "
            f"{max_bytes / 2**20:.0f} ({option})",
            "image_size",
        )


def _keeps_coefficients(data: bytes) -> bool:
    """Return True if libjpeg buffers all coefficients of a JPEG, two bytes each, as its scans hold partial pixels."""
    start, components = 2, 0
    while start + 10 < len(data) and data[start] == 0xFF:
        kind, size = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        if kind == 0xC2:  # progressive
            return True
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            components = data[start + 9]
        if kind == 0xDA:  # the first scan
            return data[start + 4] < components
        start += 1 if kind == 0xFF else 2 + size
    return False


DEEP_GREY = ("I;16", "I;16B", "I;16L", "I")  # Pillow's conversions clip such values at 255


def to_rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Convert an image to RGB: flatten transparency onto `background` and scale 16-bit grey to 8 bits. EXIF is ignored.

    Raises: BadSample if the pixels cannot be decoded (truncated or corrupt data).
    """
    try:
        if image.mode == "RGB" and "transparency" not in image.info:
            image.load()
            return image
        if image.mode in DEEP_GREY:
            grey = (np.asarray(image).clip(0, 65535).astype(np.uint32) + 128) // 257  # x / 257, rounded
            return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            flat = Image.new("RGBA", rgba.size, (*background, 255))
            return Image.alpha_composite(flat, rgba).convert("RGB")
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many exceptions, as in `open_image`
        raise _damaged("the image does not decode", error) from error


def _with_transparency(image: Image.Image) -> Image.Image:
    """Convert an image to RGBA. Raises: BadSample if the pixels cannot be decoded."""
    if image.mode in DEEP_GREY:
        return to_rgb(image).convert("RGBA")
    try:
        return image.convert("RGBA")
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many exceptions, as in `open_image`
        raise _damaged("the image does not decode", error) from error


def _jpeg_factor(crop: Crop, size: float) -> int:
    """Return the largest scale divisor of libjpeg, 1, 2, 4 or 8, at which the crop's sides stay at least `size`.

    Scales that are not powers of two lose quality.
    """
    return max(f for f in (1, 2, 4, 8) if f == 1 or min(crop.height, crop.width) >= f * size)


def _decode_jpeg(
    data: bytes, plan: Callable[[int, int], Crop], size: float, max_bytes: int, pixel_bytes: int = 3
) -> tuple[np.ndarray, Crop] | None:
    """Decode an RGB or grey JPEG at the scale that leaves at least `size` pixels on each side of the crop.

    Args:
        pixel_bytes: memory that a decoded pixel takes here and in later copies, for the limit of `max_bytes`.

    Returns: (pixels, uint8 [h, w, 3]; crop in those pixels), or None if the JPEG is left to Pillow.
    Raises: BadSample.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, subsampling = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError: an unknown subsampling
        return None
    if colorspace not in ("YCbCr", "Gray", "RGB"):
        return None
    check_size(height, width)
    crop = plan(height, width)
    factor = _jpeg_factor(crop, size)
    decoded_bytes = pixel_bytes * (height // factor + 1) * (width // factor + 1)
    if decoded_bytes + 6 * height * width > max_bytes and _keeps_coefficients(data):  # full size at any scale
        decoded_bytes += _COEFFICIENT_BYTES.get(subsampling, 6) * height * width
    _check_bytes(height, width, decoded_bytes, max_bytes)
    pixels = _undamaged(data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor))
    return None if pixels is None else (pixels, _scaled(crop, factor))


_COEFFICIENT_BYTES = {"Gray": 2, "420": 3, "411": 3, "422": 4, "440": 4, "444": 6}  # per pixel, 16 bits each

# libjpeg only warns about missing or overwritten data, and fills the pixels with grey or noise.
_DAMAGE = re.compile(
    r"premature end|bad huffman code|bad arithmetic code|instead of rst|(\d+) extraneous bytes before marker (0x\w\w)",
    re.IGNORECASE,
)
_FEW_BYTES = 16  # cameras add a few bytes of padding; missing data leave hundreds of extraneous bytes
_STRIP_PIXELS = 1 << 18
_LARGE_CROP_BYTES = 1 << 22
_END_OF_IMAGE = b"\xff\xd9"
_PROGRESSIVE = b"\xff\xc2"


def with_end_marker(data: bytes) -> bytes:
    """Return the bytes of an image, with an end marker appended to a non-progressive JPEG that lacks it."""
    if data[:2] == b"\xff\xd8" and data[-2:] != _END_OF_IMAGE and _PROGRESSIVE not in data:
        return data + _END_OF_IMAGE  # not for progressive JPEGs, whose missing scans would go unnoticed
    return data


def check_jpeg(image: Image.Image, data: bytes) -> None:
    """Raise BadSample if an opened image is a damaged JPEG. Pillow would decode it, as it ignores libjpeg's warnings.

    Args:
        image: opened image.
        data: encoded bytes of the image, as returned by `with_end_marker`.
    """
    if image.format in ("JPEG", "MPO"):
        _undamaged(data, "CMYK" if image.mode == "CMYK" else "RGB", min_factor=8)


def _undamaged(data: bytes, colorspace: str, **scale: float) -> np.ndarray | None:
    """Return the pixels of a JPEG, or None if simplejpeg rejects it for a harmless reason.

    Raises: BadSample if the pixels are damaged.
    """
    try:
        return simplejpeg.decode_jpeg(data, colorspace, **scale)
    except ValueError as error:  # simplejpeg is strict: libjpeg's first warning is an error
        damage = _DAMAGE.search(str(error))
        is_padding = damage is not None and damage[1] is not None and int(damage[1]) <= _FEW_BYTES
        if damage is not None and not is_padding:
            raise BadSample(f"the JPEG is damaged ({error})", "image_damaged") from error
        # Only the first warning is reported, so a harmless one may hide damage further on. A warning at the end marker
        # hides nothing. Otherwise, remove harmless oddities in front of the first scan and decode again.
        if is_padding and damage is not None and damage[2] == "0xd9":
            return None
        plain = _without_oddities(data)
        if plain != data:
            _undamaged(plain, colorspace, **scale)
        elif is_padding:
            raise BadSample(f"the JPEG is damaged ({error})", "image_damaged") from error
        return None


def _without_oddities(data: bytes) -> bytes:
    """Return a JPEG without the stray bytes, comments and application data in front of its first scan."""
    parts, start = [data[:2]], 2
    while start + 4 <= len(data):
        marker = data.find(b"\xff", start)
        if marker < 0:
            break
        while data[marker + 1 : marker + 2] == b"\xff":
            marker += 1
        if marker + 4 > len(data):
            break
        kind, size = data[marker + 1], int.from_bytes(data[marker + 2 : marker + 4], "big")
        if kind == 0xDA:  # the first scan
            return b"".join((*parts, data[marker:]))
        if kind == 0 or kind == 1 or 0xD0 <= kind <= 0xD9:  # a marker without a segment
            start = marker + 2
            continue
        start = marker + 2 + size
        if not (0xE0 <= kind <= 0xEF or kind == 0xFE):
            parts.append(data[marker:start])
    return data


def _scaled(crop: Crop, factor: int) -> Crop:
    """Return the crop in an image decoded at 1 / factor, each edge rounded to the nearest pixel.

    Its sides stay at least the `size` that `_jpeg_factor` was given.
    """
    top, left, bottom, right = (
        (2 * edge + factor) // (2 * factor)
        for edge in (crop.top, crop.left, crop.top + crop.height, crop.left + crop.width)
    )
    return Crop(top, left, bottom - top, right - left, crop.flip)


def decode_image(
    data: bytes,
    plan: Callable[[int, int], Crop],
    size: int,
    channels: int = 3,
    out: Tensor | None = None,
    max_bytes: int = MAX_IMAGE_BYTES,
) -> Tensor:
    """Decode, crop and resize one image.

    Args:
        data: encoded image.
        plan: function of the original's (height, width) that returns the crop.
        size: side length of the square result, in pixels.
        channels: 3 for RGB; 1 for grey (ITU-R 601, as Pillow's L); 4 for RGBA, which keeps transparency.
        out: tensor to write to, one image of `image_memory`; None allocates new memory.
        max_bytes: memory limit for decoding, in bytes. It is checked on the header, and counts pixels outside the crop.

    Returns: uint8 [channels, size, size].
    Raises: BadSample if the bytes are not a decodable image of an allowed format and size.
    """
    data = with_end_marker(data)
    decoded = _decode_jpeg(data, plan, size, max_bytes) if channels == 3 else None
    if decoded is None:
        image = _checked_image(data, channels, max_bytes)
        pixels, crop = pixels_of(image, channels), plan(image.height, image.width)
    else:
        pixels, crop = decoded
    return resized(pixels, crop, size, out)


def decode_whole(data: bytes, channels: int = 3, max_bytes: int = MAX_IMAGE_BYTES) -> Image.Image:
    """Decode an image at its full size, in the mode of its file; a grey JPEG in RGB.

    Args:
        data, channels, max_bytes: as in `decode_image`.

    Raises: BadSample if the bytes are not a decodable image of an allowed format and size.
    """
    data = with_end_marker(data)
    pixel_bytes = 3 + _STORED_RGB_BYTES
    decoded = _decode_jpeg(data, _whole, math.inf, max_bytes, pixel_bytes) if channels == 3 else None
    if decoded is not None:
        return Image.fromarray(decoded[0])
    image = _checked_image(data, channels, max_bytes)
    load(image)
    return image


def _whole(height: int, width: int) -> Crop:
    return Crop(0, 0, height, width)


def _checked_image(data: bytes, channels: int, max_bytes: int) -> Image.Image:
    """Open an image, check that decoding takes at most `max_bytes`, and that a JPEG is undamaged. Raises: BadSample."""
    image = open_image(data)
    if _is_animated(image):
        raise BadSample(f"an animated {image.format}; expected a single image", "image_animated")
    check_memory(image, data, channels, max_bytes)
    check_jpeg(image, data)
    return image


def load(image: Image.Image) -> None:
    """Decode the pixels of an opened image. Raises: BadSample if they cannot be decoded."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many exceptions, as in `open_image`
        raise _damaged("the image does not decode", error) from error


def pixels_of(image: Image.Image, channels: int = 3) -> np.ndarray:
    """Return the pixels of an image, uint8 [h, w, channels]; see `decode_image`. Raises: BadSample.

    Pixels are converted in strips, since Pillow's conversions would hold several copies of a large image at once.
    """
    load(image)
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    height = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        bottom = min(top + height, image.height)
        strip = image if bottom - top == image.height else image.crop((0, top, image.width, bottom))
        if channels == 4:
            strip = _with_transparency(strip)
        else:
            strip = to_rgb(strip) if channels == 3 else to_rgb(strip).convert("L")
        pixels[top:bottom] = np.asarray(strip).reshape(bottom - top, image.width, channels)
    return pixels


def image_memory(n: int, channels: int, size: int) -> Tensor:
    """Allocate uninitialised images, uint8 [n, channels, size, size]; a worker allocates memory shared with the trainer.

    The memory format is channels last, like the decoders' output: any other layout would cost a transpose per image.
    """
    shape = (n, size, size, channels)
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    shared = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(shared, 0, shape).permute(0, 3, 1, 2)  # type: ignore[call-overload]


def _cropped(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    """Return the cropped pixels. A large crop is moved to the start of `pixels`, since the resize copies strided rows."""
    box = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if crop.width == pixels.shape[1] or box.size < _LARGE_CROP_BYTES:
        return box
    packed, row_bytes = pixels.reshape(-1), crop.width * pixels.shape[2]
    for row in range(crop.height):  # no source row precedes its target, so no pending row is overwritten
        packed[row * row_bytes : (row + 1) * row_bytes] = box[row].reshape(-1)
    return packed[: crop.height * row_bytes].reshape(box.shape)


def resized(pixels: np.ndarray, crop: Crop, size: int, out: Tensor | None = None) -> Tensor:
    """Crop pixels and resize them to a square: bicubic, antialiased, in integer arithmetic.

    Args:
        pixels: uint8 [h, w, c]; may be overwritten if the crop is large.
        crop: crop to take.
        size: side length of the result, in pixels.
        out: tensor to write to, one image of `image_memory`; None allocates new memory.

    Returns: uint8 [c, size, size].
    """
    box = torch.from_numpy(_cropped(pixels, crop))
    out = image_memory(1, pixels.shape[2], size)[0] if out is None else out
    # The resize has a faster path for channels last, the layout of decoded pixels and of batches.
    if box.shape[:2] == (size, size):
        out.copy_(box.permute(2, 0, 1))
    else:
        # F.interpolate has no `out`, and would need another copy of each image into the batch.
        torch.ops.aten._upsample_bicubic2d_aa.out(
            box.permute(2, 0, 1)[None], (size, size), align_corners=False, out=out[None]
        )
    return out.copy_(out.flip(-1)) if crop.flip else out
