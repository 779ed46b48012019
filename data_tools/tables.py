"""Pairs as a user brings them: TSV, CSV, JSONL or Parquet with a path and captions a row, or a folder."""

import csv
import difflib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif")
_FIELD = re.compile(r'("(?:[^"]|"")*"|[^"\t\r\n]*)(\t|\r?\n|\Z)')


@dataclass
class Table:
    """Rows of one set of columns; `row_numbers` counts from 1 as the file does, without its header.

    `refused` holds (row number, reason) of the rows that could not be read; paths are relative to `folder`.
    """

    columns: list[str]
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    row_numbers: list[int] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)

    def require(self, column: str, option: str) -> None:
        """Raises ValueError, listing the columns, where there is none of this name."""
        if column not in self.columns:
            near = difflib.get_close_matches(column, self.columns, n=1, cutoff=0.5)
            suggestion = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{option} {column!r}: no such column; {suggestion}the columns are {', '.join(self.columns)}"
            )


def read_pairs(path: Path) -> Table:
    """Reads a table by its suffix, or a folder of images with `.txt` beside (columns `image`, `caption`).

    Raises ValueError for an unknown suffix, a file that cannot be read as what it says, or an empty one.
    """
    if path.is_dir():
        table = _read_folder(path)
    elif not path.exists():
        raise ValueError(
            f"pairs {str(path)!r}: no such file; expected a .tsv, .csv, .jsonl or .parquet file or a folder"
        )
    elif path.suffix in _READERS:
        try:
            table = _READERS[path.suffix](path)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: not UTF-8 at byte {error.start}; convert it, e.g. with iconv -t utf-8"
            ) from error
    else:
        expected = "a folder or a file in " + ", ".join(_READERS)
        raise ValueError(f"pairs {str(path)!r}: unknown kind {path.suffix!r}; expected {expected}")
    if not table.rows and not table.refused:
        what = "images" if path.is_dir() else "rows"
        raise ValueError(f"pairs {str(path)!r}: no {what} in it; expected at least one")
    return table


def _read_folder(path: Path) -> Table:
    table = Table(columns=["image", "caption"], folder=path)
    images = (file for file in path.rglob("*") if file.suffix[1:].lower() in _IMAGE_SUFFIXES)
    for number, image in enumerate(sorted(images), start=1):
        beside = image.with_suffix(".txt")
        if beside.is_file():
            caption = beside.read_text(encoding="utf-8")
            table.rows.append({"image": image.relative_to(path).as_posix(), "caption": caption})
            table.row_numbers.append(number)
        else:
            table.refused.append((number, f"{image.relative_to(path)}: no {beside.name} beside it"))
    return table


def _read_tsv(path: Path) -> Table:
    text = path.read_bytes().decode("utf-8-sig")
    if is_quoted_tsv(text):
        return _from_records(csv.reader(io.StringIO(text, newline=""), delimiter="\t"), path)
    # Not str.splitlines, which also cuts at characters that captions may hold, such as U+2028.
    return _from_records((line.removesuffix("\r").split("\t") for line in text.split("\n")), path)


def is_quoted_tsv(text: str) -> bool:
    """Whether a TSV is quoted as CSV is; most are not, and their captions may hold quotation marks.

    It is if every field with a quotation mark is well quoted, and either all of the header's fields are, or some
    field needed it: for doubled quotation marks, or for a tab or line end without which the rows come out uneven.
    """
    if '"' not in text:
        return False
    lines = [line for line in text.split("\n") if line.strip("\r")]
    uneven = any(line.count("\t") != lines[0].count("\t") for line in lines)
    needing = '"\t\n' if uneven else '"'
    in_header = header_quoted = True
    needed = False
    position = 0
    while position < len(text):
        match = _FIELD.match(text, position)
        if match is None:
            return False
        value, separator = match.groups()
        if in_header:
            header_quoted = header_quoted and value.startswith('"')
            in_header = separator == "\t"
        needed = needed or (len(value) > 2 and value[0] == '"' and any(mark in value[1:-1] for mark in needing))
        position = match.end()
    return header_quoted or needed


def _read_csv(path: Path) -> Table:
    return _from_records(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True), path)


def _from_records(records: Iterable[Sequence[str]], path: Path) -> Table:
    iterator = iter(records)
    try:
        columns = list(next(iterator, []))
        if len(set(columns)) < len(columns):
            raise ValueError(f"{path}: its header names a column twice ({', '.join(columns)}); rename one")
        table = Table(columns=columns, folder=path.parent)
        for number, values in enumerate(iterator, start=1):
            if len(values) == len(columns):
                table.rows.append(dict(zip(columns, values)))
                table.row_numbers.append(number)
            elif any(values):
                table.refused.append((number, f"{len(values)} fields, the header has {len(columns)}"))
    except csv.Error as error:
        raise ValueError(
            f"{path}: not a readable table ({error}); expected one record a line, quoted as RFC 4180"
        ) from error
    return table


def _read_jsonl(path: Path) -> Table:
    columns: dict[str, None] = {}  # an ordered set
    table = Table(columns=[], folder=path.parent)
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            table.refused.append((number, f"not JSON ({error})"))
            continue
        if isinstance(row, dict):
            columns |= dict.fromkeys(row)
            table.rows.append(row)
            table.row_numbers.append(number)
        else:
            table.refused.append((number, f"{type(row).__name__}, expected a JSON object"))
    table.columns = list(columns)
    return table


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    return Table(list(file.schema_arrow.names), path.parent, rows, list(range(1, len(rows) + 1)))


_READERS = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def caption_text(row: dict[str, Any], columns: Sequence[str]) -> str:
    """The row's caption columns joined by ", ", empty ones left out; a list counts as its items."""
    return ", ".join(part for column in columns for part in _parts(row.get(column)))


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, str) and value.strip():
        yield value.strip()
    elif isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value)):
        yield str(value)


def row_json(row: dict[str, Any]) -> bytes:
    """A row as one JSON object; what JSON has no word for becomes text, NaN null, bytes their number."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, bytes):
            return f"{len(value)} bytes"
        return value if value is None or isinstance(value, str | int | float) else str(value)

    return json.dumps(plain(row), ensure_ascii=False).encode("utf-8", "replace")
