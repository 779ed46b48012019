"""Temporary records on disk, written in one order and read in another without holding them in memory."""

import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType


class Spool:
    """Byte records in an unnamed temporary file, at 8 bytes of memory per record. The file vanishes if the process dies.

    Args:
        folder: existing folder with enough free space.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, open as long as the spool
        self._ends = array("Q", [0])

    def append(self, record: bytes) -> None:
        self._file.seek(self._ends[-1])
        self._file.write(record)
        self._ends.append(self._ends[-1] + len(record))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        self._file.seek(self._ends[number])
        return self._file.read(self._ends[number + 1] - self._ends[number])

    def __iter__(self) -> Iterator[bytes]:
        return (self[number] for number in range(len(self)))

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
