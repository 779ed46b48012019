"""Bytes -> uint8 image and caption: what is decoded, its limits, and what is refused.

JPEG goes through simplejpeg, decoded at 1/2, 1/4 or 1/8 where the crop stays larger than the target; all
else goes through Pillow. A JPEG of which libjpeg says that data are missing or overwritten is refused; an overwritten
stretch that decodes by chance as so many blocks cannot be told, nor can damage to a WebP of whole length: these formats
have no checksums. One uint8 resize (bicubic, antialiased) serves both, so the path never shows.
"""

import io
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 100_000_000
MAX_IMAGE_BYTES = 1 << 29
WHITE = (255, 255, 255)

# Pillow's about an image: limits are checked here, damage is looked for here, the rest is harmless.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadSample(ValueError):
    """A sample's bytes cannot be used; the message is the reason, kept in `quarantine.jsonl`."""


@dataclass(frozen=True)
class Crop:
    """A box in the pixels of the original image, and whether it is mirrored."""

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
    except UnidentifiedImageError as error:  # its own message holds an address in memory
        raise BadSample(f"no readable image (none of {', '.join(FORMATS)})") from error
    except MemoryError:
        raise
    except Exception as error:  # nothing is read here but these bytes, and Pillow says what it dislikes in many ways
        raise BadSample(f"no readable image ({type(error).__name__}: {error})".split("\n")[0]) from error
    check_size(image.height, image.width)
    return image


