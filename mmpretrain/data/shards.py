"""Sets of tars: expansion of shard patterns, and random access to samples by id."""

import base64
import glob
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import braceexpand
import numpy as np
import numpy.typing as npt

from mmpretrain.data.decode import BadSample
from mmpretrain.data.storage import FileChanged, read_range
from mmpretrain.data.stored_index import cached_index_path, index_path, load_index
from mmpretrain.data.tar_headers import HEADER_BYTES, header_sum
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS

_MAX_NAMED = 5
_MAX_IMAGE_BYTES = 1 << 29  # encoded bytes; covers 100 million uncompressed pixels
_MAX_TEXT_BYTES = 1 << 24  # parsed json takes twenty times as much memory


def expand_shards(shards: str | Sequence[str], root: str | None = None) -> list[str]:
    """Expand brace patterns, globs and folders (their *.tar files), relative to `root`, to paths of tars.

    Raises: ValueError if a pattern matches nothing, names a missing file, or is remote.
    """
    paths: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        matched: list[str] = []
        for part in braceexpand.braceexpand(pattern):
            if "://" in part:
                raise ValueError(
                    f"shards {pattern!r}: expected local tars; remote ones are not read yet, copy them first"
                )
            path = os.path.join(root or "", part)
            if os.path.isdir(path):
                matched += sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
            elif os.path.exists(path):
                matched.append(path)
            elif glob.has_magic(path):
                matched += sorted(glob.glob(path, recursive=True))
            else:
                raise ValueError(
                    f"shards {pattern!r}: no file {path!r}; name existing tars, a folder of them or a glob"
                )
        if not matched:
            where = f" in {os.path.abspath(root or '.')!r}"
            raise ValueError(
                f"shards {pattern!r}: no tar matches{where}; name existing tars, a folder of them or a glob"
            )
        paths += matched
    if not paths:
        raise ValueError("shards []: expected at least one tar, a folder of them or a glob")
    return paths


