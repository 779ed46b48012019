r"""Measure the data path on one core, from JPEG in tars to batches, against open_clip's pipeline.

    python -m analysis.benchmarks.data [--sides 512,256] [--output data.json]

All read the same tars in one process without workers, and return batches of 64 crops of 224 pixels (RandomResizedCrop
of .9 to 1 of the area, bicubic) with the tokens of a caption:

- `open_clip`: its stages in its order (tar stream, shuffle, Pillow, torchvision's crop and resize, tensor,
  normalisation, tokenizer to 77 tokens, batching; the shuffle of one tar and the filter of samples aside) with its own
  transform and tokenizer, on this environment's webdataset;
- `mmpretrain`: `SampleStream` and `build_loader`, uint8 batches: normalisation is the device's work;
- `normalised`: the same, with the normalisation done on this core, too;
- `bare`: a loop over bytes in memory with the libraries of mmpretrain: scaled JPEG decoding, the same crops,
  the same resize, stacking; no tar, no order, no text. An upper bound.

A round runs each pipeline once over all images; the table gives medians over the rounds and ratios of the medians.
Seconds are CPU seconds of the process. On an idle machine they equal wall seconds (one thread, tars in the page cache),
and on a busy one they depend less on other processes. Tokenizers and indexes are made before.

Images come from `jpeg_tars.py`. The benchmark fails unless both sides give the same tokens and their central crops differ
by at most 3 grey levels (of 255) on average; the difference is printed. It is not zero because mmpretrain resizes integers,
and decodes at half the size if the crop allows it.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import open_clip
import simplejpeg
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image

from analysis.benchmarks import arguments
from analysis.benchmarks.jpeg_tars import PHOTOGRAPHS, write_tar
from analysis.benchmarks.machine import one_line, write_record
from mmpretrain.batch import Batch
from mmpretrain.data.decode import decode_image
from mmpretrain.data.loader import build_loader
from mmpretrain.data.shards import Shards
from mmpretrain.data.stream import SampleStream, Source
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.data.transforms import CenterCrop, RandomResizedCrop
from mmpretrain.schedules import Clock

NAMES = ("open_clip", "mmpretrain", "normalised", "bare")
IMAGE_SIZE = 224
BATCH_SIZE = 64
SCALE = (0.9, 1.0)
MOST_GREY_LEVELS = 3.0
MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1) * 255
STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1) * 255


def open_clip_pipeline(tar: Path) -> webdataset.DataPipeline:
    """Return the training pipeline of `open_clip_train.data.get_wds_dataset`, stage by stage."""
    augmentation = open_clip.AugmentationCfg(scale=SCALE)
    transform = open_clip.image_transform(IMAGE_SIZE, is_train=True, aug_cfg=augmentation)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return webdataset.DataPipeline(
        webdataset.SimpleShardList([str(tar)]),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(bufsize=5000, initial=1000),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(BATCH_SIZE, partial=False),
    )


def mmpretrain_stream(tar: Path) -> SampleStream:
    """Return a training stream of mmpretrain over the tar."""
    sources = [Source("benchmark", Shards([str(tar)]))]
    return SampleStream("pairs", sources, BATCH_SIZE, 0, "txt", RandomResizedCrop(SCALE), IMAGE_SIZE)


def normalised(batches: Iterable[Batch]) -> Iterator[object]:
    """Yield the images of mmpretrain's batches, normalised on this core."""
    for batch in batches:
        images = batch.streams["pairs"].images
        if images is None:
            raise ValueError("the loader gave a batch without images")
        yield images.float().sub_(MEAN).div_(STD)


