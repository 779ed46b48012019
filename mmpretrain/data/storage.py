"""Reads of byte ranges of local files, through a small cache of file descriptors per process."""

import errno
import os
import stat
from functools import lru_cache

_OPEN_FILES = 32
_RETRIES = 3


class NotRegular(OSError):
    """The path is a FIFO, a device or a folder instead of a regular file."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor. A FIFO without a writer does not block.

    Raises: NotRegular; OSError if the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegular(errno.EINVAL, "not a regular file", os.fspath(path))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class _File:
    """Open file descriptor. It is closed with its last reference, since another thread may still read from it."""

    def __init__(self, path: str) -> None:
        self.descriptor = open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# One cache per process: with a cache per data set, the number of open files would grow with the number of data sets.
# A forked process may keep using the inherited cache: `pread` moves no offset, and closing affects one process alone.
_opened = lru_cache(maxsize=_OPEN_FILES)(_File)


class FileChanged(OSError):
    """The file has changed since it was indexed."""


def read_range(path: str, offset: int, size: int, file_bytes: int, mtime_ns: int) -> bytes:
    """Read exactly `size` bytes at `offset` of a file, and check its size and modification time.

    I/O errors are not the sample's fault: the read is retried, then the error is raised and ends the run.

    Args:
        path: path of the file.
        offset: first byte to read.
        size: number of bytes to read.
        file_bytes: expected size of the file, in bytes.
        mtime_ns: expected modification time, in nanoseconds.

    Raises: FileChanged if the file has another size or modification time; OSError if it cannot be opened or read, or
        ends before `offset + size`.
    """
    for attempt in range(_RETRIES):
        try:
            descriptor = _opened(path).descriptor
            data = os.pread(descriptor, size, offset)
            now = os.fstat(descriptor)  # after the read, to catch an edit that happened during it
            if (now.st_size, now.st_mtime_ns) != (file_bytes, mtime_ns):
                raise FileChanged(
                    f"{path} was changed or replaced while it was read: {now.st_size} bytes, modified at "
                    f"{now.st_mtime_ns} ns, indexed with {file_bytes} at {mtime_ns}; restore it and go on, or start a "
                    "new run on the changed file"
                )
            if len(data) == size:
                return data
            raise OSError(errno.EIO, f"expected {size} bytes at offset {offset}, got {len(data)}", path)
        except OSError:
            _opened.cache_clear()
            if attempt == _RETRIES - 1:
                raise
    raise AssertionError("unreachable")
