"""What `build` makes of every kind of picture, against Pillow's own view of it."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_tools.images import ImageOptions, check_image, encode_image, parse_color
from mmpretrain.data.decode import BadSample, Crop, decode_image, to_rgb

REPOSITORY = Path(__file__).resolve().parents[2]
RED = (200, 30, 40)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def half_red(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, white on the right."""
    image = Image.new("RGB", (width, height), "white")
    image.paste(RED, (0, 0, width // 2, height))
    return image


@pytest.mark.parametrize(("format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_bytes_that_need_no_change_are_kept(format: str, extension: str, mode: str) -> None:
    data = encoded(half_red().convert(mode), format)
    assert encode_image(data, ImageOptions()) == (extension, data)
    assert encode_image(data, ImageOptions(format=extension, short_side=20)) == (extension, data)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 128, 255)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_flattened_onto_the_background(mode: str, background: tuple[int, int, int]) -> None:
    rgba = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    rgba.paste((90, 90, 90, 255), (0, 0, 8, 16))
    extension, data = encode_image(encoded(rgba.convert(mode), "PNG"), ImageOptions(background=background))
    flat = picture(data)
    assert extension == "png" and flat.mode == "RGB" and "transparency" not in flat.info
    assert flat.getpixel((2, 2)) == (90, 90, 90) and flat.getpixel((12, 2)) == background


def test_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    _, data = encode_image(encoded(image, "PNG", transparency=0), ImageOptions())
    assert picture(data).getpixel((4, 4)) == (255, 255, 255) and picture(data).getpixel((0, 0)) == (200, 100, 50)


def test_cmyk_jpeg_becomes_one_that_simplejpeg_reads() -> None:
    data = encoded(half_red().convert("CMYK"), "JPEG")
    extension, result = encode_image(data, ImageOptions())
    assert extension == "jpg"
    pixels = simplejpeg.decode_jpeg(result, "RGB")
    assert np.abs(pixels[10, 5].astype(int) - RED).max() < 25 and pixels[10, 35].min() > 240


def test_sixteen_bit_grey_is_scaled() -> None:
    grey = np.array([[0, 257, 65535, 32896]], np.uint16)
    extension, data = encode_image(encoded(Image.fromarray(grey), "PNG"), ImageOptions())
    assert extension == "png" and np.asarray(picture(data))[0, :, 0].tolist() == [0, 1, 255, 128]


def test_sixteen_bit_rgb_png_is_written_anew() -> None:
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    pixel = b"\0" + struct.pack(">3H", 0xC8FF, 0x1E00, 0x2880)
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixel)) + chunk(b"IEND", b"")
    _, result = encode_image(data, ImageOptions())
    assert result[24] == 8 and picture(result).getpixel((0, 0)) == (0xC8, 0x1E, 0x28)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(2, 9))
def test_exif_rotation_is_baked_in(format: str, turn: int) -> None:
    image = half_red()
    image.paste((30, 40, 200), (0, 0, 10, 5))  # one corner, so that mirrored differs from turned
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(image, format, exif=exif, **({} if format in ("PNG", "TIFF") else {"quality": 95}))
    _, result = encode_image(data, ImageOptions(format="png"))
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }[turn]
    expected = np.asarray(image.transpose(method)).astype(int)
    upright = picture(result)
    assert upright.getexif().get(0x0112, 1) == 1
    assert upright.size == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(upright) - expected).mean() < 8


def test_an_upright_jpeg_keeps_its_bytes_and_a_turned_one_its_format() -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    upright = encoded(half_red(), "JPEG", exif=exif)
    assert encode_image(upright, ImageOptions()) == ("jpg", upright)
    exif[0x0112] = 6
    extension, turned = encode_image(encoded(half_red(), "JPEG", exif=exif), ImageOptions())
    assert extension == "jpg" and picture(turned).size == (20, 40)


def test_short_side_is_reduced_and_never_enlarged() -> None:
    data = encoded(Image.fromarray(noise(90, 120, 3)), "PNG")
    assert picture(encode_image(data, ImageOptions(short_side=30))[1]).size == (40, 30)
    assert encode_image(data, ImageOptions(short_side=200)) == ("png", data)


@pytest.mark.parametrize(("source", "extension"), [("GIF", "jpg"), ("BMP", "jpg"), ("TIFF", "jpg"), ("WEBP", "webp")])
def test_default_formats(source: str, extension: str) -> None:
    rgba = half_red().convert("RGBA") if source == "WEBP" else half_red()
    rgba.putpixel((0, 0), (0, 0, 0, 0)) if source == "WEBP" else None
    assert encode_image(encoded(rgba, source), ImageOptions())[0] == extension


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_asked_for_formats(extension: str) -> None:
    result_extension, data = encode_image(encoded(half_red(), "BMP"), ImageOptions(format=extension))
    assert result_extension == extension
    assert picture(data).format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]


def test_quality_counts() -> None:
    data = encoded(Image.fromarray(noise(64, 64, 3)), "BMP")
    assert len(encode_image(data, ImageOptions(quality=30))[1]) < len(encode_image(data, ImageOptions())[1])


def test_of_an_animation_the_first_frame_is_kept() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    _, result = encode_image(data, ImageOptions())
    assert not getattr(picture(result), "is_animated", False) and picture(result).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no readable image"),
        (b"no picture at all", "no readable image"),
        (encoded(Image.fromarray(noise(64, 64, 3)), "PNG")[:3000], "does not decode"),
        (encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")[:1500], "the JPEG is damaged"),
        (b"P6 4 4 255 " + bytes(48), "no readable image"),  # PPM, which the allow-list leaves out
    ],
)
def test_unusable_images_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "image").write_bytes(content)
    with pytest.raises(BadSample, match=reason):
        check_image(tmp_path / "image", ImageOptions())
    with pytest.raises(BadSample, match=reason):
        encode_image(content, ImageOptions())


