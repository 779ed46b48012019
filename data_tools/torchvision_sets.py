"""Tables of torchvision's classification data sets: paths of image files, or PNG files made of arrays."""

import difflib
import inspect
import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from data_tools.classes import Classes, one_line
from data_tools.tables import Table
from mmpretrain.data.decode import BadSample

_KEPT_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_UNREADABLE = (OSError, RuntimeError, ValueError)
"""Errors of torchvision for files that are missing, damaged or out of reach."""


def read_torchvision(
    name: str, root: Path, split: str | None, names: Classes | None, folder: Path
) -> tuple[Table, Classes, bool]:
    """Read a data set below `root`; a missing one is downloaded to there first.

    JPEG, PNG and WebP files stay where they are. Other images, such as CIFAR's arrays, are written to `folder` as
    lossless PNG. The columns are `image` and `label`.

    Args:
        name: class of `torchvision.datasets`.
        root: folder of torchvision's data sets.
        split: split of the set, as torchvision names it; None: its default.
        names: order of the classes, or other names by class index (see `_name_classes`); None: the set's own.
        folder: folder for PNG files.

    Returns: the table, the classes in the order of `cls`, and whether the set names them; its indexes are the labels if not.
    Raises: ValueError for an unknown set or split, a set that is not for classification, unusable names, or a failed
        download.
    """
    data = _open(name, root, split)
    root = Path(os.path.abspath(root.expanduser()))
    paths: dict[int, str] = {}
    labels: dict[int, int] = {}
    refused: list[tuple[int, str]] = []
    has_files: bool | None = None
    for number in range(1, len(data) + 1):
        try:
            path, image, labels[number] = _read_sample(data, number - 1, name)
            has_files = path is not None if has_files is None else has_files
            if has_files != (path is not None):
                raise BadSample("expected an image file as of the set's first sample, or an array as there")
            if path is None:
                image.save(folder / f"{number:08d}.png")
        except (BadSample, OSError) as error:
            refused.append((number, str(error)))
        else:
            paths[number] = f"{number:08d}.png" if path is None else os.path.relpath(path, root)

    own_names = _class_names(data)
    num_classes = max(len(own_names), 1 + max(labels.values(), default=-1))
    by_index, classes = _name_classes(own_names, num_classes, names, name)
    rows = [{"image": path, "label": by_index[labels[number]]} for number, path in paths.items()]
    table = Table(["image", "label"], root if has_files else folder, rows, list(paths), refused)
    return table, classes, bool(own_names)


def _name_classes(
    own: Sequence[str], num_classes: int, names: Classes | None, set_name: str
) -> tuple[Sequence[str], Classes]:
    """Return the label of each of the set's class indexes, and the classes in the order of `cls`.

    A list with all of the set's own names sets their order, as for tables; any other list names the indexes.

    Raises: ValueError if a class has no name, or not its own.
    """
    fix = "name the classes, one a line in the order of their indexes, with --classes names.txt"
    if names is not None and own and set(own) <= set(names.labels):
        return own, names
    if names is None:
        labels = list(own) or [str(index) for index in range(num_classes)]
        names = Classes(labels, [""] * len(labels))
    # A split of a set without names may lack the last classes.
    if len(names.labels) < num_classes or (own and len(names.labels) > num_classes):
        raise ValueError(f"--torchvision {set_name!r}: {len(names.labels)} names for {num_classes} classes; {fix}")
    twice = sorted({label for label in names.labels if names.labels.count(label) > 1})
    if twice:
        raise ValueError(f"--torchvision {set_name!r}: two classes are named {twice[0]!r}; {fix}")
    return names.labels, names


