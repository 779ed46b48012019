"""Bytes to images, against Pillow; and every refusal is a BadSample, never another error."""

import io
import math
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmpretrain.data import decode
from mmpretrain.data.decode import MAX_PIXELS, BadSample, Crop, decode_image, image_memory, open_image, to_rgb
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.transforms import CenterCrop, RandomResizedCrop
from mmpretrain.seeds import draw
from tests.tars import encode, smooth_pixels

Plan = Callable[[int, int], Crop]


def always(crop: Crop) -> Plan:
    return lambda height, width: crop


def whole(height: int, width: int) -> Crop:
    return Crop(0, 0, height, width)


def snapped(crop: Crop, factor: int) -> Crop:
    """The crop in units of `factor` pixels, each edge at the nearest one."""
    top, left, bottom, right = (
        math.floor(edge / factor + 0.5)
        for edge in (crop.top, crop.left, crop.top + crop.height, crop.left + crop.width)
    )
    return Crop(top, left, bottom - top, right - left)


def pillow_resize(image: Image.Image, crop: Crop, size: int) -> Tensor:
    """The crop of an RGB image, resized by Pillow: int16 [3, size, size]."""
    box = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    pixels = np.array(box.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def difference(a: Tensor, b: Tensor) -> Tensor:
    return (a.to(torch.int16) - b.to(torch.int16)).abs().float()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


# ---------------------------------------------------------------- crop and resize


@pytest.mark.parametrize("size", [8, 33, 64])
@pytest.mark.parametrize(
    "crop", [Crop(0, 0, 90, 120), Crop(3, 5, 61, 40), Crop(80, 100, 10, 20), Crop(10, 20, 64, 64)], ids=str
)
def test_crop_and_resize_are_pillows(crop: Crop, size: int) -> None:
    """Up, down, and unchanged in both directions; where nothing saturates, for the two clip at different moments."""
    pixels = np.random.default_rng(0).integers(70, 186, (90, 120, 3), dtype=np.uint8)
    image = decode_image(encode(pixels, "PNG"), always(crop), size)
    assert image.dtype == torch.uint8 and image.shape == (3, size, size)
    assert difference(image, pillow_resize(Image.fromarray(pixels), crop, size)).max() <= 2


def test_a_crop_of_the_right_size_is_taken_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = decode_image(encode(pixels, "PNG"), always(Crop(4, 7, 16, 16)), 16)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels[4:20, 7:23])


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_mirrored_crop_is_the_mirror_image(format: str) -> None:
    data = encode(smooth_pixels(40, 50), format)
    plain, mirrored = (decode_image(data, always(Crop(2, 3, 30, 20, flip)), 16) for flip in (False, True))
    assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)


def test_the_plan_sees_the_originals_size() -> None:
    sizes = []

    def plan(height: int, width: int) -> Crop:
        sizes.append((height, width))
        return Crop(0, 0, height, width)

    for format in ("JPEG", "PNG"):
        decode_image(encode(smooth_pixels(90, 130), format), plan, 8)
    assert sizes == [(90, 130), (90, 130)]


# ---------------------------------------------------------------- scaled JPEG decoding


