"""Samples that are files of their own: class folders, images with texts beside them, tables of paths, and COCO's captions."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mmpretrain.data.coco import read_coco
from mmpretrain.data.decode import BadSample
from mmpretrain.data.image_root import ImageRoot
from mmpretrain.data.pairs import Table, read_pairs, row_json
from mmpretrain.data.plain_file import read_file
from mmpretrain.data.source import Fingerprint, check_field_size, field_limit
from mmpretrain.data.storage import open_regular
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS

_SAMPLED_BYTES = 1 << 12


class FileSource:
    """Random access to images in files of their own, such as `data_tools build` reads; a `SampleSource`.

    `path` is one of:

    - a folder of class folders, `CLASS/IMAGE.jpg`: `json.label` is the name of the folder, and `cls` its number among the
      sorted names, as in torchvision's `ImageFolder`;
    - a folder of images, each with a text of the same name beside it (`a.jpg`, `a.txt`): the field `txt`;
    - a table (.csv, .tsv, .jsonl or .parquet) with a column of paths: `json.<column>`, and the fields of the columns below;
    - COCO's `captions_*.json`: `json.caption` holds all captions of an image.

    A row that cannot be used is a sample that is refused when it is read. Small sets alone: all rows are in memory, and a
    file is opened for each sample. `python -m data_tools build` makes tars of the same data, for training at scale.

    Args:
        path: the folder or file.
        root: folder of a relative path.
        images: folder of the images' paths, relative to `root`; null: the folder of the table. Paths may not leave it.
        image: column of the paths; null: samples without images.
        caption: column of the captions, the field `txt`; null: none. Name a column of lists as `json.<column>`.
        label: column of the labels, the field `cls`: integers as they are, or else the number of the text among the
            sorted texts; null: none.
        key: column that names the samples; null: the image's path.
        merge: rows of one image are one sample, whose captions are the list `json.<caption>`.

    Raises: ValueError if `path` is none of these, is empty or lacks a column.
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        images: str | None = None,
        image: str | None = "image",
        caption: str | None = "caption",
        label: str | None = None,
        key: str | None = None,
        merge: bool = False,
    ) -> None:
        self._path = Path(os.path.join(root or "", path))
        is_coco = self._path.suffix == ".json" and not self._path.is_dir()
        table = read_coco(self._path, "path") if is_coco else read_pairs(self._path, "path")
        if is_coco or self._path.is_dir():
            # The columns have names of their own.
            image, label = "image", "label" if table.has_class_folders else None
            caption, key = None if table.has_class_folders else "caption", "key" if is_coco else None
        for argument, column in (("image", image), ("caption", caption), ("label", label), ("key", key)):
            if column is not None:
                table.require(column, f"{argument} (or null)")
        self._image, self._caption, self._label, self._key = image, caption, label, key
        folder = table.folder if images is None else Path(os.path.join(root or "", images))
        if not folder.is_dir():
            raise ValueError(f"images is {str(folder)!r}, which is no folder; expected that of the paths in {path!r}")
        self._root = ImageRoot(folder, hint="give the folder of all images as `images`")
        self._rows = _rows(table)
        if merge:
            self._rows = _merged(self._rows, image, caption)
        names = {str(_value(row, label)).strip() for row in self._rows if _value(row, label) is not None}
        names.discard("")
        is_named = table.has_class_folders or not all(name.isascii() and name.isdigit() for name in names)
        self.class_names: list[str] | None = sorted(names) if label is not None and is_named else None
        """Names of the classes in the order of their numbers; None without labels, or if the labels are numbers."""
        self._numbers = {name: str(number) for number, name in enumerate(self.class_names or ())}

    @property
    def num_samples(self) -> int:
        return len(self._rows)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of all rows, and of the size, beginning, middle and end of each image."""
        digest = hashlib.blake2b(digest_size=16)
        for sample_id, row in enumerate(self._rows):
            digest.update(row.encode() if isinstance(row, str) else row_json(row))
            digest.update(self._identity(sample_id))
        return Fingerprint.of([str(self._path)], [digest.digest()])

    def key(self, sample_id: int) -> str:
        """Return the value of the column of keys, or the image's path, or the sample's number. Raises: IndexError."""
        row = self._row(sample_id)
        names = [_value(row, self._key), _value(row, self._image)]
        return next((str(name) for name in names if isinstance(name, str | int) and name != ""), str(sample_id))

    def location(self, sample_id: int) -> str:
        """Return the table or folder."""
        return str(self._path)

    def read(self, sample_id: int, fields: Sequence[str]) -> bytes:
        """Return the first of `fields` that the sample has.

        Raises: IndexError; BadSample if it has none of them, its row cannot be used, or a file cannot be read.
        """
        row = self._row(sample_id)
        if isinstance(row, str):
            raise BadSample(row, "column")
        for field in fields:
            if (data := self._field(row, field)) is not None:
                check_field_size(field, len(data))
                return data
        wanted = "image" if fields[0] in IMAGE_EXTENSIONS else " or ".join(fields)
        raise BadSample(f"it has no {wanted} (its columns are {', '.join(row)})", "column")

    def _row(self, sample_id: int) -> dict[str, Any] | str:
        if not 0 <= sample_id < len(self._rows):
            raise IndexError(f"sample id {sample_id}, expected 0 to {len(self._rows) - 1}")
        return self._rows[sample_id]

    def _field(self, row: dict[str, Any], field: str) -> bytes | None:
        """Return the bytes of a field; None if the row has none."""
        if field == "json":
            return row_json(row)
        if field in IMAGE_EXTENSIONS:
            image = _value(row, self._image)
            return (
                read_file(self._root.locate(image), field_limit(field))[0] if isinstance(image, str) and image else None
            )
        value = _value(row, {"txt": self._caption, "cls": self._label}.get(field, field))
        if isinstance(value, list | dict):
            raise BadSample(
                f"its {field} is a {type(value).__name__}; name it as json.<column>, where a list is several texts",
                "column",
            )
        if value is None:
            return None
        return str(self._numbers.get(str(value).strip(), value) if field == "cls" else value).encode("utf-8", "replace")

    def _identity(self, sample_id: int) -> bytes:
        """Return bytes that change with an image's content: its size and three parts of it; its problem if there is one."""
        row = self._rows[sample_id]
        image = _value(row, self._image)
        if not isinstance(image, str):
            return b"\n"
        try:
            descriptor = open_regular(self._root.locate(image))
        except (OSError, ValueError) as error:
            return type(error).__name__.encode()
        try:
            size = os.fstat(descriptor).st_size
            starts = (0, max(0, size // 2 - _SAMPLED_BYTES // 2), max(0, size - _SAMPLED_BYTES))
            return b"".join([b"%d\n" % size, *(os.pread(descriptor, _SAMPLED_BYTES, start) for start in starts)])
        finally:
            os.close(descriptor)


def _value(row: dict[str, Any] | str, column: str | None) -> Any:
    """Return the value in a column; None for a refused row, and if there is no such column."""
    return None if column is None or isinstance(row, str) else row.get(column)


def _rows(table: Table) -> list[dict[str, Any] | str]:
    """Return the rows of a table in its order; a refused one is the reason. Files beside class folders are none."""
    refused = [] if table.has_class_folders else table.refused
    numbered: list[tuple[int, dict[str, Any] | str]] = [*zip(table.row_numbers, table.rows), *refused]
    return [row for _, row in sorted(numbered, key=lambda each: each[0])]


def _merged(rows: Sequence[dict[str, Any] | str], image: str | None, caption: str | None) -> list[dict[str, Any] | str]:
    """Return the first row of each image, with the captions of all its rows as a list. Raises: ValueError."""
    if image is None or caption is None:
        raise ValueError("merge is true; expected columns of images and captions")
    merged: dict[Any, dict[str, Any] | str] = {}
    for number, row in enumerate(rows):
        if isinstance(row, str):
            merged[number] = row
            continue
        first = merged.setdefault(str(row.get(image)), {**row, caption: []})
        assert isinstance(first, dict)
        texts = row.get(caption)
        first[caption] += texts if isinstance(texts, list) else [texts]
    return list(merged.values())
