"""Documents of plain text and JSONL files, read one at a time."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from data_tools.classes import one_line
from data_tools.tables import SURROGATE
from mmpretrain.data.decode import BadSample, read_json_field

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
DOCUMENTS = ("paragraph", "line", "file")


@dataclass(frozen=True)
class Document:
    """A text on one line; it begins on line `line`, counted from 1, of file number `file`, counted from 0."""

    file: int
    line: int
    text: str


@dataclass(frozen=True)
class RefusedDocument:
    file: str
    line: int
    reason: str


def text_files(inputs: Sequence[str], output: Path) -> list[Path]:
    """Files that paths, folders (the text files at any depth) and globs name, in the inputs' order, else by name.

    Raises ValueError where one names no text file, a file is named twice, or `output` is among what is read.
    """
    files: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_text(file) and file.is_file())
            if output.resolve().is_relative_to(path.resolve()):
                raise ValueError(f"--output {str(output)!r}: is in {given!r}, which is read; name a folder elsewhere")
        elif not path.exists() and has_magic(given):
            found = sorted(Path(name) for name in glob(given, recursive=True) if Path(name).is_file())
        elif path.is_file():
            found = [path]
        else:
            raise ValueError(f"INPUT {given!r}: no such file; expected text files, folders of them or globs")
        suffixes = ", ".join(TEXT_SUFFIXES + JSONL_SUFFIXES)
        if not found:
            raise ValueError(f"INPUT {given!r}: no file; expected some that end with {suffixes}")
        for file in found:
            if not _is_text(file):
                raise ValueError(f"INPUT {str(file)!r}: unknown kind; expected a name that ends with {suffixes}")
        files += found
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise ValueError(f"INPUT {str(file)!r}: is named twice; name it once")
        seen.add(file.resolve())
    return files


def _is_text(file: Path) -> bool:
    return file.name.endswith(TEXT_SUFFIXES + JSONL_SUFFIXES)


def read_documents(files: Sequence[Path], field: str, document: str) -> Iterator[Document | RefusedDocument]:
    """The documents of files in their order, each run of whitespace in them one space.

    Args:
        files: as `text_files` names them.
        field: of JSON lines: the text's, `a.b` for one inside another.
        document: of plain text: what is one, `paragraph` (between blank lines), `line` or `file`.

    Raises: ValueError for plain text that is not UTF-8, and a broken gzip file.
    """
    for number, file in enumerate(files):
        if file.name.endswith(TEXT_SUFFIXES):
            yield from (Document(number, line, text) for line, text in _plain_texts(file, document))
            continue
        for line, data in enumerate(_lines(file), start=1):
            if data.strip():
                try:
                    yield Document(number, line, _json_text(data, field))
                except BadSample as error:
                    yield RefusedDocument(str(file), line, str(error))


def _lines(file: Path) -> Iterator[bytes]:
    """A file's lines, unpacked, without a byte order mark."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as lines:
            yield from (data.removeprefix(b"\xef\xbb\xbf") if i == 0 else data for i, data in enumerate(lines))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: not a whole gzip file ({error}); expected one, fetch or pack it again") from error


def _plain_texts(file: Path, document: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of each document of plain text."""
    first = 1
    texts: list[str] = []
    for line, data in enumerate(_lines(file), start=1):
        try:
            text = one_line(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}: not UTF-8 on line {line} ({error.reason}); convert it, e.g. with iconv -t utf-8"
            ) from error
        if text:
            first = first if texts else line
            texts.append(text)
        if texts and (document == "line" or (document == "paragraph" and not text)):
            yield first, " ".join(texts)
            texts = []
    if texts:
        yield first, " ".join(texts)


def _json_text(data: bytes, field: str) -> str:
    """The text of a JSON line. Raises: BadSample if it has none."""
    value = read_json_field(data, field)
    if not isinstance(value, str):
        raise BadSample(f"its field {field!r} is {type(value).__name__}, expected a string")
    if SURROGATE.search(value):
        raise BadSample(f"its field {field!r} is no valid Unicode: it has half a surrogate pair")
    text = one_line(value)
    if not text:
        raise BadSample(f"its field {field!r} is empty")
    return text
