"""Sets of tars, local or remote: random access to their samples by id."""

import json
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.data.decode import BadSample
from mmpretrain.data.remote import is_remote
from mmpretrain.data.shard_table import ShardTable
from mmpretrain.data.source import Fingerprint, check_field_size, expand_paths, field_limit
from mmpretrain.data.storage import FileChanged, read_range
from mmpretrain.data.stored_index import cached_index_path, index_path, load_index
from mmpretrain.data.tar_headers import HEADER_BYTES, header_sum
from mmpretrain.data.tar_index import TarIndex
from mmpretrain.errors import Unreachable

_KEPT_SAMPLES = 1 << 20
"""Samples of a set whose indexes are all kept: at some 70 bytes each, up to 70 MiB, which the workers share."""
_LOADED_SHARDS = 128
"""Indexes of a larger set that a process keeps. The order visits 64 blocks, of up to as many shards, at a time."""


_GZIP = ".gz"  # of compressed members, such as a.txt.gz, which webdataset reads as a.txt
_logger = logging.getLogger(__name__)


def expand_shards(shards: str | Sequence[str], root: str | None = None) -> list[str]:
    """Expand patterns and folders to paths of tars; see `expand_paths`. Raises: ValueError."""
    return expand_paths(shards, root, "shards", "tar")


class OnMissingShard(Enum):
    """What to do about a remote shard that stays unreachable."""

    fail = "fail"
    replace = "replace"