def check_size(height: int, width: int) -> None:
    """Raises: BadSample if an image of this many pixels is larger than `MAX_PIXELS`."""
    if height * width > MAX_PIXELS:
        raise BadSample(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")


_STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # Pillow's, a pixel; of all others 4
_WEBP_BYTES = 9  # what libwebp holds besides, a pixel


def check_memory(
    image: Image.Image, data: bytes, channels: int, max_bytes: int, option: str = "data.max_image_bytes"
) -> None:
    """Raises: BadSample, naming the option that sets the limit, if an image would take more than `max_bytes` to decode.

    Args:
        image: opened, not decoded.
        data: its bytes; empty where they are not known.
        channels: of the result, as in `decode_image`.
    """
    stored = _STORED_BYTES.get(image.mode, 4)
    each = stored + (5 if channels == 1 else channels)  # torch resizes one channel as four
    if image.format == "WEBP":
        each += _WEBP_BYTES
    elif image.format in ("JPEG", "MPO") and image.height * image.width * (each + 8) > max_bytes:
        each += 2 * len(image.getbands()) * ("progressive" in image.info or _keeps_coefficients(data))
    num_bytes = image.height * image.width * each
    if image.format == "TIFF":
        num_bytes = max(num_bytes, image.height * image.width * stored + _strip_bytes(image))
    _check_bytes(image.height, image.width, num_bytes, max_bytes, option)


def _strip_bytes(image: Image.Image) -> int:
    """What libtiff holds while it decodes a strip or tile of a compressed TIFF: its pixels and its bytes in the file."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(259, 1) == 1:  # Compression: none, which Pillow reads itself
        return 0
    samples, bits = tags.get(277, len(image.getbands())), max(tags.get(258, (1,)))
    rows = tags.get(323, tags.get(278))  # TileLength, RowsPerStrip
    if not isinstance(rows, int) or not 0 < rows < image.height:
        rows = image.height
    pixel_bits = max(samples * bits, 32 if tags.get(262) == 6 else 0)  # YCbCr is decoded as RGBA
    stored = max(tags.get(325, tags.get(279, (0,))))  # TileByteCounts, StripByteCounts
    return int(rows * image.width * pixel_bits) // 8 + stored


def _check_bytes(
    height: int, width: int, num_bytes: float, max_bytes: int, option: str = "data.max_image_bytes"
) -> None:
    if num_bytes > max_bytes:
        raise BadSample(
            f"{width} x {height} pixels take {num_bytes / 2**20:.0f} MiB to decode, more than the limit of "
            f"{max_bytes / 2**20:.0f} ({option})"
        )


def _keeps_coefficients(data: bytes) -> bool:
    """Whether libjpeg holds all coefficients of a JPEG, two bytes each, since its scans do not hold whole pixels."""
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


_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I")  # Pillow's conversions cut such values off at 255


def to_rgb(image: Image.Image, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """An RGB image: transparency flattened onto `background`, 16-bit grey scaled to 8; EXIF is not looked at.

    Raises: BadSample if the pixels cannot be decoded (truncated or corrupt data).
    """
    try:
        if image.mode == "RGB" and "transparency" not in image.info:
            image.load()
            return image
        if image.mode in _DEEP_GREY:
            grey = (np.asarray(image).clip(0, 65535).astype(np.uint32) + 128) // 257  # x / 257, rounded
            return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            flat = Image.new("RGBA", rgba.size, (*background, 255))
            return Image.alpha_composite(flat, rgba).convert("RGB")
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BadSample(f"the image does not decode ({type(error).__name__}: {error})".split("\n")[0]) from error


def _with_transparency(image: Image.Image) -> Image.Image:
    """An RGBA image. Raises: BadSample if the pixels cannot be decoded."""
    if image.mode in _DEEP_GREY:
        return to_rgb(image).convert("RGBA")
    try:
        return image.convert("RGBA")
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BadSample(f"the image does not decode ({type(error).__name__}: {error})".split("\n")[0]) from error


def _jpeg_factor(crop: Crop, size: int) -> int:
    """The power of two that libjpeg can divide by while the crop stays at least `size` (odd scales lose quality)."""
    return max(f for f in (1, 2, 4, 8) if f == 1 or min(crop.height, crop.width) >= f * size)


def _decode_jpeg(
    data: bytes, plan: Callable[[int, int], Crop], size: int, max_bytes: int
) -> tuple[np.ndarray, Crop] | None:
    """(pixels uint8 [h, w, 3], the crop in those pixels), or None where Pillow has to look. Raises: BadSample."""
    try:
        height, width, colorspace, subsampling = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError: a subsampling that it has no name for
        return None
    if colorspace not in ("YCbCr", "Gray", "RGB"):
        return None
    check_size(height, width)
    crop = plan(height, width)
    factor = _jpeg_factor(crop, size)
    decoded_bytes = 3 * (height // factor + 1) * (width // factor + 1)
    if decoded_bytes + 6 * height * width > max_bytes and _keeps_coefficients(data):  # of the whole image, at any scale
        decoded_bytes += _COEFFICIENT_BYTES.get(subsampling, 6) * height * width
    _check_bytes(height, width, decoded_bytes, max_bytes)
    pixels = _undamaged(data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor))
    return None if pixels is None else (pixels, _scaled(crop, factor))


_COEFFICIENT_BYTES = {"Gray": 2, "420": 3, "411": 3, "422": 4, "440": 4, "444": 6}  # a pixel, in 16 bits each

# libjpeg warns and goes on where data are missing or overwritten: what it makes of them is grey, or noise.
_DAMAGE = re.compile(
    r"premature end|bad huffman code|bad arithmetic code|instead of rst|(\d+) extraneous bytes before marker (0x\w\w)",
    re.IGNORECASE,
)
_FEW_BYTES = 16  # cameras pad with some bytes; behind a hole hundreds are left over
_STRIP_PIXELS = 1 << 18
_LARGE_CROP_BYTES = 1 << 22
_END_OF_IMAGE = b"\xff\xd9"
_PROGRESSIVE = b"\xff\xc2"


def with_end_marker(data: bytes) -> bytes:
    """The bytes of an image; a JPEG that lacks only its end marker gets one, for its image is whole."""
    if data[:2] == b"\xff\xd8" and data[-2:] != _END_OF_IMAGE and _PROGRESSIVE not in data:
        return data + _END_OF_IMAGE  # of a progressive one, scans may be missing unseen
    return data


def check_jpeg(image: Image.Image, data: bytes) -> None:
    """Raises: BadSample if an opened image is a damaged JPEG, which Pillow would decode: it ignores libjpeg's warnings.

    Args:
        data: the image's bytes, as of `with_end_marker`.
    """
    if image.format in ("JPEG", "MPO"):
        _undamaged(data, "CMYK" if image.mode == "CMYK" else "RGB", min_factor=8)


def _undamaged(data: bytes, colorspace: str, **scale: float) -> np.ndarray | None:
    """The pixels of a JPEG, or None where simplejpeg refuses it for what is no damage to them. Raises: BadSample."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace, **scale)
    except ValueError as error:  # strict: libjpeg's first warning, too, is an error
        damage = _DAMAGE.search(str(error))
        is_padding = damage is not None and damage[1] is not None and int(damage[1]) <= _FEW_BYTES
        if damage is not None and not is_padding:
            raise BadSample(f"the JPEG is damaged ({error})") from error
        # The first warning is the only one that is told, and what it is of may hide damage further on. Behind the last
        # scan nothing is further on; in front of the first one what is no damage can be left out.
        if is_padding and damage is not None and damage[2] == "0xd9":
            return None
        plain = _without_oddities(data)
        if plain != data:
            _undamaged(plain, colorspace, **scale)
        elif is_padding:
            raise BadSample(f"the JPEG is damaged ({error})") from error
        return None


def _without_oddities(data: bytes) -> bytes:
    """A JPEG without what stands between the segments in front of its first scan, comments and application data."""
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
        if kind == 0 or kind == 1 or 0xD0 <= kind <= 0xD9:  # no segment
            start = marker + 2
            continue
        start = marker + 2 + size
        if not (0xE0 <= kind <= 0xEF or kind == 0xFE):
            parts.append(data[marker:start])
    return data


def _scaled(crop: Crop, factor: int) -> Crop:
    """The crop in an image decoded at 1 / factor, each edge at the nearest pixel; it keeps `size` or more of them."""
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
        data: the encoded image.
        plan: (height, width) of the original -> the crop to take of it.
        size: the side of the square result, in pixels.
        channels: 3 for RGB; 1 for grey (ITU-R 601, as Pillow's L); 4 for RGBA, whose transparency stays.
        out: where the result is written, one of `image_memory`'s; None: new memory.
        max_bytes: the most memory that decoding may take, by the image's header; pixels beyond the crop count, too.

    Returns: uint8 [channels, size, size].
    Raises: BadSample if the bytes are no decodable image of an allowed format and size.
    """
    data = with_end_marker(data)
    is_jpeg = data[:2] == b"\xff\xd8"
    decoded = _decode_jpeg(data, plan, size, max_bytes) if is_jpeg and channels == 3 else None
    if decoded is None:
        image = open_image(data)
        check_memory(image, data, channels, max_bytes)
        check_jpeg(image, data)
        pixels, crop = pixels_of(image, channels), plan(image.height, image.width)
    else:
        pixels, crop = decoded
    return resized(pixels, crop, size, out)


def pixels_of(image: Image.Image, channels: int = 3) -> np.ndarray:
    """The pixels of an image, uint8 [h, w, channels]; see `decode_image`. Raises: BadSample.

    They are converted strip by strip: of a large image Pillow's conversions would hold several copies at once.
    """
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BadSample(f"the image does not decode ({type(error).__name__}: {error})".split("\n")[0]) from error
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
    """Uninitialised images, uint8 [n, channels, size, size]; in a worker in memory that it shares with the trainer.

    They lie channels last, as decoders leave images: another layout would cost a transposition of every one.
    """
    shape = (n, size, size, channels)
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    shared = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(shared, 0, shape).permute(0, 3, 1, 2)  # type: ignore[call-overload]


def _cropped(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    """The crop; if it is large, moved to the beginning of `pixels`: the resize would copy rows that lie apart."""
    box = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if crop.width == pixels.shape[1] or box.size < _LARGE_CROP_BYTES:
        return box
    packed, row_bytes = pixels.reshape(-1), crop.width * pixels.shape[2]
    for row in range(crop.height):  # each lies behind its place, and before the next one
        packed[row * row_bytes : (row + 1) * row_bytes] = box[row].reshape(-1)
    return packed[: crop.height * row_bytes].reshape(box.shape)


def resized(pixels: np.ndarray, crop: Crop, size: int, out: Tensor | None = None) -> Tensor:
    """The crop of pixels uint8 [h, w, c] as a square, uint8 [c, size, size]: bicubic, antialiased, in whole numbers.

    It is written to `out`, one of `image_memory`'s, or to new memory. Large pixels may be overwritten.
    """
    box = torch.from_numpy(_cropped(pixels, crop))
    out = image_memory(1, pixels.shape[2], size)[0] if out is None else out
    # The resize has a faster path for channels last, which is how pixels are decoded and batches lie.
    if box.shape[:2] == (size, size):
        out.copy_(box.permute(2, 0, 1))
    else:
        # F.interpolate cannot write into memory that is there: images would be copied once more into the batch.
        torch.ops.aten._upsample_bicubic2d_aa.out(
            box.permute(2, 0, 1)[None], (size, size), align_corners=False, out=out[None]
        )
    return out.copy_(out.flip(-1)) if crop.flip else out


def read_json_field(data: bytes, path: str) -> Any:
    """The value under a dotted path of a JSON member.

    Raises: BadSample if the bytes are no JSON object or the path is not in it.
    """
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise BadSample("its json member does not parse (nested too deeply)") from error
    except ValueError as error:
        raise BadSample(f"its json member does not parse ({error})") from error
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise BadSample(f"its json has no field {path!r} (it has: {_fields(value)})")
        value = value[part]
    return value


def _fields(value: Any) -> str:
    """The fields of what JSON gave, some of them; its type if it has none."""
    if not isinstance(value, dict):
        return type(value).__name__
    names = [name if len(name) <= 40 and name.isprintable() else ascii(name[:40]) for name in sorted(value)[:10]]
    return ", ".join(names) + (f" and {len(value) - 10} more" if len(value) > 10 else "")


def _without_lone_surrogates(text: str) -> str:
    """The text, U+FFFD in place of each half of a pair that JSON escaped alone: no encoding has such halves."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Zs", "Zl", "Zp", "Mn", "Me"))  # Unicode's categories
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and a symbol that show nothing


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(character) not in _INVISIBLE and character not in _BLANK for character in text)


