"""Streaming reader of documents in plain text and JSONL files."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from data_tools.classes import one_line
from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import read_json_field
from mmpretrain.data.pairs import SURROGATE

TEXT_SUFFIXES = (".txt", ".txt.gz")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
DOCUMENTS = ("paragraph", "line", "file")
MAX_TEXT_BYTES = 1 << 28
"""Limit for a document of plain text."""
MAX_JSON_BYTES = 1 << 24
"""Limit for a JSON line. A hostile line takes about twenty times as much memory once parsed."""


@dataclass(frozen=True)
class Document:
    """Document as a single line of text. `file` is its file's index, from 0; `line` is its first line, from 1."""

    file: int
    line: int
    text: str


@dataclass(frozen=True)
class RefusedDocument:
    file: str
    line: int
    reason: str


def text_files(inputs: Sequence[str], output: Path) -> list[Path]:
    """Expand paths, folders (text files at any depth) and globs to files, in input order, then sorted by path.

    Raises: ValueError if an input names no text file, a file is named twice, or `output` is inside an input folder.
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
    """Yield the documents and refusals of files, in order. Each run of whitespace in a document becomes one space.

    Args:
        files: files as returned by `text_files`.
        field: field of JSON lines that holds the text; `a.b` for a nested field.
        document: unit of plain text that makes a document: `paragraph` (between blank lines), `line` or `file`.
    """
    for number, file in enumerate(files):
        is_plain = file.name.endswith(TEXT_SUFFIXES)
        for line, text in _plain_texts(file, document) if is_plain else _json_texts(file, field):
            if isinstance(text, BadSample):
                yield RefusedDocument(str(file), line, str(text))
            else:
                yield Document(number, line, text)


def read_lines(file: Path, max_bytes: int) -> Iterator[bytes | BadSample]:
    """Yield the lines of a file, decompressed and without a byte order mark.

    A line longer than `max_bytes` is replaced by a BadSample with the reason; so is the rest of an unreadable file.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as lines:
            begin = b"\xef\xbb\xbf"
            while data := lines.readline(max_bytes + 1):
                num_bytes = len(data)
                if num_bytes <= max_bytes:
                    yield data.removeprefix(begin)
                else:
                    while not data.endswith(b"\n") and (data := lines.readline(1 << 20)):
                        num_bytes += len(data)
                    yield _too_long(num_bytes, max_bytes)
                begin = b""
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield BadSample(f"the gzip file is damaged or incomplete from here on ({error}); fetch or pack it again")
    except OSError as error:
        yield BadSample(f"the file cannot be read from here on ({error.strerror or error})")


def _too_long(num_bytes: int, max_bytes: int) -> BadSample:
    return BadSample(f"{num_bytes} bytes or more, over the limit of {max_bytes}")


def _plain_texts(file: Path, document: str) -> Iterator[tuple[int, str | BadSample]]:
    """Yield (first line, text or reason for refusal) of each document of plain text."""
    first = num_bytes = 0  # line numbers count from 1
    texts: list[str] = []
    problem: BadSample | None = None
    for line, data in enumerate(read_lines(file, MAX_TEXT_BYTES), start=1):
        text = decode_line(data)
        if isinstance(text, str):
            text = one_line(text)
            num_bytes += len(text)
            if text and num_bytes > MAX_TEXT_BYTES:
                text = _too_long(num_bytes, MAX_TEXT_BYTES)
        if text:
            first = first or line
        if isinstance(text, BadSample):
            problem = problem or BadSample(f"line {line}: {text}")
            texts = []
        elif text and problem is None:
            texts.append(text)
        if first and (document == "line" or (document == "paragraph" and not text)):
            yield first, problem or " ".join(texts)
            first = num_bytes = 0
            texts, problem = [], None
    if first:
        yield first, problem or " ".join(texts)


def decode_line(data: bytes | BadSample) -> str | BadSample:
    """Decode a line of `read_lines` to text, or return the reason for its refusal."""
    if isinstance(data, BadSample):
        return data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadSample(f"not UTF-8 ({error.reason}); convert it, e.g. with iconv -t utf-8")


def _json_texts(file: Path, field: str) -> Iterator[tuple[int, str | BadSample]]:
    """Yield (line number, text or reason for refusal) of each JSON line."""
    for line, data in enumerate(read_lines(file, MAX_JSON_BYTES), start=1):
        if isinstance(data, BadSample):
            yield line, data
        elif data.strip():
            try:
                yield line, _json_text(data, field)
            except BadSample as error:
                yield line, error


def _json_text(data: bytes, field: str) -> str:
    """Return the text of a JSON line. Raises: BadSample if it has no valid text."""
    value = read_json_field(data, field)
    if not isinstance(value, str):
        raise BadSample(f"its field {field!r} is {type(value).__name__}, expected a string")
    if SURROGATE.search(value):
        raise BadSample(f"its field {field!r} is no valid Unicode: it has half a surrogate pair")
    text = one_line(value)
    if not text:
        raise BadSample(f"its field {field!r} is empty")
    return text
