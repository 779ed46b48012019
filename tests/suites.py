"""A small suite in CLIP_benchmark's WebDataset layout."""

from pathlib import Path

import numpy as np

from tests.tars import encode, smooth_pixels, write_tar

NAMES = ["cat", "dog", "ant", "old bus", "red car", "sea", "tree"]


def image(seed: int) -> bytes:
    """A small image of a few colours, so that random weights tell images apart."""
    pixels = smooth_pixels(32, 36, seed) // 2 + np.random.default_rng(seed).integers(0, 128, 3, dtype=np.uint8)
    return encode(pixels.astype(np.uint8), "PNG")


def write_suite(folder: Path) -> Path:
    """60 images of 7 classes; 40 images with one to three captions of their own; and 12 with captions of many images."""
    labelled = [{"png": image(i), "cls": str(i * i % 7)} for i in range(60)]
    texts = [[f"{'very ' * (i % 3)}number {i} of kind {j}" for j in range(i % 3 + 1)] for i in range(40)]
    captioned = [{"png": image(100 + i), "txt": "\n".join(each)} for i, each in enumerate(texts)]
    shared = [{"png": image(200 + i // 2), "txt": f"text {i // 4}"} for i in range(12)]
    for name, samples in (("labelled", labelled), ("captioned", captioned), ("shared", shared)):
        test = folder / f"wds_{name}" / "test"
        test.mkdir(parents=True)
        write_tar(test / "0.tar", samples[:10])
        write_tar(test / "1.tar", samples[10:], 10)
        (test / "nshards.txt").write_text("2\n")
        if name != "labelled":
            (test.parent / "dataset_type.txt").write_text("retrieval\n")
    (folder / "wds_labelled" / "classnames.txt").write_text("\n".join(NAMES))
    templates = "a photo of a {c}.\nmy {c}, my {c}\n"
    (folder / "wds_labelled" / "zeroshot_classification_templates.txt").write_text(templates)
    return folder
