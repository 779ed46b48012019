"""Readers of image-text pairs: TSV, CSV, JSONL or Parquet tables, or folders of images with text files."""

import codecs
import csv
import difflib
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import decode_text, is_visible
from mmpretrain.data.plain_file import read_file

SURROGATE = re.compile("[\ud800-\udfff]")
MAX_ROW_CHARACTERS = 1 << 24
MAX_DEPTH = 64
"""Maximum nesting depth of lists and objects in a row."""

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif")
_FIELD = re.compile(r'("[^"]*(?:""[^"]*)*"|[^"\t\r\n]*)(\t|\r?\n|\Z)')
_UNREADABLE = (ValueError, ArithmeticError, LookupError, TypeError, NotImplementedError)  # raised by pyarrow
_TOO_DEEP = f"lists or objects nested more than {MAX_DEPTH} deep"
_NOT_UTF8 = "not UTF-8; convert the table, e.g. with iconv -t utf-8"


@dataclass
class Table:
    """Table of rows with common columns.

    `row_numbers` holds each row's number in the file, from 1, without the header. `refused` holds (row number, reason)
    of the rows that could not be read. Paths are relative to `folder`. `has_class_folders` tells whether the rows are the
    images of class folders, with their folder's name in the column `label`, and without captions.
    """

    columns: list[str]
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    row_numbers: list[int] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    has_class_folders: bool = False

    def add(self, number: int, row: dict[str, Any] | str) -> None:
        """Add a row, or the reason for its refusal."""
        if isinstance(row, str):
            self.refused.append((number, row))
        else:
            self.rows.append(row)
            self.row_numbers.append(number)

    def require(self, column: str, option: str) -> None:
        """Raise ValueError, listing the columns, if there is no column of this name."""
        if column not in self.columns:
            near = difflib.get_close_matches(column, self.columns, n=1, cutoff=0.5)
            suggestion = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{option} {column!r}: no such column; {suggestion}the columns are {', '.join(self.columns)}"
            )


def read_pairs(path: Path, option: str = "pairs") -> Table:
    """Read a table in the format of its suffix, or a folder of images.

    Of images with `.txt` files the columns are `image` and `caption`. Images in class folders, none with a `.txt` beside it,
    have `image` and `label`; files beside the class folders are refused. Hidden files and folders are left out.

    Args:
        path: path of the table or folder.
        option: name of the option that holds the path, for messages.

    Raises: ValueError for an unknown suffix, a file that cannot be read in its format or is too large, or no rows.
    """
    if path.is_dir():
        table = _read_folder(path)
    elif not path.exists():
        raise ValueError(
            f"{option} {str(path)!r}: no such file; expected a .tsv, .csv, .jsonl or .parquet file or a folder"
        )
    elif path.suffix in _READERS:
        check_fits_memory(path)
        table = _READERS[path.suffix](path)
    else:
        expected = "a folder or a file in " + ", ".join(_READERS)
        raise ValueError(f"{option} {str(path)!r}: unknown kind {path.suffix!r}; expected {expected}{_hint(path)}")
    if not table.rows and not table.refused:
        what = "images" if path.is_dir() else "rows"
        raise ValueError(f"{option} {str(path)!r}: no {what} in it; expected at least one")
    if not table.columns:
        raise ValueError(f"{option} {str(path)!r}: every row is refused, the first because: {table.refused[0][1]}")
    return table


def _hint(path: Path) -> str:
    """Return what to do about a file of a kind that is often given."""
    hints = {
        ".json": "--coco reads captions of COCO",
        ".tar": f"training reads tars as they are: data.train.pairs.shards={path.absolute()}",
        ".zip": f"unpack it first: unzip {path}",
        ".tgz": f"unpack it first: tar xzf {path}",
        ".gz": f"unpack it first: {'tar xzf' if path.name.endswith('.tar.gz') else 'gunzip -k'} {path}",
    }
    return f"; {hints[path.suffix]}" if path.suffix in hints else ""


def check_fits_memory(path: Path) -> None:
    """Raise ValueError if a table exceeds a quarter of the memory; its rows take several times its size."""
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    if (num_bytes := path.stat().st_size) > limit:
        raise ValueError(f"{path}: {num_bytes} bytes; expected at most a quarter of the memory, {limit}; split it")


def _unless_deep(row: dict[str, Any]) -> dict[str, Any] | str:
    return _TOO_DEEP if _is_deeper(row, MAX_DEPTH) else row


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list | tuple):
        return False
    items = value.values() if isinstance(value, dict) else value
    return any(levels == 0 or _is_deeper(item, levels - 1) for item in items)