@pytest.mark.parametrize(
    ("crop", "factor"),
    [
        (Crop(0, 0, 31, 200), 1),
        (Crop(0, 0, 200, 31), 1),
        (Crop(0, 0, 32, 32), 2),
        (Crop(10, 20, 63, 150), 2),
        (Crop(4, 8, 64, 64), 4),
        (Crop(0, 0, 127, 160), 4),
        (Crop(16, 8, 128, 128), 8),
        (Crop(0, 0, 200, 256), 8),
    ],
    ids=str,
)
def test_jpeg_is_decoded_at_the_smallest_scale_that_the_crop_allows(crop: Crop, factor: int) -> None:
    """Of libjpeg's scales, as Pillow's draft mode decodes them, the expected one is by far the closest to ours.

    The target is 16 pixels. Noise makes scales differ: libjpeg's are box-like, the resize is bicubic.
    """
    noise = np.random.default_rng(0).integers(0, 256, (200, 256, 3), dtype=np.uint8)
    data = encode(noise, "JPEG", quality=95, subsampling=0)
    ours = decode_image(data, always(crop), 16)
    distances = {}
    for scale in (1, 2, 4, 8):
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (256 // scale, 200 // scale))
        assert image.size == (256 // scale, 200 // scale)
        distances[scale] = float(difference(ours, pillow_resize(image, snapped(crop, scale), 16)).mean())
    assert distances[factor] < 0.2
    assert all(distance > 1 for scale, distance in distances.items() if scale != factor)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("crop", [Crop(3, 5, 61, 40), Crop(3, 5, 61, 40, flip=True), Crop(10, 20, 32, 32)], ids=str)
def test_an_image_is_written_into_a_batch(crop: Crop, channels: int) -> None:
    """What torch makes of a copy of the crop stands in its row, and its neighbours stay as they are."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, channels), dtype=np.uint8)
    batch = image_memory(3, channels, 32).fill_(7)
    written = decode_image(encode(pixels.squeeze(), "PNG"), always(crop), 32, channels, batch[1])
    assert written.data_ptr() == batch[1].data_ptr()
    box = torch.tensor(pixels)[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    expected = F.interpolate(box.permute(2, 0, 1)[None].contiguous(), (32, 32), mode="bicubic", antialias=True)[0]
    assert torch.equal(batch[1], expected.flip(-1) if crop.flip else expected)
    assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize(("height", "width"), [(200, 256), (201, 255), (403, 397)])
def test_scaled_decoding_looks_like_the_whole_image_resized(height: int, width: int) -> None:
    """Also at odd sizes and offsets: the box moves to the nearest of the scaled pixels, and nothing else changes."""
    image = Image.fromarray(smooth_pixels(height, width))
    data = encode(image, quality=95)
    transform = RandomResizedCrop((0.2, 1.0))
    for i in range(30):
        crop = transform(height, width, draw(0, i))
        factor = max(f for f in (1, 2, 4, 8) if min(crop.height, crop.width) >= 24 * f or f == 1)
        edges = snapped(crop, factor)
        moved = Crop(edges.top * factor, edges.left * factor, edges.height * factor, edges.width * factor)
        moved = Crop(moved.top, moved.left, min(moved.height, height - moved.top), min(moved.width, width - moved.left))
        close = difference(decode_image(data, always(crop), 24), pillow_resize(image, moved, 24))
        assert close.mean() < 1 and close.max() < 6, crop


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (9, 17), (16, 16), (17, 129)])
@pytest.mark.parametrize("size", [1, 2, 16])
def test_any_size_of_jpeg_fits_any_target(height: int, width: int, size: int) -> None:
    data = encode(smooth_pixels(height, width))
    for plan in (whole, CenterCrop()):
        assert decode_image(data, plan, size).shape == (3, size, size)


def test_a_crop_of_just_the_factor_times_the_target_is_never_upsampled() -> None:
    """At any offset it is exactly the target's size in scaled pixels, and so a slice of libjpeg's scaled image."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 67, 3), dtype=np.uint8)
    data = encode(noise, quality=95, subsampling=0)
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (67 // 2, 61 // 2))
    scaled = np.asarray(image)
    assert scaled.shape == (31, 34, 3)
    for offset in range(61 - 32 + 1):
        decoded = decode_image(data, always(Crop(offset, 2 * offset % 35, 32, 32)), 16)
        top, left = math.floor(offset / 2 + 0.5), math.floor(2 * offset % 35 / 2 + 0.5)
        assert difference(decoded, torch.tensor(scaled[top : top + 16, left : left + 16]).permute(2, 0, 1)).max() <= 2


# ---------------------------------------------------------------- kinds of images


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2}, {"optimize": True}], ids=str
)
def test_jpeg_variants_decode(options: dict[str, object]) -> None:
    image = Image.fromarray(smooth_pixels(48, 64))
    decoded = decode_image(encode(image, quality=95, **options), whole, 48)
    assert difference(decoded, pillow_resize(image, whole(48, 64), 48)).mean() < 3


