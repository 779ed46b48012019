"""Reads of byte ranges of local files, through a small cache of file descriptors per process."""

import errno
import os
import stat
import time
from functools import lru_cache

_OPEN_FILES = 32
RETRY_SECONDS = (0.1, 0.4)
"""Pauses between attempts to read, in seconds, in which a network file system may recover."""
_FINAL = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM)


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

    I/O errors are not the sample's fault. A failed read is repeated at once on a newly opened file, since the open
    descriptor may be of a file that was replaced. Transient errors, such as EIO, ESTALE or a short read, are then retried
    after each pause of `RETRY_SECONDS`, before the error is raised and ends the run. Errors that no retry can change are
    raised without a pause: FileChanged, NotRegular, a missing file or a lack of permission.

    Args:
        path: path of the file.
        offset: first byte to read.
        size: number of bytes to read.
        file_bytes: expected size of the file, in bytes.
        mtime_ns: expected modification time, in nanoseconds.

    Raises: FileChanged if the file has another size or modification time; OSError if it cannot be opened or read, or
        ends before `offset + size`.
    """
    for attempt, pause in enumerate((0.0, *RETRY_SECONDS, None)):
        try:
            return _read_once(path, offset, size, file_bytes, mtime_ns)
        except OSError as error:
            _opened.cache_clear()
            is_final = isinstance(error, FileChanged | NotRegular) or error.errno in _FINAL
            if pause is None or (is_final and attempt > 0):
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")


def _read_once(path: str, offset: int, size: int, file_bytes: int, mtime_ns: int) -> bytes:
    descriptor = _opened(path).descriptor
    data = os.pread(descriptor, size, offset)
    now = os.fstat(descriptor)  # after the read, to catch an edit that happened during it
    if (now.st_size, now.st_mtime_ns) != (file_bytes, mtime_ns):
        raise FileChanged(
            f"{path} was changed or replaced while it was read: {now.st_size} bytes, modified at {now.st_mtime_ns} ns, "
            f"indexed with {file_bytes} at {mtime_ns}; restore it and go on, or start a new run on the changed file"
        )
    if len(data) != size:
        raise OSError(errno.EIO, f"expected {size} bytes at offset {offset}, got {len(data)}", path)
    return data