def bare_batches(images: list[bytes], side: int) -> Iterator[object]:
    """Yield batches of JPEGs in memory: decoding, cropping, resizing, stacking."""
    crop_of = RandomResizedCrop(SCALE)
    for start in range(0, len(images), BATCH_SIZE):
        batch = []
        for i in range(start, start + BATCH_SIZE):
            crop = crop_of(side, side, i)
            factor = 2 if min(crop.height, crop.width) >= 2 * IMAGE_SIZE else 1
            least = side // factor
            pixels = simplejpeg.decode_jpeg(images[i], "RGB", min_height=least, min_width=least)
            top, left, height, width = (n // factor for n in (crop.top, crop.left, crop.height, crop.width))
            box = torch.from_numpy(pixels[top : top + height, left : left + width]).permute(2, 0, 1)[None]
            batch.append(F.interpolate(box, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)[0])
        yield torch.stack(batch)


def mean_difference(images: list[bytes]) -> float:
    """Return the mean absolute difference of the two sides' central crops of `images`, in grey levels (0 to 255)."""
    transform = open_clip.image_transform(IMAGE_SIZE, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    differences = []
    for image in images:
        theirs = transform(Image.open(io.BytesIO(image))) * 255
        ours = decode_image(image, lambda height, width: CenterCrop()(height, width), IMAGE_SIZE)
        differences.append((theirs - ours.float()).abs().mean().item())
    return statistics.mean(differences)


def check(tar: Path, images: list[bytes], batches: Iterable[Batch]) -> float:
    """Return the mean difference of central crops in grey levels.

    Raises: SystemExit if it is too large, or if the tokens of a caption differ from open_clip's.
    """
    with tarfile.open(tar) as members:
        captions = [members.extractfile(member).read().decode() for member in members if member.name.endswith(".txt")]  # type: ignore[union-attr]
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    for samples in (batch.streams["pairs"] for batch in batches):
        assert samples.text is not None and samples.lengths is not None
        for row, sample in enumerate(samples.ids.tolist()):
            (theirs,), length = tokenizer(captions[sample]), int(samples.lengths[row])
            if not torch.equal(samples.text[row, :length], theirs[:length]) or theirs[length:].any():
                raise SystemExit(f"{captions[sample]!r} has other tokens here than in open_clip")
    difference = mean_difference(images)
    if not difference <= MOST_GREY_LEVELS:
        raise SystemExit(f"central crops differ by {difference:.2f} grey levels; expected {MOST_GREY_LEVELS} at most")
    return difference


def measure(photographs: list[Path], side: int, num_images: int, rounds: int) -> dict[str, float]:
    """Return the median images per second of each pipeline on side x side JPEGs, with a description of the images."""
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "000000.tar"
        images = write_tar(tar, photographs, side, num_images)
        theirs, stream, tokenizer = open_clip_pipeline(tar), mmpretrain_stream(tar), ClipTokenizer()

        def ours() -> Iterable[Batch]:
            return build_loader({"pairs": stream}, tokenizer, Clock(1, 1), 0, num_images // BATCH_SIZE)

        passes: dict[str, Callable[[], Iterable[object]]] = {
            "open_clip": lambda: theirs,
            "mmpretrain": ours,
            "normalised": lambda: normalised(ours()),
            "bare": lambda: bare_batches(images, side),
        }
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for turn in range(rounds + 1):  # the first round warms caches up and is not counted
            for name in list(passes) if turn % 2 == 0 else reversed(passes):
                start = time.process_time()
                num_batches = sum(1 for _ in passes[name]())
                if turn > 0:
                    seconds[name].append(time.process_time() - start)
                if num_batches * BATCH_SIZE != num_images:
                    raise ValueError(f"{name} gave {num_batches} batches of {BATCH_SIZE}, not {num_images} images")
        difference = check(tar, images[:64], ours())
        rates = {name: num_images / statistics.median(times) for name, times in seconds.items()}
        return {
            **rates,
            "ratio": rates["mmpretrain"] / rates["open_clip"],
            "normalised_ratio": rates["normalised"] / rates["open_clip"],
            "share_of_bare": rates["mmpretrain"] / rates["bare"],
            "mean_bytes": statistics.mean(map(len, images)),
            "mean_difference": difference,
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sides",
        type=arguments.listed(arguments.positive),
        default="512,256",
        help="sides of the JPEGs in pixels (default 512,256)",
    )
    parser.add_argument(
        "--images", default=512, type=arguments.positive, help=f"per pass, a multiple of {BATCH_SIZE} (default 512)"
    )
    parser.add_argument(
        "--rounds", default=7, type=arguments.positive, help="passes of each pipeline, interleaved (default 7)"
    )
    parser.add_argument(
        "--photographs", type=arguments.existing, help=f"folder of JPEGs (default {PHOTOGRAPHS}; noise without it)"
    )
    parser.add_argument("--output", type=arguments.writable, help="also write the figures there as JSON")
    args = parser.parse_args(argv)
    if args.images < BATCH_SIZE or args.images % BATCH_SIZE:
        parser.error(f"--images {args.images}: expected a multiple of {BATCH_SIZE}")
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    photographs = args.photographs or PHOTOGRAPHS
    found = sorted(photographs.rglob("*.jpg"))
    print(f"{one_line()}\npictures: " + (f"mosaics of {photographs}" if found else "smooth noise"))
    print(f"{'JPEG':<9}" + "".join(f"{name:>12}" for name in NAMES))
    figures = {}
    for side in args.sides:
        row = figures[side] = measure(found, side, args.images, args.rounds)
        rates = "".join(f"{row[name]:>12.0f}" for name in NAMES)
        print(f"{side:>4}x{side:<4}{rates}   images/s, {row['mean_bytes'] / 1024:.0f} KiB a JPEG", flush=True)
        print(
            f"          {row['ratio']:.2f} x open_clip ({row['normalised_ratio']:.2f} x normalised), "
            f"{row['share_of_bare']:.2f} of bare; crops differ by {row['mean_difference']:.2f} grey levels"
        )
    write_record(args, pictures="mosaics" if found else "noise", webdataset=webdataset.__version__, figures=figures)


if __name__ == "__main__":
    main()