def _open(name: str, root: Path, split: str | None) -> Any:
    """Return the data set as torchvision reads it. Raises: ValueError."""
    from torchvision import datasets

    if name not in datasets.__all__ or not isinstance(getattr(datasets, name), type):
        near = difflib.get_close_matches(name.lower(), [each.lower() for each in datasets.__all__], n=1, cutoff=0.5)
        meant = [each for each in datasets.__all__ if [each.lower()] == near]
        suggestion = f"did you mean {meant[0]!r}? " if meant else ""
        raise ValueError(
            f"--torchvision {name!r}: no such data set; {suggestion}expected a class of torchvision.datasets, such as "
            "CIFAR10, Flowers102 or EuroSAT"
        )
    kind = getattr(datasets, name)
    options = inspect.signature(kind).parameters
    if not {"root", "download"} <= options.keys():
        raise ValueError(f"--torchvision {name!r}: torchvision cannot fetch it; build from its folder instead")
    arguments: dict[str, Any] = {"root": str(root)} | _split_argument(name, split, options)
    try:
        return kind(**arguments)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--torchvision {name!r}: torchvision reads it with {error.name}: pip install {error.name}"
        ) from error
    except _UNREADABLE as missing:
        if split is not None and "Unknown value" in str(missing):
            raise ValueError(f"--torchvision {name!r} --split {split!r}: {missing}") from missing
    try:
        root.mkdir(parents=True, exist_ok=True)
        return kind(**arguments, download=True)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--torchvision {name!r}: torchvision reads it with {error.name}: pip install {error.name}"
        ) from error
    except _UNREADABLE as error:
        raise ValueError(
            f"--torchvision {name!r}: cannot be read from --root {str(root)!r}, nor downloaded to there ({error}); run the "
            "command where there is a network, and copy that folder"
        ) from error


def _split_argument(name: str, split: str | None, options: Any) -> dict[str, Any]:
    """Return the argument that selects a split. Raises: ValueError if the set has no such split."""
    if split is None:
        return {}
    if "split" in options:
        return {"split": split}
    if "train" not in options:
        raise ValueError(f"--split {split!r}: {name} has no splits; leave it out, and hold out some of its shards")
    if split not in ("train", "test"):
        raise ValueError(f"--split {split!r}: {name} has the splits train and test")
    return {"train": split == "train"}


def _read_sample(data: Any, index: int, name: str) -> tuple[Path | None, Any, int]:
    """Return the file of a sample (None if it has none that is kept), its image and its class index.

    Raises: BadSample without a class; OSError for a missing file; ValueError for a set that is not for classification.
    """
    with _recorded_files() as files:
        sample = data[index]
    image, label = sample if isinstance(sample, tuple) and len(sample) == 2 else (None, None)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"--torchvision {name!r}: its samples are not images with a class; name a set for classification"
        )
    if label is None:
        raise BadSample("no class")
    try:
        class_index = operator.index(label)
    except TypeError as error:
        kind = type(label).__name__
        raise ValueError(
            f"--torchvision {name!r}: its labels are of type {kind}; name a set for classification"
        ) from error
    if class_index < 0:
        raise BadSample(f"class index {class_index}; expected at least 0")
    return next((file for file in files if file.suffix.lower() in _KEPT_SUFFIXES), None), image, class_index


@contextmanager
def _recorded_files() -> Iterator[list[Path]]:
    """List the files that Pillow opens. Those that shards keep are not decoded: a single pixel takes their place.

    A data set tells the file of a sample by no public name; but all of them open it with Pillow.
    """
    files: list[Path] = []
    real_open = Image.open

    def open_file(file: Any, *arguments: Any, **options: Any) -> Image.Image:
        files.append(Path(os.fsdecode(getattr(file, "name", file))))
        if files[-1].suffix.lower() in _KEPT_SUFFIXES:
            return Image.new("RGB", (1, 1))
        return real_open(file, *arguments, **options)

    with mock.patch.object(Image, "open", open_file):
        yield files


def _class_names(data: Any) -> list[str]:
    """Return the names of a set's classes, with synonyms joined as in ImageNet's; an empty list if it has none."""
    names = getattr(data, "classes", None) or getattr(data, "categories", None) or []
    return [
        one_line(", ".join(name) if isinstance(name, Sequence) and not isinstance(name, str) else str(name))
        for name in names
    ]
