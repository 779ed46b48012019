r"""Write tars of JPEGs and captions for benchmarks.

    python -m analysis.benchmarks.jpeg_tars --output data/jpegs/train --tars 16 --images 2048 --side 512

Images are mosaics of photographs (a folder of JPEGs), or smooth noise without one, saved with quality 90.
"""

import argparse
import io
import os
import random
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from analysis.benchmarks import arguments

PHOTOGRAPHS = Path("../shared/data/grocery/images")
QUALITY = 90
TILE = 160  # pixels; the photographs of the grocery data set have a short side of 192
WORDS = ("red", "small", "fresh", "old", "round", "apple", "bottle", "street", "dog", "kitchen", "morning")


def noise(rng: random.Random, side: int) -> Image.Image:
    """Return a smooth image of side x side pixels: noise on a coarse grid, and weaker noise on two finer ones."""
    generator = np.random.default_rng(rng.getrandbits(32))
    layers = [Image.fromarray(generator.integers(0, 256, (n, n, 3), dtype=np.uint8)) for n in (6, 24, side // 4)]
    picture = layers[0].resize((side, side), Image.Resampling.BICUBIC)
    for weight, layer in zip((1 / 3, 1 / 7), layers[1:], strict=True):
        picture = Image.blend(picture, layer.resize((side, side), Image.Resampling.BICUBIC), weight)
    return picture


def mosaic(photographs: list[Path], rng: random.Random, side: int) -> Image.Image:
    """Return side x side pixels filled with crops of random photographs at full resolution, TILE pixels wide."""
    picture = Image.new("RGB", (side, side))
    for top in range(0, side, TILE):
        for left in range(0, side, TILE):
            photograph = Image.open(rng.choice(photographs)).convert("RGB")
            if min(photograph.size) < TILE:
                photograph = photograph.resize((max(photograph.width, TILE), max(photograph.height, TILE)))
            x, y = rng.randint(0, photograph.width - TILE), rng.randint(0, photograph.height - TILE)
            picture.paste(photograph.crop((x, y, x + TILE, y + TILE)), (left, top))
    return picture


def write_tar(path: Path, photographs: list[Path], side: int, num_images: int, seed: int = 0) -> list[bytes]:
    """Write `num_images` pairs of a JPEG and a caption of 8 to 24 words, and return the JPEGs."""
    rng = random.Random(seed)
    images = []
    with tarfile.open(path, "w") as tar:
        for i in range(num_images):
            buffer = io.BytesIO()
            picture = mosaic(photographs, rng, side) if photographs else noise(rng, side)
            picture.save(buffer, "JPEG", quality=QUALITY)
            images.append(buffer.getvalue())
            caption = " ".join(rng.choices(WORDS, k=rng.randint(8, 24)))
            for suffix, content in (("jpg", images[-1]), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return images


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for the tars")
    parser.add_argument("--tars", default=16, type=arguments.positive)
    parser.add_argument("--images", default=2048, type=arguments.positive, help="images in each tar (default 2048)")
    parser.add_argument(
        "--side", default=512, type=arguments.positive, help="side of the JPEGs in pixels (default 512)"
    )
    parser.add_argument(
        "--photographs", type=arguments.existing, help=f"folder of JPEGs (default {PHOTOGRAPHS}; noise without it)"
    )
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    photographs = args.photographs or PHOTOGRAPHS
    found = sorted(photographs.rglob("*.jpg"))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        written = [
            pool.submit(write_tar, args.output / f"{i:06d}.tar", found, args.side, args.images, seed=i)
            for i in range(args.tars)
        ]
        sizes = [sum(map(len, tar.result())) for tar in written]
    pictures = f"mosaics of {photographs}" if found else "smooth noise"
    print(
        f"{args.tars} tars of {args.images:,} pairs in {args.output}, {sum(sizes) / 2**20:,.0f} MiB of JPEGs: {pictures}"
    )


if __name__ == "__main__":
    main()