class ShardStorage(Protocol):
    """Storage of tars: `LocalShards` or `RemoteShards`. A tar without a digest is indexed when it is first read."""

    def load_index(self, path: str, digest: str) -> TarIndex:
        """Return the index of a tar. Raises: Unreachable; OSError; ValueError."""
        ...

    def read_range(self, path: str, digest: str, index: TarIndex, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset` of a tar. Raises: Unreachable; OSError."""
        ...

    def prefetch(
        self, path: str, digest: str, index: TarIndex | None, spans: Iterable[tuple[int, int]], is_urgent: bool
    ) -> None:
        """Fetch parts of a tar in the background."""
        ...


class LocalShards:
    """Tars on file systems of this machine.

    Args:
        index_dir: folder of the indexes; None: they lie beside the tars.
    """

    def __init__(self, index_dir: str | None = None) -> None:
        self._index_dir = index_dir

    def load_index(self, path: str, digest: str) -> TarIndex:
        return load_index(path, self._index_dir)

    def read_range(self, path: str, digest: str, index: TarIndex, offset: int, size: int) -> bytes:
        return read_range(path, offset, size, index.tar_bytes, index.mtime_ns)

    def prefetch(
        self, path: str, digest: str, index: TarIndex | None, spans: Iterable[tuple[int, int]], is_urgent: bool
    ) -> None:
        pass


class Shards:
    """Random access to the samples of several tars, numbered in the order of `paths`; a `SampleSource`.

    Opening reads the headers of the stored indexes. The indexes of up to a million samples are loaded then, too; those of a
    larger set are loaded when a sample of their shard is read, and each process keeps the last 128.

    Args:
        paths: paths of the tars.
        index_dir: folder of the indexes; None: they lie beside the tars.

    Raises: ValueError for a tar without samples; errors of `load_index`.
    """

    def __init__(self, paths: Sequence[str], index_dir: str | None = None) -> None:
        table, unstored = ShardTable.open([os.fspath(path) for path in paths], index_dir)
        self._use(table, unstored, LocalShards(index_dir), OnMissingShard.fail)

    @classmethod
    def shared(
        cls,
        opened: Callable[[], tuple[ShardTable, Mapping[int, TarIndex]]],
        storage: ShardStorage,
        on_missing_shard: OnMissingShard = OnMissingShard.fail,
    ) -> "Shards":
        """Open the same tars on all processes, reading their headers on one of each machine. A collective.

        Args:
            opened: function that returns the table of the tars and the indexes that cannot be stored, by the number of their
                tar. It is called on one process of each machine.
            storage: storage of the tars.
            on_missing_shard: what happens to the samples of a tar that is not reachable.

        Raises: a ValueError or OSError of `opened`, on all processes.
        """
        unstored: dict[int, TarIndex] = {}

        def tensors() -> dict[str, Tensor]:
            table, own = opened()
            unstored.update(own)
            return table.tensors()

        shards = cls.__new__(cls)
        shards._use(ShardTable.from_tensors(distributed.once_per_machine(tensors)), unstored, storage, on_missing_shard)
        return shards

    def _use(
        self,
        table: ShardTable,
        unstored: Mapping[int, TarIndex],
        storage: ShardStorage,
        on_missing_shard: OnMissingShard,
    ) -> None:
        self._table = table
        self._storage = storage
        self._replaces_missing = on_missing_shard == OnMissingShard.replace
        self._missing: dict[int, str] = {}  # why a shard is not reachable, once it has proved so
        self._unindexed = {i for i, digest in enumerate(table.digests) if not digest}
        self._ends: npt.NDArray[np.int64] = np.cumsum(table.counts)
        self._kept = dict(unstored)
        for shard in table.not_stored.tolist():
            self._kept.setdefault(shard, storage.load_index(self.paths[shard], self._table.digests[shard]))
        self._loaded: OrderedDict[int, TarIndex] = OrderedDict()
        self._most_loaded = _LOADED_SHARDS
        if self.num_samples <= _KEPT_SAMPLES and self.is_indexed:
            # Loaded at once, before workers are forked, which then share them.
            self._most_loaded = len(self.paths)
            for shard in range(len(self.paths)):
                self._reachable_index(shard)

    @property
    def is_indexed(self) -> bool:
        """Whether every tar had an index when the set was opened."""
        return not self._unindexed

    @property
    def is_remote(self) -> bool:
        return not isinstance(self._storage, LocalShards)

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64]:
        return self.counts

    @property
    def paths(self) -> Sequence[str]:
        """Paths of the tars."""
        return self._table.paths

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Number of samples of each tar, int64 [n]."""
        return self._table.counts

    @property
    def problems(self) -> list[str]:
        """Defects of the tars, each with its path."""
        return list(self._table.problems)

    @property
    def num_samples(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of each shard's base name, count and digest; independent of its folder."""
        identities = [
            json.dumps([os.path.basename(path), count, digest]).encode() + b"\n"
            for path, count, digest in zip(self.paths, self.counts.tolist(), self._table.digests)
        ]
        return Fingerprint.of(self.paths, identities)

    def location(self, sample_id: int) -> str:
        """Return the path of the tar that has a sample. Raises: IndexError."""
        return self.paths[self._locate(sample_id)[0]]

    def key(self, sample_id: int) -> str:
        """Return the key of a sample; its number within its shard if that cannot be read. Raises: IndexError."""
        shard, row = self._locate(sample_id)
        index = self._reachable_index(shard)
        return f"#{row}" if index is None or row >= index.num_samples else index.key(row)

    def index(self, shard: int) -> TarIndex:
        """Return the index of a shard. Raises: FileChanged if it is another one than when the shards were opened."""
        if shard in self._kept:
            return self._kept[shard]
        index = self._loaded.get(shard)
        if index is None:
            path, count, digest = self.paths[shard], int(self.counts[shard]), self._table.digests[shard]
            index = self._storage.load_index(path, digest)
            if digest and (index.num_samples, index.digest) != (count, digest):
                raise FileChanged(
                    f"{path} was changed or replaced while it was read (its index has {index.num_samples} samples, at the "
                    f"start {count}); restore it and go on, or start a new run on the changed file"
                )
            if index.num_samples != count:
                _logger.warning(
                    "%s has %d samples, but %d were announced; those that it lacks are replaced, those that it has more are "
                    "not read",
                    path,
                    index.num_samples,
                    count,
                )
            self._loaded[shard] = index
        # Single operations of a dictionary, so that threads need no lock, which could be held while a worker is forked.
        with suppress(KeyError):  # another thread has just dropped it
            self._loaded.move_to_end(shard)
            while len(self._loaded) > self._most_loaded:
                self._loaded.popitem(last=False)
        return index

    def member(self, sample_id: int, fields: Sequence[str]) -> tuple[str, str, int, int] | None:
        """Return (path, extension, offset, size) of the first of `fields` that the sample has, compressed or not, or None.

        Raises: IndexError.
        """
        shard, row = self._locate(sample_id)
        index = self.index(shard)
        members = index.members if row < index.num_samples else {}
        for end in ("", _GZIP):
            for field in fields:
                extension = field + end
                if extension in members:
                    offsets, sizes = members[extension]
                    if sizes[row] >= 0:
                        return self.paths[shard], extension, int(offsets[row]), int(sizes[row])
        return None

    def read(self, sample_id: int, fields: Sequence[str]) -> bytes:
        """Return the member of the first extension in `fields` that the sample has, decompressed if it ends in `.gz`.

        Raises: IndexError; BadSample if the sample has none of the extensions, or the member exceeds 512 MiB for an
            image or 16 MiB for anything else; OSError if it cannot be read; FileChanged, an OSError that states the
            fix, if the tar has changed since it was indexed: its size, its modification time or the member's header
            differs. An edit of a member in place that preserves all three is not detected.
        """
        shard, row = self._locate(sample_id)
        if shard in self._missing:
            raise BadSample(self._missing[shard], "shard_missing")
        try:
            return self._read(shard, row, sample_id, fields)
        except (Unreachable, FileNotFoundError) as error:
            self._give_up(shard, error)
            raise BadSample(str(error), "shard_missing") from error

    def _reachable_index(self, shard: int) -> TarIndex | None:
        """Return the index of a shard; None if the shard is missing and its samples are replaced. Raises: as `index`."""
        if shard not in self._missing:
            try:
                return self.index(shard)
            except (Unreachable, FileNotFoundError) as error:
                self._give_up(shard, error)
        return None

    def _give_up(self, shard: int, error: OSError) -> None:
        """Note that a shard is missing. Raises: the error, with its fix, unless samples of missing shards are replaced."""
        if not self._replaces_missing:
            if isinstance(error, FileNotFoundError) and is_remote(self.paths[shard]):
                raise FileNotFoundError(
                    f"{error}; restore it, or replace its samples by others: data.on_missing_shard=replace"
                ) from error
            raise error
        self._missing[shard] = str(error)

    def _digest(self, shard: int, index: TarIndex) -> str:
        """Return the digest by which a shard is opened; an empty one for a shard that had no index then."""
        return "" if shard in self._unindexed else index.digest

    def _read(self, shard: int, row: int, sample_id: int, fields: Sequence[str]) -> bytes:
        member = self.member(sample_id, fields)
        if member is None:
            raise BadSample(f"it has no member {' or '.join(fields)}", "member_missing")
        path, extension, offset, size = member
        check_field_size(extension, size)
        index = self.index(shard)
        block = self._storage.read_range(
            path, self._digest(shard, index), index, offset - HEADER_BYTES, HEADER_BYTES + size
        )
        if header_sum(block[:HEADER_BYTES]) != index.header_sums[extension][row]:
            fix = (
                f"make the index again with python -m data_tools index {path} --index-dir DIR, and put it in place"
                if is_remote(path)
                else f"though of the same size and time of modification: remove {index_path(path)}, or "
                f"{cached_index_path(path)}, and start again"
            )
            raise FileChanged(
                f"{path} is not what its index says (another header at byte {offset - HEADER_BYTES}), {fix}"
            )
        content = block[HEADER_BYTES:]
        return _decompressed(content, extension) if extension.endswith(_GZIP) else content

    def prefetch(self, sample_ids: npt.NDArray[np.int64], is_urgent: bool) -> None:
        """Fetch samples of remote tars into the cache, in the background.

        Args:
            sample_ids: ids of the samples, int64 [n].
            is_urgent: whether they are read now, and come before others.
        """
        shards = np.searchsorted(self._ends, sample_ids, side="right")
        for shard in np.unique(shards).tolist():
            if shard in self._missing:
                continue
            digest = self._table.digests[shard]
            spans: list[tuple[int, int]] = []
            index = self._reachable_index(shard) if digest else None
            if digest and index is None:
                continue
            if index is not None:
                for row in (sample_ids[shards == shard] - (self._ends[shard] - self.counts[shard])).tolist():
                    members = [
                        (offsets[row], sizes[row]) for offsets, sizes in index.members.values() if sizes[row] >= 0
                    ]
                    spans += [(int(offset) - HEADER_BYTES, int(offset + size)) for offset, size in members]
            self._storage.prefetch(self.paths[shard], digest, index, spans, is_urgent)

    def _locate(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id}, expected 0 to {self.num_samples - 1}")
        shard = int(np.searchsorted(self._ends, sample_id, side="right"))
        return shard, sample_id - (int(self._ends[shard - 1]) if shard else 0)


def _decompressed(content: bytes, extension: str) -> bytes:
    """Decompress a member. Raises: BadSample if it is damaged or cut off, or larger than the limit of its kind."""
    field = extension.removesuffix(_GZIP)
    data = b""
    try:
        while content:  # a file may consist of several compressed parts
            part = zlib.decompressobj(wbits=31)
            data += part.decompress(content, field_limit(field) + 1 - len(data))
            check_field_size(field, len(data))
            if not part.eof:
                raise zlib.error("it ends too early")
            content = part.unused_data.lstrip(b"\0")  # gzip ignores zeros behind its data
    except zlib.error as error:
        raise BadSample(f"its {extension} member does not decompress ({error})", "member_damaged") from error
    return data