def damaged_jpegs() -> dict[str, bytes]:
    """JPEGs with a stretch of zeros, or cut in the middle and ended, each of which Pillow decodes."""
    smooth = Image.fromarray(noise(16, 16, 3)).resize((128, 128), Image.Resampling.BICUBIC)
    result = {}
    for name, image, options in (
        ("RGB", smooth, {}),
        ("grey", smooth.convert("L"), {}),
        ("CMYK", smooth.convert("CMYK"), {}),
        ("progressive", smooth, {"progressive": True}),
    ):
        data = encoded(image, "JPEG", **options)
        half, end = len(data) // 2, len(data) * 3 // 5
        result[f"{name} with a hole"] = data[:half] + bytes(end - half) + data[end:]
        result[f"{name} cut"] = data[:half] + b"\xff\xd9"
    image, other = io.BytesIO(), smooth.transpose(Image.Transpose.ROTATE_90)
    smooth.save(image, "MPO", save_all=True, append_images=[other])
    data = image.getvalue()
    assert picture(data).format == "MPO"
    result["MPO with a hole"] = data[:2000] + bytes(500) + data[2500:]
    return result


DAMAGED_JPEGS = damaged_jpegs()


@pytest.mark.parametrize("short_side", [None, 16])
@pytest.mark.parametrize("name", DAMAGED_JPEGS)
def test_a_damaged_jpeg_is_refused_as_in_training(tmp_path: Path, name: str, short_side: int | None) -> None:
    data = DAMAGED_JPEGS[name]
    picture(data).load()  # Pillow sees nothing
    (tmp_path / "a.jpg").write_bytes(data)
    for refuse in (
        lambda: decode_image(data, lambda height, width: Crop(0, 0, height, width), 16),
        lambda: encode_image(data, ImageOptions(short_side=short_side)),
        lambda: check_image(tmp_path / "a.jpg", ImageOptions(short_side=short_side)),
    ):
        with pytest.raises(BadSample, match="the JPEG is damaged"):
            refuse()


def test_a_jpeg_that_lacks_only_its_end_marker_is_accepted_as_in_training() -> None:
    whole = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")
    decode_image(whole[:-2], lambda height, width: Crop(0, 0, height, width), 16)
    assert encode_image(whole[:-2], ImageOptions()) == ("jpg", whole[:-2])
    reduced = ImageOptions(short_side=16)
    assert encode_image(whole[:-2], reduced) == encode_image(whole, reduced)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "I;16", "CMYK", "1"])
def test_conversion_in_strips_changes_no_pixel(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "I;16":
        image = Image.fromarray((noise(20, 30).astype(np.uint16) << 8) + 3)
    else:
        image = Image.fromarray(noise(20, 30, 4)).convert("RGB" if mode in ("CMYK", "1") else "RGBA").convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    monkeypatch.setattr("data_tools.images.STRIP_PIXELS", 7 * 30)  # the last one is lower
    _, result = encode_image(data, ImageOptions(format="png", background=RED))
    np.testing.assert_array_equal(np.asarray(picture(result)), np.asarray(to_rgb(picture(data), RED)))


def test_a_large_image_takes_the_memory_of_its_pixels_once(tmp_path: Path) -> None:
    Image.new("P", (6000, 6000)).save(tmp_path / "a.png", transparency=0)
    program = """
import resource, sys
from data_tools.images import ImageOptions, encode_image
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encode_image(data, ImageOptions(short_side=16))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 6000**2)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "a.png")]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert float(shown.stdout) < 7  # bytes a pixel: the palette's one and RGB's four


def test_pillows_warnings_are_not_shown(tmp_path: Path) -> None:
    Image.new("1", (10_000, 9_000)).save(tmp_path / "a.png")  # more than what Pillow takes for an attack
    program = """
import sys
from pathlib import Path

from data_tools.images import ImageOptions, check_image

check_image(Path(sys.argv[1]), ImageOptions())
"""
    command = [sys.executable, "-c", program, str(tmp_path / "a.png")]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stderr == ""


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_counts_as_none() -> None:
    data = encoded(half_red(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert encode_image(data, ImageOptions()) == ("jpg", data)


def test_colors() -> None:
    assert parse_color("#0a0B0c") == parse_color("10,11,12") == (10, 11, 12)
    for wrong in ("white", "#fff", "1,2", "256,0,0", ""):
        with pytest.raises(ValueError, match=r"--background .*expected R,G,B"):
            parse_color(wrong)


@pytest.mark.parametrize(("format", "side"), [("webp", 16383), ("jpg", 65500)])
@pytest.mark.parametrize("turned", [False, True])
def test_sides_that_the_format_does_not_allow_are_refused(tmp_path: Path, format: str, side: int, turned: bool) -> None:
    options = ImageOptions(format=format)
    for length in (side, side + 1):
        image = Image.new("RGB", (2, length) if turned else (length, 2))
        (tmp_path / f"{length}.png").write_bytes(encoded(image, "PNG"))
    check_image(tmp_path / f"{side}.png", options)
    assert max(picture(encode_image((tmp_path / f"{side}.png").read_bytes(), options)[1]).size) == side
    for refuse in (
        lambda: check_image(tmp_path / f"{side + 1}.png", options),
        lambda: encode_image((tmp_path / f"{side + 1}.png").read_bytes(), options),
    ):
        with pytest.raises(BadSample, match=f"{format} allows sides of {side}: --format png, or a smaller"):
            refuse()
    check_image(tmp_path / f"{side + 1}.png", ImageOptions(format=format, short_side=1))
    check_image(tmp_path / f"{side + 1}.png", ImageOptions(format="png"))
