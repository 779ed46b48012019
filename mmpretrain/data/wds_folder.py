"""Folders of one data set each in the WebDataset layout of CLIP_benchmark, which publishes its data sets so."""

from dataclasses import dataclass
from pathlib import Path

from mmpretrain import files

_NUM_SHARDS = "nshards.txt"
_TYPE = "dataset_type.txt"
_CLASSES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_PREFIX = "wds_"


@dataclass(frozen=True)
class WdsFolder:
    """Content of a folder: paths of tars, and the fields of a sample that hold its captions or its class."""

    test: list[str]
    train: list[str] | None
    """Tars of the training split; None if there is none."""
    caption: str | None
    label: str | None
    classes: str | None
    """File with one class name a line; None if there is none."""
    templates: list[str] | None
    """Prompts with {} for the class's name; None if there are none."""


def read_wds_folder(path: Path) -> WdsFolder:
    """Read what a folder says of its data set. Tars are not opened.

    The folder has `test/nshards.txt` and `test/0.tar`, `1.tar` and so on; `train/` likewise, if there is a training split;
    and either `dataset_type.txt` with the word `retrieval`, where a sample's `txt` has a caption a line, or
    `classnames.txt` and `zeroshot_classification_templates.txt` (with `{c}` for the name), where `cls` is the index of the
    class.

    Raises: ValueError for another kind of data set, and for a file that is missing or malformed.
    """
    if not path.is_dir():
        raise ValueError(
            f"{str(path)!r} is no folder; expected one of this machine with test/0.tar and test/{_NUM_SHARDS}"
        )
    kind = type_of(path)
    if kind not in ("classification", "retrieval"):
        raise ValueError(f"{path / _TYPE} says {kind!r}; expected classification or retrieval; leave the data set out")
    train = _shards(path / "train") if (path / "train" / _NUM_SHARDS).exists() else None
    if kind == "retrieval":
        return WdsFolder(_shards(path / "test"), train, "txt.lines", None, None, None)
    classes, templates = path / _CLASSES, path / _TEMPLATES
    if classes.exists():
        _lines(classes)  # an empty line would shift the classes behind it
    return WdsFolder(
        test=_shards(path / "test"),
        train=train,
        caption=None,
        label="cls",
        classes=str(classes) if classes.exists() else None,
        templates=_templates(templates) if templates.exists() else None,
    )


def type_of(path: Path) -> str:
    """Return the type of a folder's data set, such as `retrieval`; `classification` if the folder does not say it."""
    file = path / _TYPE
    return files.read_text(file, files.MAX_LIST_BYTES).strip().lower() if file.exists() else "classification"


def folders_of_suite(path: Path) -> dict[str, Path]:
    """Return the data sets' folders in a folder, by the names of the data sets, which lack the prefix `wds_`.

    Raises: ValueError if there are none.
    """
    if not path.is_dir():
        raise ValueError(
            f"suite is {str(path)!r}, which is no folder of this machine; expected one with folders wds_NAME"
        )
    found = {
        folder.name.removeprefix(_PREFIX): folder
        for folder in sorted(path.iterdir())
        if folder.is_dir() and (folder.name.startswith(_PREFIX) or (folder / "test" / _NUM_SHARDS).exists())
    }
    if not found:
        raise ValueError(f"suite is {str(path)!r}, where no folder is called wds_NAME or has test/{_NUM_SHARDS}")
    return found


def _shards(split: Path) -> list[str]:
    """Return the paths of a split's tars. Raises: ValueError if one is missing."""
    file = split / _NUM_SHARDS
    text = files.read_text(file, files.MAX_LIST_BYTES).strip() if file.exists() else "no such file"
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"{file}: {text[:40]!r}; expected the number of tars beside it, at least 1")
    paths = [split / f"{number}.tar" for number in range(int(text))]
    if missing := next((path for path in paths if not path.exists()), None):
        raise ValueError(
            f"{missing}: no such file; expected {len(paths)} tars, as {file} says: fetch the data set again"
        )
    return [str(path) for path in paths]


def _templates(path: Path) -> list[str]:
    for number, line in enumerate(lines := _lines(path), start=1):
        if "{c}" not in line:
            raise ValueError(f"{path}: line {number} is {line!r}; expected {{c}} in it for the name of the class")
    return [line.replace("{c}", "{}") for line in lines]


def _lines(path: Path) -> list[str]:
    """Return the lines of a file. Raises: ValueError if one is empty, or the file is."""
    lines = [line.strip() for line in files.read_text(path, files.MAX_LIST_BYTES).splitlines()]
    if not lines or not all(lines):
        raise ValueError(f"{path}: line {lines.index('') + 1 if lines else 1} is empty; expected one entry a line")
    return lines