def read_label(data: bytes, field: str) -> str:
    """A label as text: the content of a `cls` member, or the value under `json.<dotted path>`.

    Raises: BadSample if there is none.
    """
    value = data.decode(errors="replace")
    if field.startswith("json."):
        value = _without_lone_surrogates(str(read_json_field(data, field.removeprefix("json."))))
    if not value.strip():
        raise BadSample(f"its label {field!r} is empty")
    return value.strip()


def check_caption_field(field: str, key: str) -> None:
    """Raises: ValueError for `json` without a field in it, whose text would be taken for a caption."""
    if field == "json" or not re.fullmatch(r"\w+|json(\.[^.]+)+", field):
        raise ValueError(f"{key} is {field!r}; expected a member such as txt, or a field of json: json.caption")


def decode_captions(data: bytes, field: str) -> list[str]:
    """The captions of one sample: the `txt` member's text, or a string or list of strings in the `json` member.

    Args:
        data: the member's bytes.
        field: `txt`, or `json.<dotted path>`.

    Raises: BadSample if there is no caption with a visible character.
    """
    if field.startswith("json."):
        value = read_json_field(data, field.removeprefix("json."))
    else:
        try:
            value = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample(f"its {field} member is not UTF-8 ({error.reason} at byte {error.start})") from error
    captions = value if isinstance(value, list) else [value]
    captions = [caption.strip() for caption in captions if isinstance(caption, str) and _is_visible(caption)]
    if not captions:
        raise BadSample(f"its caption field {field!r} is empty (it has no visible character)")
    return [_without_lone_surrogates(caption) for caption in captions]
