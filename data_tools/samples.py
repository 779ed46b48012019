"""Rows of a table -> samples with a key, an image file, a caption and a label, and what is refused."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.classes import Classes, one_line
from data_tools.tables import SURROGATE, Table, caption_text, row_json


@dataclass(frozen=True)
class Sample:
    """One accepted row; `row_number` counts from 1 in the table."""

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
    image_column: str,
    caption_columns: Sequence[str],
    label_column: str | None,
    classes: Classes | None,
) -> tuple[list[Sample], list[Refusal]]:
    """Samples of the rows that have a path, a caption and, if asked for, a known label; the others' reasons.

    Keys come from the column `key` where it can name the samples, else they are the row numbers.
    """
    use_keys = "key" in table.columns and key_problem(table) is None
    known = set(classes.labels) if classes else None
    samples = []
    refused = [Refusal(number, "", reason) for number, reason in table.refused]
    for row, number in zip(table.rows, table.row_numbers):
        image = row.get(image_column)
        caption = caption_text(row, caption_columns)
        label = None
        reason = None
        if not isinstance(image, str) or not image:
            reason = f"no path in column {image_column!r}"
        elif not caption:
            reason = f"no caption: {', '.join(caption_columns)} empty"
        elif SURROGATE.search(caption):
            reason = "the caption is no valid Unicode: it has half a surrogate pair"
        if label_column is not None:
            value = row.get(label_column)
            label = "" if value is None else one_line(str(value))
            if not label:
                reason = reason or f"no label in column {label_column!r}"
            elif SURROGATE.search(label):
                reason = reason or "the label is no valid Unicode: it has half a surrogate pair"
            elif known is not None and label not in known:
                reason = reason or f"label {label!r} is not in the class list"
        if reason is not None:
            refused.append(Refusal(number, str(image or ""), reason))
            continue
        key = str(row["key"]) if use_keys else f"{number:08d}"
        samples.append(Sample(key, table.folder / str(image), caption, label, row_json(row), number))
    return samples, refused


def key_problem(table: Table) -> str | None:
    """Why the column `key` cannot name the samples; None where it can, or where there is none."""
    if "key" not in table.columns:
        return None
    seen = set()
    for row in table.rows:
        key = row.get("key")
        if not isinstance(key, str | int) or not str(key):
            return f"a key is {key!r}"
        # A member's name is KEY.EXTENSION in at most 100 bytes, and a key ends at the first dot.
        if re.search(r"[./\x00-\x1f\ud800-\udfff]|^__.*__$", str(key)) or len(str(key).encode()) > 90:
            return f"the key {key!r} has a dot, a slash or control characters, or is over 90 bytes long"
        if str(key) in seen:
            return f"the key {key!r} occurs twice"
        seen.add(str(key))
    return None