def test_grey_jpeg_has_three_equal_channels() -> None:
    grey = Image.fromarray(smooth_pixels(48, 64)).convert("L")
    decoded = decode_image(encode(grey, quality=95), whole, 32)
    assert torch.equal(decoded[0], decoded[1]) and torch.equal(decoded[0], decoded[2])
    assert difference(decoded, pillow_resize(grey.convert("RGB"), whole(48, 64), 32)).mean() < 1


def test_cmyk_jpeg_is_pillows() -> None:
    data = encode(Image.fromarray(smooth_pixels(48, 64)).convert("CMYK"), quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    decoded = decode_image(data, whole, 32)
    assert difference(decoded, pillow_resize(opened(data), whole(48, 64), 32)).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_are_pillows(format: str) -> None:
    data = encode(smooth_pixels(48, 64), format)
    decoded = decode_image(data, whole, 32)
    assert difference(decoded, pillow_resize(opened(data), whole(48, 64), 32)).max() <= 1


def test_palette_png() -> None:
    palette = Image.fromarray(smooth_pixels(48, 64)).quantize(16)
    decoded = decode_image(encode(palette, "PNG"), whole, 32)
    assert difference(decoded, pillow_resize(palette.convert("RGB"), whole(48, 64), 32)).max() <= 1


def test_transparency_is_flattened_onto_white() -> None:
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[:, :4] = (200, 100, 0, 255)
    rgba[:4, 4:] = (200, 100, 0, 0)
    rgba[4:, 4:] = (200, 100, 0, 128)
    decoded = decode_image(encode(Image.fromarray(rgba), "PNG"), whole, 8)
    assert decoded[:, 0, 0].tolist() == [200, 100, 0]
    assert decoded[:, 0, 7].tolist() == [255, 255, 255]
    half = [channel + (255 - channel) * 127 / 255 for channel in (200, 100, 0)]
    assert decoded[:, 7, 7].tolist() == pytest.approx(half, abs=1)


def test_grey_and_palette_transparency_are_flattened_too() -> None:
    grey = Image.merge("LA", [Image.new("L", (8, 8), 50), Image.new("L", (8, 8), 0)])
    assert (decode_image(encode(grey, "PNG"), whole, 8) == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] + [0, 0, 0] * 255)
    assert decode_image(encode(palette, "PNG"), whole, 8)[:, 0, 0].tolist() == [10, 20, 30]
    assert (decode_image(encode(palette, "PNG", transparency=0), whole, 8) == 255).all()