def _read_folder(path: Path) -> Table:
    files = sorted(_files_below(path))
    images = [file for file in files if file.suffix[1:].lower() in _IMAGE_SUFFIXES]
    captions = {file for file in files if file.suffix == ".txt"}
    if any(image.parent != path for image in images) and captions.isdisjoint(
        image.with_suffix(".txt") for image in images
    ):
        return _read_class_folders(path, images, [file for file in files if file.parent == path])
    table = Table(columns=["image", "caption"], folder=path)
    for number, image in enumerate(images, start=1):
        beside = image.with_suffix(".txt")
        try:
            if not beside.is_file():
                raise BadSample(f"no {beside.name} beside it")
            caption = _text_of(beside)
        except BadSample as error:
            table.add(number, f"{image.relative_to(path)}: {error}")
        else:
            table.add(number, {"image": image.relative_to(path).as_posix(), "caption": caption})
    return table


def _read_class_folders(path: Path, images: Sequence[Path], strays: Sequence[Path]) -> Table:
    table = Table(["image", "label"], path, has_class_folders=True)
    names = [image.relative_to(path) for image in images if image.parent != path]
    for number, name in enumerate(names, start=1):
        table.add(number, {"image": name.as_posix(), "label": name.parts[0]})
    for number, stray in enumerate(strays, start=len(names) + 1):
        table.add(number, f"{stray.name}: beside the class folders; expected images inside them")
    return table


def _files_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yield the files of a folder and of those below it, without hidden ones. Symbolic links to folders are followed.

    `above` identifies the folders that lead to this one: a link back to one of them is left out.
    """
    state = folder.stat()
    here = state.st_dev, state.st_ino
    if here in above:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path, above | {here})
        else:
            yield path


def _text_of(path: Path) -> str:
    """Return the content of a text file, without a byte order mark, and with line ends as "\\n". Raises: BadSample."""
    try:
        data = read_file(path, MAX_ROW_CHARACTERS)[0]
    except BadSample as error:
        raise BadSample(f"{path.name}: {error}") from error
    text = decode_text(data.removeprefix(codecs.BOM_UTF8), path.name)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_text(path: Path) -> tuple[str, bool]:
    """Return a table's text, and True if all of it is UTF-8; invalid bytes become lone surrogates."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", "surrogateescape"), False


def _read_tsv(path: Path) -> Table:
    text, is_utf8 = _read_text(path)
    if is_quoted_tsv(text):
        return _from_quoted(text, path, is_utf8, delimiter="\t")
    # str.splitlines would also split at characters that captions may contain, such as U+2028.
    return _from_records((line.removesuffix("\r").split("\t") for line in text.split("\n")), path, is_utf8)


