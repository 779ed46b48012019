"""Tiny tars of real images, written with webdataset, and of any members, written with tarfile."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

Sample = dict[str, Any]
"""Extension -> bytes, text (`txt`), or an object (`json`), as webdataset's writer takes it."""

Member = tuple[str, bytes]
"""(name, content) of a member of a tar."""


def encode(pixels: np.ndarray | Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """uint8 [h, w, 3], or an image of any mode -> the file's bytes."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def smooth_pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A colourful image without sharp edges, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def make_samples(count: int, first: int = 0) -> list[Sample]:
    """Distinct images of several sizes, each with captions of many lengths under `txt` and in `json`."""
    samples = []
    for i in range(first, first + count):
        caption = f"sample {i} " + "word " * (i * 7 % 23)
        samples.append(
            {
                "jpg": encode(smooth_pixels(20 + i % 5, 24 - i % 7, seed=i)),
                "txt": caption,
                "json": {"caption": caption, "captions": [f"{caption} {choice}" for choice in "abc"]},
            }
        )
    return samples


def write_tar(path: Path, samples: Sequence[Mapping[str, Any]], first_key: int = 0) -> str:
    """Write samples under the keys `first_key`, `first_key` + 1, ...; returns the path."""
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for key, sample in enumerate(samples, first_key):
            writer.write({"__key__": f"{key:06d}", **sample})
    return str(path)


def write_tars(folder: Path, samples: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> list[str]:
    """Write `samples` into tars of `counts` samples each, keys running on; returns their paths."""
    paths, start = [], 0
    for number, count in enumerate(counts):
        paths.append(write_tar(folder / f"{number:03d}.tar", samples[start : start + count], start))
        start += count
    assert start == len(samples), f"{len(samples)} samples do not fit counts {counts}"
    return paths


def write_members(path: Path, members: list[Member], format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write members in their order with tarfile; returns the path."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def pairs(keys: list[str], image: bytes = b"image", caption: bytes = b"caption") -> list[Member]:
    """Members `KEY.jpg` and `KEY.txt` of each key, with the same contents."""
    return [member for key in keys for member in ((f"{key}.jpg", image), (f"{key}.txt", caption))]