def test_another_background_can_be_asked_for() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert to_rgb(clear, background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    """Pillow's own conversion would show all that is above 255 as white."""
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    decoded = decode_image(encode(Image.fromarray(values), "PNG"), whole, 8)
    expected = np.rint(values / 257)  # 65535 is 255 * 257
    assert np.array_equal(decoded.numpy(), np.broadcast_to(expected, (3, 8, 8)))
    transparent = decode_image(encode(Image.fromarray(values), "PNG"), whole, 8, 4)
    assert torch.equal(transparent[:3], decoded) and transparent[3].unique().tolist() == [255]


# ---------------------------------------------------------------- refusals


def png_header(height: int, width: int) -> bytes:
    """A PNG that claims to be this large and holds nothing."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    empty = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (ihdr, empty)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_header(height: int, width: int) -> bytes:
    """A JPEG whose frame header claims to be this large."""
    data = bytearray(encode(smooth_pixels(16, 16)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png_header(10_001, 10_000), f"10000 x 10001 pixels, more than the limit of {MAX_PIXELS}"),
        (jpeg_header(10_001, 10_000), f"10000 x 10001 pixels, more than the limit of {MAX_PIXELS}"),
        (jpeg_header(65_000, 65_000), "65000 x 65000 pixels"),
        (png_header(2**31 - 1, 2**31 - 1), "DecompressionBombError"),
    ],
    ids=["png", "jpeg", "huge jpeg", "huge png"],
)
def test_a_pixel_bomb_is_refused_at_its_header(data: bytes, reason: str) -> None:
    planned = []
    with pytest.raises(BadSample, match=reason):
        decode_image(data, lambda height, width: planned.append((height, width)) or whole(height, width), 16)
    assert planned == []


def test_the_limit_itself_is_allowed() -> None:
    with Image.open(io.BytesIO(png_header(8, 8))) as image:
        assert image.size == (8, 8)  # the header that the other tests write is a valid one
    with pytest.warns(Image.DecompressionBombWarning):
        assert open_image(png_header(10_000, 10_000)).size == (10_000, 10_000)


MEASURE = """
import sys
from mmpretrain.data import decode

def most(height, width):
    return decode.Crop(0, 0, height, width - 1)  # its rows lie apart

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

limits = []
check = decode._check_bytes
decode._check_bytes = lambda *arguments: limits.append(arguments[2]) or check(*arguments)
for argument in sys.argv[1:]:
    path, channels = argument.split(",")
    data = open(path, "rb").read()
    try:
        decode.decode_image(data, most, 16, int(channels), max_bytes=0)
    except decode.BadSample:
        expected = limits[-1]
    for _ in range(2):  # the first one loads the decoder
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        decode.decode_image(data, most, 16, int(channels))
        taken = peak() - before
    print(taken, expected)
"""


def deep_tiff(side: int) -> bytes:
    """A square of 16-bit RGB in one compressed strip."""
    strip = zlib.compress(bytes(6 * side * side), 1)
    bits = struct.pack("<HHH", 16, 16, 16)
    values = [
        (256, side), (257, side), (258, 122), (259, 8), (262, 2), (273, 128), (277, 3), (278, side), (279, len(strip)),
    ]  # fmt: skip
    entries = b"".join(
        struct.pack("<HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, v) for tag, v in values
    )
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + bits + strip


def test_decoding_takes_no_more_memory_than_the_header_lets_expect(tmp_path: Path) -> None:
    """In a process of its own. What a strip's conversion takes comes on top, and is the same for every size."""
    side = 2000
    grey = (np.add.outer(np.arange(side), np.arange(side)) // 9).astype(np.int32)
    colour = Image.fromarray(np.stack([grey % 256, grey // 2 % 256, 255 - grey % 256], -1).astype(np.uint8))
    deep = Image.fromarray((grey * 10).astype(np.uint16))
    images = [
        (colour, "PNG", {}), (colour.convert("P"), "PNG", {}), (colour.convert("P"), "PNG", {"transparency": 0}),
        (colour.convert("RGBA"), "PNG", {}), (colour.convert("LA"), "PNG", {}), (deep, "PNG", {}),
        (colour.convert("P"), "GIF", {}), (colour, "TIFF", {}), (colour.convert("CMYK"), "JPEG", {}),
        (colour, "WEBP", {"method": 0}), (colour, "JPEG", {}), (colour, "JPEG", {"progressive": True}),
        (colour, "JPEG", {"progressive": True, "subsampling": 0}),
    ]  # fmt: skip
    arguments = []
    for number, (image, format, options) in enumerate(images):
        path = tmp_path / str(number)
        path.write_bytes(encode(image, format, **({"compress_level": 1} if format == "PNG" else {}), **options))
        arguments += [f"{path},{channels}" for channels in ((3, 1, 4) if number == 0 else (3,))]
    (tmp_path / "deep.tiff").write_bytes(deep_tiff(side))
    arguments.append(f"{tmp_path / 'deep.tiff'},3")
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    for argument, line in zip(arguments, measured.stdout.splitlines(), strict=True):
        taken, expected = map(float, line.split())
        assert taken < expected + (6 << 20), f"{argument}: {taken / side**2}, {expected / side**2} bytes a pixel"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "mebibytes"),
    [
        (png_header(9_900, 10_000), "661 MiB"),  # RGB: 4 bytes in Pillow, 3 as the result
        (jpeg_header(9_900, 10_000), None),
        (jpeg_header(9_900, 10_000).replace(b"\xff\xc0", b"\xff\xc2"), "567 MiB"),
    ],
    ids=["png", "jpeg", "progressive jpeg"],
)
def test_an_image_that_takes_too_much_memory_is_refused_at_its_header(data: bytes, mebibytes: str | None) -> None:
    """A progressive JPEG keeps the coefficients of the whole image, at any scale; any other one no more than pixels."""
    reason = f"10000 x 9900 pixels take {mebibytes} to decode, more than the limit of 512 .data.max_image_bytes"
    with pytest.raises(BadSample, match=reason if mebibytes else "damaged|does not decode"):
        decode_image(data, whole, 8000)


def test_an_opened_image_that_takes_too_much_memory_is_refused() -> None:
    image = Image.open(io.BytesIO(encode(smooth_pixels(100, 100), "PNG")))
    assert Preprocess(16, max_image_bytes=70_000)(image).shape == (3, 16, 16)
    with pytest.raises(BadSample, match="100 x 100 pixels take"):
        Preprocess(16, max_image_bytes=69_999)(image)
    progressive = Image.open(io.BytesIO(encode(smooth_pixels(100, 100), "JPEG", progressive=True)))
    with pytest.raises(BadSample, match="100 x 100 pixels take"):
        Preprocess(16, max_image_bytes=70_000)(progressive)


@pytest.mark.parametrize("damage", ["hole", "cut"])
@pytest.mark.parametrize("oddity", ["bytes before a segment", "JFIF revision", "both"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_damage_behind_what_is_odd_but_harmless_is_refused(damage: str, oddity: str, options: dict[str, Any]) -> None:
    """libjpeg's first warning is of the oddity."""
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC), quality=90, **options)
    if oddity != "JFIF revision":
        data = data.replace(b"\xff\xdb", b"\0\1\xff\xdb", 1)
    if oddity != "bytes before a segment":
        data = data.replace(b"JFIF\0\1", b"JFIF\0\2")
    assert decode_image(data, whole, 64).shape == (3, 64, 64)
    middle = len(data) // 2
    damaged = data[:middle] + bytes(len(data) // 10) + data[middle + len(data) // 10 :]
    with pytest.raises(BadSample, match="the JPEG is damaged"):
        decode_image(damaged if damage == "hole" else data[:middle] + b"\xff\xd9", whole, 64)


def test_a_jpeg_without_a_scan_is_left_as_it_is() -> None:
    for data in (b"\xff\xd8" + bytes(20), b"\xff\xd8\xff\xe0\0\x04ab" + bytes(9), b"\xff\xd8" + b"\xff" * 9):
        assert decode._without_oddities(data) == data


def test_the_limit_of_memory_can_be_set() -> None:
    data = encode(smooth_pixels(100, 100), "PNG")
    assert decode_image(data, whole, 16, max_bytes=70_000).shape == (3, 16, 16)
    with pytest.raises(BadSample, match="100 x 100 pixels take 0 MiB to decode"):
        decode_image(data, whole, 16, max_bytes=69_999)
    with pytest.raises(BadSample, match="100 x 100 pixels take"):
        Preprocess(16, max_image_bytes=69_999)(data)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("RGB", {"transparency": (3, 4, 5)}), ("RGBA", {}), ("LA", {}), ("P", {}), ("P", {"transparency": 3}),
     ("L", {}), ("L", {"transparency": 9}), ("1", {}), ("I;16", {})],
)  # fmt: skip
def test_strips_are_converted_as_the_whole_image_is(
    channels: int, mode: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(smooth_pixels(70, 50))
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    data = encode(image, "PNG", **options)
    in_one = decode_image(data, whole, 32, channels)
    monkeypatch.setattr(decode, "_STRIP_PIXELS", 50 * 8)
    assert torch.equal(decode_image(data, whole, 32, channels), in_one)


@pytest.mark.parametrize("format", ["PPM", "ICO", "JPEG2000", "TGA", "PDF"])
def test_formats_beyond_the_list_are_refused(format: str) -> None:
    with pytest.raises(BadSample, match="no readable image"):
        decode_image(encode(smooth_pixels(32, 32), format), whole, 16)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0",
        b"<html>404</html>",
        bytes(1000),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
    ids=["empty", "jpeg magic", "jpeg start", "html", "zeros", "postscript"],
)
def test_what_is_no_image_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(BadSample) as error:
        decode_image(data, whole, 16)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_images_are_refused(format: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(noise, format)
    with pytest.raises(BadSample):
        decode_image(data[: int(part * len(data))], whole, 16)


def with_a_hole(data: bytes, kind: str) -> bytes:
    """A JPEG that lost part of its middle, and yet ends as one does."""
    middle, length = len(data) // 2, 600
    if kind == "cut":
        return data[:middle] + b"\xff\xd9"
    noise = np.random.default_rng(0).integers(1, 255, length, dtype=np.uint8).tobytes()
    return data[:middle] + (noise if kind == "overwritten" else b"") + data[middle + length :]


@pytest.mark.parametrize("kind", ["cut", "removed", "overwritten"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str)
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGB", 1), ("RGB", 4), ("L", 3), ("CMYK", 3)])
def test_a_jpeg_with_a_hole_is_refused(kind: str, options: dict[str, object], mode: str, channels: int) -> None:
    """Pillow fills the rest with grey, or with what a decoder out of step makes of it."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    whole_image = encode(Image.fromarray(noise).convert(mode), quality=90, **options)
    assert decode_image(whole_image, whole, 64, channels).shape == (channels, 64, 64)
    with pytest.raises(BadSample, match=r"damaged|does not decode"):
        decode_image(with_a_hole(whole_image, kind), whole, 64, channels)


def subsampled_441() -> bytes:
    """A grey JPEG that says 4:4:1, which simplejpeg has no name for."""
    data = bytearray(encode(Image.new("YCbCr", (32, 32), (99, 128, 128)), subsampling="4:2:0"))
    frame = data.index(b"\xff\xc0")
    assert data[frame + 11] == 0x22
    data[frame + 11] = 0x14  # four blocks of brightness to one of each colour in both
    return bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\0" * 5000,
        lambda data: data + b"<!-- cached -->",
        lambda data: data + data,
        lambda data: data[:-2],
        lambda data: data[:-2] + b"\0\1\2\3" + data[-2:],
        lambda data: data[:2] + b"\xff\xe5\0\x06spam" + data[2:],
        lambda data: data[:2] + b"\xff\xfe\0\x06spam" + data[2:],
        lambda data: data[:-2] + b"\xff\xff" + data[-2:],
        lambda data: data.replace(b"JFIF\0\1", b"JFIF\0\7", 1),
    ],
    ids=["zeros", "text", "twice", "no end", "padded", "app5", "comment", "fill", "revision"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_harmless_oddities_of_a_jpeg_change_no_pixel(change: Callable[[bytes], bytes], channels: int) -> None:
    data = encode(smooth_pixels(48, 64), quality=90)
    assert change(data) != data
    assert torch.equal(decode_image(change(data), whole, 32, channels), decode_image(data, whole, 32, channels))


def test_the_first_image_of_a_multi_picture_jpeg_is_taken() -> None:
    first, second = (Image.fromarray(smooth_pixels(48, 64, seed)) for seed in (0, 1))
    data = encode(first, "MPO", save_all=True, append_images=[second], quality=90)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    for channels in (1, 3):
        expected = decode_image(encode(first, quality=90), whole, 32, channels)
        assert torch.equal(decode_image(data, whole, 32, channels), expected)


def test_a_subsampling_without_a_name_is_decoded() -> None:
    assert (decode_image(subsampled_441(), whole, 16) == 99).all()


@pytest.mark.filterwarnings("ignore")  # Pillow comments on damaged metadata
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_bytes_give_an_image_or_a_bad_sample_and_no_other_error(format: str) -> None:
    rng = np.random.default_rng(0)
    original = encode(smooth_pixels(40, 50), format)
    refused = 0
    for _ in range(150):
        data = bytearray(original)
        for place in rng.integers(0, min(len(data), 600), size=3):
            data[place] = rng.integers(256)
        try:
            assert decode_image(bytes(data), CenterCrop(), 16).shape == (3, 16, 16)
        except BadSample:
            refused += 1
    assert refused > 0
