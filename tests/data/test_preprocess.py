"""Pixels of evaluation, against the transforms of open_clip and timm."""

import io
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from mmpretrain.data.decode import BadSample
from mmpretrain.data.preprocess import Preprocess
from tests.tars import encode


def photograph(width: int, height: int) -> Image.Image:
    """Gradients, edges and noise: what a resize of another kind or place would change."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(rows / (5 + c) + columns / (9 - c)) for c in range(3)]
    pixels = np.stack(waves, axis=-1) + np.random.default_rng(0).normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 3 :] = 250
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def of_open_clip(
    image: Image.Image, size: int, resize_mode: str = "shortest", interpolation: str = "bicubic"
) -> Tensor:
    transform = open_clip.image_transform(
        size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode, interpolation=interpolation
    )  # type: ignore[arg-type]
    assert isinstance(transform, Compose)
    return (transform(image) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("size", [48, 112, 224])
@pytest.mark.parametrize(
    "shape", [(192, 192), (256, 192), (191, 257), (640, 427), (1200, 90), (31, 300), (20, 20), (1, 70)], ids=str
)
@pytest.mark.parametrize(("resize_mode", "interpolation"), [("shortest", "bicubic"), ("squash", "bilinear")])
def test_pixels_are_those_of_open_clip(shape: tuple[int, int], size: int, resize_mode: str, interpolation: str) -> None:
    data = encode(photograph(*shape), "PNG")
    preprocess = Preprocess(size, squash=resize_mode == "squash", interpolation=interpolation)  # type: ignore[arg-type]
    expected = of_open_clip(Image.open(io.BytesIO(data)), size, resize_mode, interpolation)
    assert torch.equal(preprocess(data), expected)
    assert torch.equal(preprocess(Image.open(io.BytesIO(data))), expected)


@pytest.mark.parametrize(
    ("file_format", "mode", "options"),
    [
        *(("JPEG", "RGB", {"subsampling": subsampling, "quality": 80}) for subsampling in ("4:4:4", "4:2:2", "4:2:0")),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"restart_marker_blocks": 3, "optimize": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("PNG", "RGBA", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "CMYK", {}),
    ],
)
def test_pixels_of_each_format_are_those_of_open_clip(file_format: str, mode: str, options: dict[str, object]) -> None:
    data = encode(photograph(311, 207).convert(mode), file_format, **options)
    for size in (48, 224):
        assert torch.equal(Preprocess(size)(data), of_open_clip(Image.open(io.BytesIO(data)), size)), size


def test_pixels_of_photographs_are_those_of_open_clip(shared_data: Path) -> None:
    files = sorted((shared_data / "grocery").rglob("*.jpg"))[::60]
    assert files
    for file in files:
        for size in (48, 112, 224):
            assert torch.equal(Preprocess(size)(file), of_open_clip(Image.open(file), size)), file


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(("crop_pct", "interpolation"), [(0.9, "bicubic"), (0.875, "bilinear"), (1.0, "bicubic")])
def test_pixels_are_those_of_timm(crop_pct: float, interpolation: str, crop_mode: str) -> None:
    transform = timm.data.create_transform(
        96, interpolation=interpolation, mean=(0,) * 3, std=(1,) * 3, crop_pct=crop_pct, crop_mode=crop_mode
    )
    preprocess = Preprocess(96, squash=crop_mode == "squash", interpolation=interpolation, crop_pct=crop_pct)  # type: ignore[arg-type]
    for shape in ((200, 133), (133, 200), (96, 96)):
        image = photograph(*shape)
        assert torch.equal(preprocess(image), (transform(image) * 255).round().to(torch.uint8))


def test_transparency_is_flattened_onto_white_and_deep_grey_scaled() -> None:
    clear = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    assert Preprocess(16)(encode(clear, "PNG")).unique().tolist() == [255]
    deep = Image.fromarray(np.full((40, 60), 0x8080, np.uint16))
    assert Preprocess(16)(encode(deep, "PNG")).unique().tolist() == [0x80]


def test_channels_and_memory_of_the_result() -> None:
    image = photograph(60, 40).convert("RGBA")
    out = torch.zeros(4, 16, 16, dtype=torch.uint8)
    assert Preprocess(16, channels=4)(image, out) is out
    assert out[3].unique().tolist() == [255]
    grey = Preprocess(16, channels=1)(image)
    assert torch.equal(grey, Preprocess(16, channels=1)(image.convert("RGB")))
    assert grey.shape == (1, 16, 16)


def test_an_image_whose_resize_takes_too_much_memory_is_refused() -> None:
    """Its shorter side is one pixel: resized to 224 pixels, the longer one has 224 times as many as before."""
    data = encode(photograph(4000, 1), "PNG")
    with pytest.raises(BadSample, match="896000 x 224 pixels take 766 MiB to resize to, more than the limit of 512"):
        Preprocess(224)(data)
    assert Preprocess(224, squash=True)(data).shape == (3, 224, 224)
