"""Conversion of table rows to samples with a key, image file, caption and label, or to refusals."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.classes import Classes, one_line
from data_tools.tables import SURROGATE, Table, caption_texts, row_json
from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import MAX_CAPTION_CHARACTERS


@dataclass(frozen=True)
class Sample:
    """Accepted row; `row_number` counts from 1 in the table."""

    key: str
    path: Path
    caption: str
    label: str | None
    json: bytes
    row_number: int


@dataclass(frozen=True)
class Refusal:
    row_number: int
    image: str
    reason: str


@dataclass(frozen=True)
class ImageRoot:
    """Folder that a table's image paths are relative to. Paths may leave it only with `allow_outside`.

    Symbolic links inside the folder may lead outside: they come from the folder's owner, not from the table's author.
    """

    folder: Path
    allow_outside: bool = False

    @cached_property
    def _prefix(self) -> str:
        return f"{os.path.abspath(self.folder).rstrip('/')}/"

    def locate(self, image: str) -> Path:
        """Return the file of an image path. Raises: BadSample if it is outside of the folder."""
        if "\0" in image:  # some versions of normpath truncate the path there
            raise BadSample("no such file (its path has a NUL byte)")
        # The normalised path is also the one opened: `..` after a symbolic link would lead elsewhere.
        path = os.path.normpath(os.path.join(self.folder, image))
        if not self.allow_outside and not f"{os.path.abspath(path)}/".startswith(self._prefix):
            raise BadSample(
                f"its path leaves {str(self.folder)!r}: name the images' folder with --image-root, or trust the "
                "table with --allow-outside"
            )
        return Path(path)


def accept_rows(
    table: Table,
    root: ImageRoot,
    image_column: str,
    caption_columns: Sequence[str],
    label_column: str | None,
    classes: Classes | None,
) -> tuple[list[Sample], list[Refusal]]:
    """Convert rows to samples. A sample needs a path in `root`, a caption and, with `label_column`, a known label.

    Keys come from the column `key` if its values are valid (see `key_problem`), else from the row numbers.

    Returns: samples, and refusals with the reason for each other row.
    """
    use_keys = "key" in table.columns and key_problem(table) is None
    known = set(classes.labels) if classes else None
    samples = []
    refused = [Refusal(number, "", reason) for number, reason in table.refused]
    for row, number in zip(table.rows, table.row_numbers):
        image = row.get(image_column)
        try:
            if not isinstance(image, str) or not image:
                raise BadSample(f"no path in column {image_column!r}")
            caption = _caption(row, caption_columns)
            label = _label(row, label_column, known) if label_column is not None else None
            key = str(row["key"]) if use_keys else f"{number:08d}"
            samples.append(Sample(key, root.locate(image), caption, label, row_json(row), number))
        except BadSample as error:
            refused.append(Refusal(number, str(image or ""), str(error)))
    return samples, refused


def _caption(row: dict[str, Any], columns: Sequence[str]) -> str:
    """Return the row's caption, the first good one of a list. Raises: BadSample if there is none."""
    captions = caption_texts(row, columns)
    if not captions:
        raise BadSample(f"no caption: {', '.join(columns)} empty")
    problems = [_caption_problem(caption) for caption in captions]
    if None not in problems:
        raise BadSample(f"the caption {problems[0]}")
    return captions[problems.index(None)]


def _caption_problem(caption: str) -> str | None:
    if SURROGATE.search(caption):
        return "is no valid Unicode: it has half a surrogate pair"
    if "\0" in caption:
        return "has NULs, as UTF-16 has; convert it to UTF-8"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return f"has {len(caption)} characters, more than the limit of {MAX_CAPTION_CHARACTERS}"
    return None


def _label(row: dict[str, Any], column: str, known: set[str] | None) -> str:
    """Return the row's label on one line. Raises: BadSample if it is empty, not valid Unicode, or not in `known`."""
    value = row.get(column)
    label = "" if value is None else one_line(str(value))
    if not label:
        raise BadSample(f"no label in column {column!r}")
    if SURROGATE.search(label):
        raise BadSample("the label is no valid Unicode: it has half a surrogate pair")
    if known is not None and label not in known:
        raise BadSample(f"label {label!r} is not in the class list")
    return label


def key_problem(table: Table) -> str | None:
    """Return the reason why the column `key` cannot be used as keys; None if it can, or if there is no such column."""
    if "key" not in table.columns:
        return None
    seen = set()
    for row in table.rows:
        key = row.get("key")
        if not isinstance(key, str | int) or not str(key):
            return f"a key is {key!r}"
        # The name of a member is KEY.EXTENSION, at most 100 bytes; a key ends at the first dot.
        if re.search(r"[./\x00-\x1f\ud800-\udfff]|^__.*__$", str(key)) or len(str(key).encode()) > 90:
            return f"the key {key!r} has a dot, a slash or control characters, or is over 90 bytes long"
        if str(key) in seen:
            return f"the key {key!r} occurs twice"
        seen.add(str(key))
    return None
