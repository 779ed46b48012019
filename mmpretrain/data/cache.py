"""Bounded folder of files that the processes of a machine share, such as ranges of remote shards."""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmpretrain.errors import CacheError, Unreachable

_SUFFIX, _PARTIAL = ".bin", ".partial"
_FILE = re.compile(r"[0-9a-f]{40}\.(bin|partial)")
"""Names of the cache's files: others in its folder are not touched."""
_POLL_SECONDS = 0.02
_MAX_TOLD_BYTES = 4096


class Cache:
    """Files by name. Each is fetched once, by one process of the machine; the ones unused for longest make room for others.

    All files, those that are being fetched included, take at most `max_bytes` together. What a process that was killed has
    fetched in part is removed when space is needed, and never read.

    Args:
        folder: folder of the files; it is created when a file is fetched.
        max_bytes: limit on the size of all files, in bytes.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes

    @contextmanager
    def opened(self, name: str, size: int, fetch: Callable[[int], None]) -> Iterator[int]:
        """Open the file `name` for reading, and yield its descriptor, which stays readable if the file makes room.

        Args:
            name: text that identifies the content.
            size: size of the content, in bytes.
            fetch: function that writes the content to a descriptor, called if the file is not there. An `Unreachable` that
                it raises is raised in all processes that wait for the file.

        Raises: ValueError if the content is larger than the cache; CacheError; errors of `fetch`.
        """
        path = self._path(name)
        descriptor = self._open(path, size)
        while descriptor is None:
            self._fetch(path, size, fetch)
            descriptor = self._open(path, size)  # None again if the file has made room at once
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def ensure(self, name: str, size: int, fetch: Callable[[int], None]) -> None:
        """Fetch the file `name` if it is not there and no process is fetching it. Args, Raises: as `opened`."""
        path = self._path(name)
        descriptor = self._open(path, size)
        if descriptor is None:
            self._fetch(path, size, fetch, wait=False)
        else:
            os.close(descriptor)

    def _path(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()
        return self.folder / f"{digest}{_SUFFIX}"

    def _open(self, path: Path, size: int) -> int | None:
        """Open a file; None if it is not there. One of another size, cut off by a loss of power, is removed."""
        with self._explained():
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            if os.fstat(descriptor).st_size != size:
                with self._locked():
                    if _is_at(descriptor, path):  # others may have fetched it anew
                        os.unlink(path)
                os.close(descriptor)
                return None
            os.utime(descriptor)  # the times of use order the files
            return descriptor

    def _fetch(self, path: Path, size: int, fetch: Callable[[int], None], wait: bool = True) -> None:
        """Fetch a file. If another process is fetching it, wait until that one has succeeded, failed or died, or return."""
        if size > self.max_bytes:
            raise ValueError(
                f"data.cache_bytes is {self.max_bytes:,}, but one file needs {size:,} bytes; expected at least as many"
            )
        partial = path.with_suffix(_PARTIAL)
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if not _is_at(descriptor, partial):  # the process that held the lock has ended its attempt
                if not os.fstat(descriptor).st_mode & 0o777:
                    raise Unreachable(os.pread(descriptor, _MAX_TOLD_BYTES, 0).decode(errors="replace"))
                return
            try:
                with self._explained():
                    self._reserve(descriptor, size)
                fetch(descriptor)
                with self._explained():
                    os.fdatasync(descriptor)  # or a loss of power could leave the name without the content
                    with self._locked():
                        os.rename(partial, path)
            except BaseException as error:
                if isinstance(error, Unreachable):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, str(error).encode()[:_MAX_TOLD_BYTES], 0)
                os.unlink(partial)
                if isinstance(error, Unreachable):
                    os.fchmod(descriptor, 0)  # tells those who wait
                raise
        finally:
            os.close(descriptor)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Convert an OSError of the cache's own files. Raises: CacheError."""
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"data.cache_dir {str(self.folder)!r} cannot be written ({error.strerror}); expected a folder with "
                f"data.cache_bytes ({self.max_bytes:,}) of space: data.cache_dir=..., or a lower data.cache_bytes"
            ) from error

    def _reserve(self, descriptor: int, size: int) -> None:
        """Give a new file its size on the disk, after older files have made room."""
        while True:
            with self._locked():
                if self._make_room(descriptor, size):
                    os.ftruncate(descriptor, 0)
                    os.posix_fallocate(descriptor, 0, max(size, 1))
                    os.ftruncate(descriptor, size)
                    return
            time.sleep(_POLL_SECONDS)  # until files that others are fetching are complete

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder: a file that is renamed while others list the folder could escape their count."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _make_room(self, descriptor: int, size: int) -> bool:
        """Remove the files unused for longest until `size` more bytes fit. Return False if files of others are too large."""
        own = os.fstat(descriptor).st_ino
        files = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if _FILE.fullmatch(entry.name) and entry.inode() != own:
                    files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total = sum(file_size for _, file_size, _ in files)
        for _, file_size, path in sorted(files):
            if total + size <= self.max_bytes:
                return True
            if path.endswith(_PARTIAL) and not _is_abandoned(path):
                continue
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= file_size
        return total + size <= self.max_bytes


def _is_at(descriptor: int, path: Path) -> bool:
    """Return True if a path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _is_abandoned(partial: str) -> bool:
    """Return True if no process is fetching this file."""
    try:
        descriptor = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _is_at(descriptor, Path(partial))
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