def is_quoted_tsv(text: str) -> bool:
    """Return True if a TSV is quoted like CSV. Most are not, and their captions may contain quotation marks.

    A TSV counts as quoted if all fields of its header are quoted. It also does if every field with a quotation mark is
    well quoted and at least one field needs the quotes: for a doubled quotation mark, or, if lines differ in their
    number of tabs, for a tab or line end.
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
            return header_quoted and not in_header
        value, separator = match.groups()
        if in_header:
            header_quoted = header_quoted and value.startswith('"')
            in_header = separator == "\t"
        needed = needed or (len(value) > 2 and value[0] == '"' and any(mark in value[1:-1] for mark in needing))
        position = match.end()
    return header_quoted or needed


def _read_csv(path: Path) -> Table:
    text, is_utf8 = _read_text(path)
    return _from_quoted(text, path, is_utf8, delimiter=",")


def _from_quoted(text: str, path: Path, is_utf8: bool, delimiter: str) -> Table:
    limit = csv.field_size_limit(sys.maxsize)  # `_from_records` checks the length of rows
    try:
        return _from_records(_quoted_records(text, delimiter), path, is_utf8)
    finally:
        csv.field_size_limit(limit)


def _quoted_records(text: str, delimiter: str) -> Iterator[list[str] | str]:
    """Yield the records of a quoted table. A line that begins no valid record yields the reason instead.

    After an error, parsing resumes at the next line. The parse from a line on depends only on the state at its start:
    inside quotation marks or not. Lines that led to an error from inside quotation marks are not parsed from that state
    again, so the time is linear in the length of the text.
    """
    lines = list(io.StringIO(text, newline=""))
    begin = 0  # first line of the record
    hopeless = 0  # inside quotation marks, the lines from `begin` up to this one lead to `failure`
    failure = csv.Error()

    def following() -> Iterator[str]:
        for number in range(begin, len(lines)):
            if begin < number < hopeless:
                raise failure
            yield lines[number]

    while begin < len(lines):
        first = begin
        reader = csv.reader(following(), delimiter=delimiter, strict=True)
        try:
            for values in reader:
                begin = first + reader.line_num  # before the reader requests another line
                yield values
            return
        except csv.Error as error:
            if first + reader.line_num > hopeless:
                hopeless, failure = first + reader.line_num, error
            yield f"not a record of a quoted table ({error})"
            begin += 1


def _from_records(records: Iterable[Sequence[str] | str], path: Path, is_utf8: bool) -> Table:
    iterator = iter(records)
    columns = next(iterator, [])
    if isinstance(columns, str):
        raise ValueError(f"{path}: its header is {columns}; expected names of columns, quoted as RFC 4180")
    if any(SURROGATE.search(column) for column in columns):
        raise ValueError(f"{path}: its header is {_NOT_UTF8}")
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path}: its header names a column twice ({', '.join(columns)}); rename one")
    table = Table(columns=list(columns), folder=path.parent)
    for number, values in enumerate(iterator, start=1):
        if isinstance(values, str):
            table.add(number, values)
        elif len(values) != len(columns):
            if any(values):
                table.add(number, f"{len(values)} fields, the header has {len(columns)}")
        elif (length := sum(map(len, values))) > MAX_ROW_CHARACTERS:
            table.add(number, _too_long(length))
        elif not is_utf8 and any(SURROGATE.search(value) for value in values):
            table.add(number, _NOT_UTF8)
        else:
            table.add(number, dict(zip(columns, values)))
    return table


def _too_long(num_characters: int) -> str:
    return f"{num_characters} characters, more than the limit of {MAX_ROW_CHARACTERS}"


def _read_jsonl(path: Path) -> Table:
    columns: dict[str, None] = {}  # an ordered set
    table = Table(columns=[], folder=path.parent)
    text, is_utf8 = _read_text(path)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = _json_row(line, is_utf8)
            table.add(number, row)
            if isinstance(row, dict):
                columns |= dict.fromkeys(row)
    table.columns = list(columns)
    return table


def _json_row(line: str, is_utf8: bool) -> dict[str, Any] | str:
    """Return the row of a JSON line, or the reason for its refusal."""
    if len(line) > MAX_ROW_CHARACTERS:
        return _too_long(len(line))
    if not is_utf8 and SURROGATE.search(line):
        return _NOT_UTF8
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    except RecursionError:
        return _TOO_DEEP
    if not isinstance(row, dict):
        return f"{type(row).__name__}, expected a JSON object"
    few = line.count("[") + line.count("{") <= MAX_DEPTH  # a quick check that suffices for nearly all rows
    return row if few else _unless_deep(row)


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = list(file.schema_arrow.names)
        if len(set(columns)) < len(columns):
            raise ValueError(f"{path}: names a column twice ({', '.join(columns)}); rename one")
        table = Table(columns, path.parent)
        number = 0
        for batch in file.iter_batches():
            for row in _python_rows(batch):
                number += 1
                table.add(number, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
    return table


def _python_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a `pyarrow.RecordBatch`; a row with an unreadable value yields the reason instead."""
    import pyarrow

    try:
        rows = batch.to_pylist()
        yield from map(_unless_deep, rows) if any(map(pyarrow.types.is_nested, batch.schema.types)) else rows
    except _UNREADABLE:  # a value does not fit Python's type; convert rows one by one
        for i in range(batch.num_rows):
            try:
                yield _unless_deep({name: _python_value(batch.column(name)[i]) for name in batch.schema.names})
            except _UNREADABLE as error:
                yield f"a value cannot be read ({error})".split("\n")[0]


def _python_value(scalar: Any) -> Any:
    """Convert a `pyarrow.Scalar` to a Python object, or to text if it does not fit one, such as times in ns."""
    import pyarrow

    try:
        return scalar.as_py()
    except _UNREADABLE:
        return str(scalar.cast(pyarrow.string()).as_py())


_READERS = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def caption_texts(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Return the row's captions: the items of one column of lists, or one text of all columns, joined by ", ".

    Values without a visible character are left out. Of several columns, a list contributes its items, as for tags.
    """
    parts = [part for column in columns for part in _parts(row.get(column))]
    is_list = len(columns) == 1 and isinstance(row.get(columns[0]), list)
    return parts if is_list or not parts else [", ".join(parts)]


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, str) and (is_visible(value) or SURROGATE.search(value)):
        yield value.strip()
    elif isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value)):
        yield str(value)


def row_json(row: dict[str, Any]) -> bytes:
    """Encode a row as a JSON object.

    NaN and infinities become null, bytes become "N bytes", and other values that JSON cannot represent become text.
    Lone surrogates, which are not valid Unicode and which most JSON readers refuse, become U+FFFD.
    """

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

    return SURROGATE.sub("\ufffd", json.dumps(plain(row), ensure_ascii=False)).encode()
