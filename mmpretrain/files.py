"""Small files: read within limits or refused in one line that names the file; written whole or not at all."""

import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20
"""Above what a state.json of a large optimiser, a results.json or a manifest.json takes by far."""

PARTIAL = ".partial-"
"""What the name of a file begins with that is not written to its end."""


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file, or of what a symbolic link leads to.

    Raises: FileNotFoundError if there is none; ValueError for a pipe, device or folder, and above `max_bytes`; OSError if
        it cannot be read, which says nothing about it.
    """
    # Opening a pipe waits for its other end, unless told not to.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path} is a link that leads to itself; expected the file as it was written") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no regular file; expected the file as it was written, replace or remove it")
    with open(descriptor, "rb") as file:
        content = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
    if max(status.st_size, len(content)) > max_bytes:
        raise ValueError(
            f"{path} has {max(status.st_size, len(content))} bytes; expected at most {max_bytes}, as it was written"
        )
    return content


def read_text(path: Path, max_bytes: int) -> str:
    """`read_bytes` of UTF-8. Raises: ValueError also for other bytes."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}); expected it as it was written"
        ) from None


def sync(path: Path) -> None:
    """Make a file's or folder's content last through a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """`write_text` for content as it is."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    with naming(path):
        partial.write_bytes(content)
        sync(partial)
    partial.replace(path)
    sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside the block an OSError that names no file names this one: one of writing to an open file does not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_all(file: io.RawIOBase, text: str | bytes) -> None:
    """Write to an unbuffered file, which may take a part at a time; no buffer is left to fail later. Raises: OSError."""
    rest = memoryview(text.encode() if isinstance(text, str) else text)
    while rest:
        rest = rest[file.write(rest) :]


def parse_json(text: str | bytes, where: str) -> Any:
    """What a JSON text says. Raises: ValueError that begins with `where`, for no JSON or values nested too deep."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error}); expected it as it was written") from None
    except RecursionError:
        raise ValueError(f"{where} nests too deep; expected JSON as it was written") from None
    except ValueError as error:  # bytes that are no UTF-8, a number of thousands of digits
        raise ValueError(f"{where} cannot be read ({error}); expected JSON as it was written") from None


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: FileNotFoundError if there is no such file; ValueError if it is no JSON object or lies beyond the limits.
    """
    value = parse_json(read_text(path, max_bytes), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; expected keys with values, as it was written")
    return value