class Shards:
    """Random access to the samples of several tars, numbered 0 to num_samples - 1 in the order of `paths`.

    Args:
        paths: paths of the tars.
        kept: ids of the stored samples to keep, ascending, int64 [m]; None keeps all.

    Raises: ValueError for a tar without samples; errors of `load_index`.
    """

    def __init__(self, paths: Sequence[str], kept: npt.NDArray[np.int64] | None = None) -> None:
        self.paths = [os.fspath(path) for path in paths]
        self.indexes = [load_index(path) for path in self.paths]
        self.problems = [
            f"{path}: {problem}" for path, index in zip(self.paths, self.indexes) for problem in index.problems
        ]
        self.counts: npt.NDArray[np.int64] = np.array([index.num_samples for index in self.indexes], np.int64)
        for path, count in zip(self.paths, self.counts):
            if not count:
                raise ValueError(f"shard {path!r}: no sample in it, expected at least one; remove it or build it again")
        self.kept = kept
        self._ends = np.cumsum(self.counts)
        self._ends_list: list[int] = (
            self._ends.tolist()
        )  # bisect on a list: ten times faster than a scalar searchsorted

    @property
    def num_samples(self) -> int:
        return self.num_stored if self.kept is None else len(self.kept)

    @property
    def num_stored(self) -> int:
        """Number of samples stored in the tars, kept or not."""
        return self._ends_list[-1] if self._ends_list else 0

    @property
    def fingerprint(self) -> str:
        """Hex digest of the kept ids and of each shard's base name, count and digest; independent of its folder."""
        digest = hashlib.blake2b(digest_size=16)
        for identity in self._identities():
            digest.update(identity)
        if self.kept is not None:
            digest.update(self.kept.tobytes())
        return digest.hexdigest()

    def shard_fingerprints(self) -> list[str]:
        """Return a fingerprint of each shard, 4 base64 characters (24 bits) each."""
        hashes = (hashlib.blake2b(identity, digest_size=3).digest() for identity in self._identities())
        return [base64.b64encode(value).decode() for value in hashes]

    def _identities(self) -> Iterator[bytes]:
        for path, index in zip(self.paths, self.indexes):
            yield json.dumps([os.path.basename(path), index.num_samples, index.digest]).encode() + b"\n"

    def locate(self, sample_ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (shard indices, rows within the shard), int64 [n] each, of sample ids, int64 [n]. Raises: IndexError."""
        sample_ids = np.asarray(sample_ids, np.int64)
        if len(sample_ids) and not (sample_ids.min() >= 0 and sample_ids.max() < self.num_samples):
            raise IndexError(
                f"sample ids {sample_ids.min()} to {sample_ids.max()}, expected 0 to {self.num_samples - 1}"
            )
        if self.kept is not None:
            sample_ids = self.kept[sample_ids]
        shard_ids = np.searchsorted(self._ends, sample_ids, side="right").astype(np.int64)
        return shard_ids, sample_ids - (self._ends - self.counts)[shard_ids]

    def path(self, shard: int) -> str:
        return self.paths[shard]

    def key(self, sample_id: int) -> str:
        """Return the key of a sample. Raises: IndexError."""
        shard, row = self._locate_one(sample_id)
        return self.indexes[shard].key(row)

    def member(self, sample_id: int, extensions: Sequence[str]) -> tuple[str, str, int, int] | None:
        """Return (path, extension, offset, size) of the first extension that the sample has, or None.

        Raises: IndexError.
        """
        shard, row = self._locate_one(sample_id)
        members = self.indexes[shard].members
        for extension in extensions:
            if extension in members:
                offsets, sizes = members[extension]
                if sizes[row] >= 0:
                    return self.paths[shard], extension, int(offsets[row]), int(sizes[row])
        return None

    def read(self, sample_id: int, extensions: Sequence[str]) -> bytes:
        """Return the bytes of the first extension that the sample has.

        Raises: IndexError; BadSample if the sample has none of the extensions, or the member exceeds 512 MiB for an
            image or 16 MiB for anything else; OSError if it cannot be read; FileChanged, an OSError that states the
            fix, if the tar has changed since it was indexed: its size, its modification time or the member's header
            differs. An edit of a member in place that preserves all three is not detected.
        """
        shard, row = self._locate_one(sample_id)
        member = self.member(sample_id, extensions)
        if member is None:
            raise BadSample(f"it has no member {' or '.join(extensions)}")
        path, extension, offset, size = member
        limit = _MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else _MAX_TEXT_BYTES
        if size > limit:
            raise BadSample(f"its {extension} member has {size} bytes, more than the limit of {limit}")
        index = self.indexes[shard]
        block = read_range(path, offset - HEADER_BYTES, HEADER_BYTES + size, index.tar_bytes, index.mtime_ns)
        if header_sum(block[:HEADER_BYTES]) != index.header_sums[extension][row]:
            raise FileChanged(
                f"{path} is not what its index says (another header at byte {offset - HEADER_BYTES}), though of the same "
                f"size and time of modification: remove {index_path(path)}, or {cached_index_path(path)}, and start again"
            )
        return block[HEADER_BYTES:]

    def _locate_one(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id}, expected 0 to {self.num_samples - 1}")
        if self.kept is not None:
            sample_id = int(self.kept[sample_id])
        shard = bisect_right(self._ends_list, sample_id)
        return shard, sample_id - (self._ends_list[shard - 1] if shard else 0)


class Fingerprint(str):
    """Fingerprint as stored in checkpoints: `HASH:` and 4 characters per shard. It also holds the shards' paths."""

    paths: Sequence[str]

    @classmethod
    def of(cls, shards: Shards) -> "Fingerprint":
        fingerprint = cls(f"{shards.fingerprint}:{''.join(shards.shard_fingerprints())}")
        fingerprint.paths = shards.paths
        return fingerprint

    def is_of(self, saved: str) -> bool:
        """Return True if the saved fingerprint is of the same data. Only the hash counts; old checkpoints have no more."""
        return saved.partition(":")[0] == self.partition(":")[0]

    def changes_since(self, saved: str) -> str:
        """Describe the changes of the shards since a saved fingerprint; empty if that has the hash alone."""
        before, now = (
            [text[i : i + 4] for i in range(0, len(text), 4)]
            for text in (saved.partition(":")[2], self.partition(":")[2])
        )
        if not before:
            return ""
        if before == now:
            return "the same shards with another selection of samples"
        if sorted(before) == sorted(now):
            return "the same shards in another order"
        if len(before) == len(now):
            return f"changed: {_some([path for path, a, b in zip(self.paths, before, now) if a != b])}"
        known, present = set(before), set(now)
        new = [path for path, shard in zip(self.paths, now) if shard not in known]
        gone = len(known - present)
        told = f"{len(before)} shards then, {len(now)} now, {gone} gone or changed"
        return f"{told}; new or changed: {_some(new)}" if new else told


def _some(paths: Sequence[str]) -> str:
    more = len(paths) - _MAX_NAMED
    return ", ".join(paths[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def concatenated(parts: Sequence[Shards]) -> Shards:
    """Concatenate sets of tars, in their order; each keeps its selection of samples."""
    paths = [path for part in parts for path in part.paths]
    if all(part.kept is None for part in parts):
        return Shards(paths)
    firsts = np.cumsum([0, *(part.num_stored for part in parts[:-1])])
    kept = [np.arange(part.num_stored) if part.kept is None else part.kept for part in parts]
    return Shards(paths, np.concatenate([first + ids for first, ids in zip(firsts, kept, strict=True)]))
