"""Class lists: the mapping from labels to the class indexes in `cls`, and the file `classes.tsv`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.output import write_atomically
from mmpretrain.data.pairs import read_pairs

_INDEX = re.compile(r"0|[1-9][0-9]*")
_INDEX_DIGITS = 6
MAX_INTEGER_CLASSES = 10**_INDEX_DIGITS


@dataclass(frozen=True)
class Classes:
    """Class labels in the order of their indexes, and the text of each class ("" if there is none)."""

    labels: list[str]
    texts: list[str]


def one_line(text: str) -> str:
    """Replace each run of whitespace by one space, so that the text fits into a table's field."""
    return " ".join(text.split())


def read_classes(path: Path, column: str) -> Classes:
    """Read a class list: plain lines, or a column of a TSV (`column`, else `label`, else the first).

    The texts come from the TSV's column `text`, and the order from its column `index` if there is one.

    Raises: ValueError if the file cannot be read, has no labels, lists a label twice, or has other indexes than 0 to n - 1.
    """
    if not path.is_file():
        raise ValueError(f"--classes {str(path)!r}: no such file; expected one label a line, or a TSV with a header")
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes {str(path)!r}: not UTF-8 at byte {error.start}; convert it") from error
    if path.suffix == ".csv" and any("," in line for line in lines):
        raise ValueError(
            f"--classes {str(path)!r}: a table with commas; expected one label a line, or a TSV with a header"
        )
    if lines and "\t" in lines[0]:
        if path.suffix != ".tsv":
            raise ValueError(f"--classes {str(path)!r}: a table with tabs, expected the suffix .tsv; rename it")
        table = read_pairs(path)
        if table.refused:
            raise ValueError(f"--classes {str(path)!r}: row {table.refused[0][0]}: {table.refused[0][1]}; fix it")
        rows = _by_index(table.rows, path) if "index" in table.columns else table.rows
        named = [name for name in (column, "label") if name in table.columns]
        label_column = (named or table.columns)[0]
        labels = [one_line(row[label_column]) for row in rows]
        texts = [str(row.get("text") or "") for row in rows]
    else:
        labels = [one_line(line) for line in lines if line.strip()]
        texts = [""] * len(labels)
    twice = sorted({label for label in labels if labels.count(label) > 1}) if len(set(labels)) < len(labels) else []
    if twice or not labels:
        found = f"{twice[0]!r} is listed twice" if twice else "no label in it"
        raise ValueError(f"--classes {str(path)!r}: {found}; expected each label once")
    return Classes(labels, texts)


def _by_index(rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Return the rows in the order of their column `index`. Raises: ValueError unless it holds 0 to n - 1, each once."""
    by_index = {row["index"].strip(): row for row in rows}
    expected = [str(index) for index in range(len(rows))]
    if missing := [index for index in expected if index not in by_index]:
        raise ValueError(
            f"--classes {str(path)!r}: no row with index {missing[0]}; expected 0 to {len(rows) - 1}, each once, in its "
            "column index; fix it, or remove that column"
        )
    return [by_index[index] for index in expected]


def classes_of(labels: Sequence[str], are_names: bool) -> Classes:
    """Derive classes from a data set's labels. Integer labels are the indexes; other labels are sorted.

    Integers of `MAX_INTEGER_CLASSES` or more are left out. With `are_names`, such as of folders, integers are no indexes,
    but sorted by value: 9, 2019, 2021.
    """
    distinct = set(labels)
    are_integers = all(_INDEX.fullmatch(label) for label in distinct)
    if are_integers and are_names:
        ordered = sorted(distinct, key=lambda label: (len(label), label))
    elif are_integers:
        # Check the number of digits first: Python refuses to convert thousands of digits.
        highest = max((int(label) for label in distinct if len(label) <= _INDEX_DIGITS), default=-1)
        ordered = [str(index) for index in range(highest + 1)]
    else:
        ordered = sorted(distinct)
    return Classes(ordered, [""] * len(ordered))


def write_classes(path: Path, classes: Classes, labels: Sequence[str], captions: Sequence[str]) -> None:
    """Write `classes.tsv`: index, label, count and text. A caption shared by all of a class's samples is its text."""
    counts = dict.fromkeys(classes.labels, 0)
    shared: dict[str, set[str]] = {label: set() for label in classes.labels}
    for label, caption in zip(labels, captions):
        counts[label] += 1
        if len(shared[label]) < 2:
            shared[label].add(caption)
    lines = ["index\tlabel\tcount\ttext\n"]
    for index, (label, text) in enumerate(zip(classes.labels, classes.texts)):
        if len(shared[label]) == 1:
            text = one_line(next(iter(shared[label])))
        lines.append(f"{index}\t{label}\t{counts[label]}\t{text}\n")
    write_atomically(path, lines)
