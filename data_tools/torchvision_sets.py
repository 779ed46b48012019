"""Tables of torchvision's classification data sets: paths of image files, or PNG files made of arrays."""

import difflib
import inspect
import operator
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from data_tools.classes import Classes, one_line
from data_tools.pool import run_tasks
from mmpretrain.data.pairs import Table

_KEPT_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_UNREADABLE = (OSError, RuntimeError, ValueError)
"""Errors of torchvision for files that are missing or out of reach."""
_DAMAGED = (AssertionError, LookupError, TypeError, EOFError, pickle.UnpicklingError)
"""Errors of torchvision for the content of files."""


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
    paths: dict[int, Path | None] = {}
    labels: dict[int, int] = {}
    refused: list[tuple[int, str]] = []
    with _recorded_files() as files:
        read = partial(_read_sample, data, name, files, folder)
        samples = run_tasks(read, range(1, len(data) + 1), 1, f"reading {name}")
        for number, (problem, path, label) in enumerate(samples, start=1):
            if problem is None and paths and (path is None) != (next(iter(paths.values())) is None):
                problem = "expected an image file or an array, as of the set's first sample"
            if problem is None:
                paths[number], labels[number] = path, label
            else:
                refused.append((number, problem))

    own_names = _class_names(data)
    num_classes = max(len(own_names), 1 + max(labels.values(), default=-1))
    by_index, classes = _name_classes(own_names, num_classes, names, name)
    root = Path(os.path.abspath(root.expanduser()))
    table = Table(["image", "label"], folder if None in paths.values() else root, refused=refused)
    for number, path in paths.items():
        image = f"{number:08d}.png" if path is None else os.path.relpath(path, root)
        table.add(number, {"image": image, "label": by_index[labels[number]]})
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

    kinds = {each: getattr(datasets, each) for each in datasets.__all__ if each != "VisionDataset"}
    kind = kinds.get(name)
    if not isinstance(kind, type):
        near = [each for each in kinds if difflib.get_close_matches(name.lower(), [each.lower()], cutoff=0.8)]
        suggestion = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"--torchvision {name!r}: no such data set; {suggestion}expected a class of torchvision.datasets, such as "
            "CIFAR10, Flowers102 or EuroSAT"
        )
    options = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {"root": str(root)} | _split_argument(name, split, options)
    needed = [
        each.name for each in options.values() if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    ]
    if "root" not in options or not set(needed) <= arguments.keys():
        missing = ", ".join(f"`{each}`" for each in needed if each not in arguments) or "no folder"
        fix = "name a --split" if needed == ["root", "split"] else "name a set for classification"
        raise ValueError(f"--torchvision {name!r}: torchvision reads it with {missing}; {fix}")
    bases = [base for base in kind.__mro__ if issubclass(base, datasets.VisionDataset)]
    can_download = any("download" in inspect.signature(base).parameters for base in bases)
    problem: Exception | None = None
    for download in ({}, {"download": True}) if can_download else ({},):
        try:
            return kind(**arguments, **download)
        except ModuleNotFoundError as error:
            fix = f"pip install {error.name}"
            raise ValueError(f"--torchvision {name!r}: torchvision reads it with {error.name}: {fix}") from error
        except _UNREADABLE as error:
            if split is not None and "Unknown value" in str(error):
                raise ValueError(f"--torchvision {name!r} --split {split!r}: {error}") from error
            if "pip install" in str(error):
                raise ValueError(f"--torchvision {name!r}: {error}") from error
            problem = error
        except _DAMAGED as error:
            told = " ".join(f"{type(error).__name__} {error}".split())
            raise ValueError(
                f"--torchvision {name!r}: a file of it in --root {str(root)!r} is damaged ({told}); remove its folder there, "
                "and run the command again"
            ) from error
    fix = "run the command where there is a network, and copy that folder" if can_download else "put its files there"
    also = ", nor downloaded to there" if can_download else ""
    raise ValueError(f"--torchvision {name!r}: cannot be read from --root {str(root)!r}{also} ({problem}); {fix}")


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


def _read_sample(
    data: Any, name: str, files: list[Path], folder: Path, number: int
) -> tuple[str | None, Path | None, int]:
    """Read the sample of a number from 1; without a file that is kept, write its image to `folder`.

    Returns: the reason for refusing it, or None; its file, or None; its class index.
    Raises: ValueError for a set that is not for classification.
    """
    files.clear()
    try:
        sample = data[number - 1]
    except OSError as error:
        return str(error), None, -1
    image, label = sample if isinstance(sample, tuple) and len(sample) == 2 else (None, None)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"--torchvision {name!r}: its samples are not images with a class; name a set for classification"
        )
    if label is None:
        return "no class", None, -1
    try:
        class_index = operator.index(label)
    except TypeError as error:
        kind = type(label).__name__
        raise ValueError(
            f"--torchvision {name!r}: its labels are of type {kind}; name a set for classification"
        ) from error
    if class_index < 0:
        return f"class index {class_index}; expected at least 0", None, -1
    path = next((file for file in files if file.suffix.lower() in _KEPT_SUFFIXES), None)
    if path is None:
        image.save(folder / f"{number:08d}.png")
    return None, path, class_index


@contextmanager
def _recorded_files() -> Iterator[list[Path]]:
    """List the files that Pillow opens. Those that shards keep are not decoded: a single pixel takes their place.

    Torchvision has no public name for the file of a sample, but all of its sets open it with Pillow.
    """
    files: list[Path] = []
    real_open = Image.open

    def open_file(file: Any, *arguments: Any, **options: Any) -> Image.Image:
        path = Path(file if isinstance(file, str | os.PathLike) else getattr(file, "name", ""))
        files.append(path)
        if path.suffix.lower() in _KEPT_SUFFIXES:
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
