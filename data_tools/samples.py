"""Conversion of table rows to samples with a key, image file, caption and label, or to refusals."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.classes import Classes, one_line
from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import MAX_CAPTION_CHARACTERS
from mmpretrain.data.image_root import ImageRoot
from mmpretrain.data.pairs import SURROGATE, Table, caption_texts, row_json


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
