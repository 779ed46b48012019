"""Measures of the samples of one tar: image sizes from their headers, and lengths and hashes of captions."""

import dataclasses
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch

from data_tools.tars import open_tar
from mmpretrain.data.decode import BadSample, open_image
from mmpretrain.data.fields import read_captions
from mmpretrain.data.shard_table import ShardTable
from mmpretrain.data.shards import Shards
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.data.tokenizer import Tokenizer, tokenizer_of
from mmpretrain.seeds import hash64

MAX_TOKENS = 4096
"""Limit up to which the tokens of a caption are counted: texts of many megabytes occur in crawled data."""
_FORMATS = {"JPEG": "jpg", "MPO": "jpg"}  # Pillow's name of a format, where it differs from the usual one


Task = tuple[str, ShardTable | None, int, npt.NDArray[np.int64]]
"""Path of a tar, its row if it is remote, the id of its first sample, and the ids of the samples to measure."""


@dataclass(frozen=True)
class Measured:
    """Measures of some samples: one entry per readable image, and one per caption.

    Attributes:
        widths, heights: size of each image, in pixels, int32 [i].
        image_bytes: encoded size of each image, int64 [i].
        tokens: length of each caption, start and end included, int32 [c].
        hashes: hash of the text of each caption, uint64 [c].
        samples: id of the sample of each caption, int64 [c].
        formats: number of images of each format.
        unreadable: number of images and captions that cannot be read.
    """

    widths: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    image_bytes: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    hashes: npt.NDArray[np.uint64]
    samples: npt.NDArray[np.int64]
    formats: Mapping[str, int]
    unreadable: Mapping[str, int]

    @classmethod
    def joined(cls, parts: Iterable["Measured"]) -> "Measured":
        """Concatenate at least one part."""
        formats: Counter[str] = Counter()
        unreadable: Counter[str] = Counter()
        columns: dict[str, list[npt.NDArray[Any]]] = {}
        for part in parts:
            formats.update(part.formats)
            unreadable.update(part.unreadable)
            for field in dataclasses.fields(cls):
                column = getattr(part, field.name)
                if isinstance(column, np.ndarray):
                    columns.setdefault(field.name, []).append(column)
        arrays = {name: np.concatenate(column) for name, column in columns.items()}
        return cls(**arrays, formats=formats, unreadable=unreadable)


def open_tokenizer(name: str | None, context_length: int | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: a local tokenizer.json or a folder with one; or an open_clip model; None: CLIP's tokenizer.
        context_length: maximum number of tokens of a text; None: the model's.

    Raises: ValueError if there is none of this name.
    """
    if name is not None and os.path.exists(name):
        return tokenizer_of(path=name, context_length=context_length)
    if name is not None and open_clip.get_model_config(name) is None:
        raise ValueError(
            f"--tokenizer {name!r}: no such file or folder, nor a model of open_clip; expected a tokenizer.json, a folder "
            "with one, or a model such as ViT-B-32"
        )
    return tokenizer_of(name, context_length=context_length)


def measure_tar(task: Task, index_dir: str | None, caption: str, tokenizer: str | None) -> Measured:
    """Measure samples of one tar.

    Args:
        task: the tar and its samples.
        index_dir: folder or address of the indexes; None: beside the tars.
        caption: caption field, `txt` or `json.<path>`.
        tokenizer: see `open_tokenizer`.

    Raises: ValueError if the tar or the tokenizer cannot be opened; OSError.
    """
    path, row, first, ids = task
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # the processes share the cores
    shards = open_tar(path, index_dir, row)
    tokenize = counting_tokenizer(tokenizer)
    images: list[tuple[int, int, int]] = []
    captions: list[tuple[int, int, int]] = []
    formats: Counter[str] = Counter()
    unreadable: Counter[str] = Counter()
    for sample in ids.tolist():
        try:
            image = _image_of(shards, sample - first)
        except BadSample:
            unreadable["images"] += 1
        else:
            if image is not None:
                images.append(image[1:])
                formats[image[0]] += 1
        try:
            texts = _captions_of(shards, sample - first, caption)
            captions += [(_num_tokens(tokenize, text), hash64(text), sample) for text in texts]
        except BadSample:
            unreadable["captions"] += 1
    widths, heights, sizes = zip(*images) if images else ((), (), ())
    tokens, hashes, samples = zip(*captions) if captions else ((), (), ())
    return Measured(
        widths=np.array(widths, np.int32),
        heights=np.array(heights, np.int32),
        image_bytes=np.array(sizes, np.int64),
        tokens=np.array(tokens, np.int32),
        hashes=np.array(hashes, np.uint64),
        samples=np.array(samples, np.int64),
        formats=formats,
        unreadable=unreadable,
    )


@lru_cache(maxsize=1)
def counting_tokenizer(name: str | None) -> Tokenizer:
    """Return a tokenizer that cuts texts at `MAX_TOKENS`, so that longer texts than the model's are told apart."""
    return open_tokenizer(name, MAX_TOKENS)


def _image_of(shards: Shards, sample: int) -> tuple[str, int, int, int] | None:
    """Return (format, width, height, encoded bytes) of a sample's image; None without one. Raises: BadSample; OSError."""
    if shards.member(sample, IMAGE_EXTENSIONS) is None:
        return None
    data = shards.read(sample, IMAGE_EXTENSIONS)
    image = open_image(data)
    name = image.format or ""
    return _FORMATS.get(name, name.lower()), image.width, image.height, len(data)


def _captions_of(shards: Shards, sample: int, field: str) -> list[str]:
    """Return a sample's captions; none without the member. Raises: BadSample; OSError."""
    if shards.member(sample, (field.partition(".")[0],)) is None:
        return []
    return read_captions(shards, sample, field)


def _num_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Return the length of a text in tokens. Raises: BadSample if the tokenizer refuses it."""
    try:
        return int(tokenizer([text])[1][0])
    except ValueError as error:
        raise BadSample(str(error)) from error
