"""Sources of samples: what a stream, an evaluation and `embed` read, whatever the storage."""

import base64
import glob
import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol, runtime_checkable

import braceexpand
import numpy as np
import numpy.typing as npt

from mmpretrain.data.decode import BadSample
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS

_MAX_NAMED = 5
_MAX_IMAGE_BYTES = 1 << 29  # encoded bytes; covers 100 million uncompressed pixels
_MAX_TEXT_BYTES = 1 << 24  # parsed json takes twenty times as much memory


@runtime_checkable
class SampleSource(Protocol):
    """Random access to samples, numbered 0 to num_samples - 1.

    A sample is a set of named fields, each of them bytes:

    - an image file under one of `IMAGE_EXTENSIONS`, such as `jpg` or `png`;
    - `txt`: a caption in UTF-8;
    - `cls`: the index of a class, in decimal digits;
    - `json`: a JSON object. Configurations name its values as `json.<path>`; a list of texts is several captions.

    A sample need not have all of them. The configuration chooses among them (`data.train.<stream>.caption`, `group`,
    `data.val.<name>.label`), so that a source decodes nothing.

    A source is built in the main process and used in workers that are forked from it: keep the constructor fast, open files
    in `read`, and let no thread, lock or connection cross the fork. Samples and their numbers must not change during a
    run, nor depend on the process that reads.
    """

    @property
    def num_samples(self) -> int:
        """Number of samples, at least 1."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that changes with the samples or their order, but not with their location.

        Checkpoints have it, and a run does not resume on data with another one. A `Fingerprint` also says which files
        changed.
        """
        ...

    def key(self, sample_id: int) -> str:
        """Return the name of a sample, for messages, `quarantine.jsonl` and `data.train.<stream>.subset`."""
        ...

    def location(self, sample_id: int) -> str:
        """Return the file, table or address that holds a sample, for messages and `quarantine.jsonl`."""
        ...

    def read(self, sample_id: int, fields: Sequence[str]) -> bytes:
        """Return the first of `fields` that the sample has.

        Raises: BadSample if it has none of them or its value cannot be used: the sample is replaced by another one and
            listed in `quarantine.jsonl`. Any other exception ends the run, such as an OSError of the storage.
        """
        ...


@runtime_checkable
class ShardedSource(SampleSource, Protocol):
    """A `SampleSource` whose samples lie in shards, which may be remote. `Selection` and `Shards` are such sources."""

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64] | None:
        """Number of samples of each shard, int64 [n], which add up to `num_samples`; None if they are not known."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether samples have to be fetched before they are read."""
        ...

    @property
    def is_indexed(self) -> bool:
        """Whether a sample can be fetched without its shard."""
        ...

    def prefetch(self, sample_ids: npt.NDArray[np.int64], is_urgent: bool) -> None:
        """Fetch samples in the background.

        Args:
            sample_ids: ids of the samples, int64 [n].
            is_urgent: whether they are read now, and come before others.
        """
        ...


@runtime_checkable
class ClassifiedSource(SampleSource, Protocol):
    """A `SampleSource` that knows the names of its classes."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes, in the order of the numbers in `cls`; None if there are none."""
        ...


def field_limit(field: str) -> int:
    """Return the limit on the size of a field, in bytes: 512 MiB for an image, 16 MiB for anything else."""
    return _MAX_IMAGE_BYTES if field in IMAGE_EXTENSIONS else _MAX_TEXT_BYTES


def check_field_size(field: str, size: int) -> None:
    """Raise BadSample if a field exceeds its limit."""
    limit = field_limit(field)
    if size > limit:
        raise BadSample(f"its {field} member has {size} bytes, more than the limit of {limit}", "member_size")


class Fingerprint(str):
    """Fingerprint of a source that consists of files, as stored in checkpoints: `HASH:` and 4 characters per file."""

    paths: Sequence[str]
    identities: Sequence[bytes]

    @classmethod
    def of(
        cls, paths: Sequence[str], identities: Sequence[bytes], kept: npt.NDArray[np.int64] | None = None
    ) -> "Fingerprint":
        """Hash what identifies each file, and the selection of samples.

        Args:
            paths: location of each file, for messages alone.
            identities: bytes that change with the content of each file, but not with its folder.
            kept: ids of the selected samples, int64 [m]; None for all.
        """
        digest = hashlib.blake2b(digest_size=16)
        for identity in identities:
            digest.update(identity)
        if kept is not None:
            digest.update(kept.tobytes())
        hashes = (hashlib.blake2b(identity, digest_size=3).digest() for identity in identities)
        files = "".join(base64.b64encode(value).decode() for value in hashes)
        fingerprint = cls(f"{digest.hexdigest()}:{files}")
        fingerprint.paths, fingerprint.identities = paths, identities
        return fingerprint

    @property
    def hash(self) -> str:
        """Hash of all the data, 32 hexadecimal digits."""
        return self.partition(":")[0]

    def is_of(self, saved: str) -> bool:
        """Return True if the saved fingerprint is of the same data. Only the hash counts; old checkpoints have no more."""
        return saved.partition(":")[0] == self.hash

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


class Selection:
    """Samples of several sources, one after another, or some of them; a `SampleSource`.

    Args:
        sources: the sources, in order.
        kept: ids of the samples to keep among all of them, ascending, int64 [m]; None keeps all.
    """

    def __init__(self, sources: Sequence[SampleSource], kept: npt.NDArray[np.int64] | None = None) -> None:
        self.sources = sources
        self.kept = kept
        self._ends = list(accumulate(source.num_samples for source in sources))

    @property
    def num_stored(self) -> int:
        """Number of samples of the sources, kept or not."""
        return self._ends[-1]

    @property
    def num_samples(self) -> int:
        return self.num_stored if self.kept is None else len(self.kept)

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of all the sources' files and the kept ids."""
        paths: list[str] = []
        identities: list[bytes] = []
        for source in self.sources:
            fingerprint = source.fingerprint
            if isinstance(fingerprint, Fingerprint):
                paths += fingerprint.paths
                identities += fingerprint.identities
            else:
                paths.append(source.location(0))
                identities.append(fingerprint.encode() + b"\n")
        return Fingerprint.of(paths, identities, self.kept)

    @property
    def shard_sizes(self) -> npt.NDArray[np.int64] | None:
        sizes = [source.shard_sizes if isinstance(source, ShardedSource) else None for source in self.sources]
        known = [each for each in sizes if each is not None]
        if len(known) < len(sizes):
            return None
        stored = np.concatenate(known)
        if self.kept is None:
            return stored
        return np.bincount(np.searchsorted(np.cumsum(stored), self.kept, side="right"), minlength=len(stored))

    @property
    def is_remote(self) -> bool:
        return any(isinstance(source, ShardedSource) and source.is_remote for source in self.sources)

    @property
    def is_indexed(self) -> bool:
        return all(not isinstance(source, ShardedSource) or source.is_indexed for source in self.sources)

    def prefetch(self, sample_ids: npt.NDArray[np.int64], is_urgent: bool) -> None:
        stored = sample_ids if self.kept is None else self.kept[sample_ids]
        owners = np.searchsorted(self._ends, stored, side="right")
        for i in np.unique(owners).tolist():
            source = self.sources[i]
            if isinstance(source, ShardedSource):
                source.prefetch(stored[owners == i] - (self._ends[i - 1] if i else 0), is_urgent)

    def key(self, sample_id: int) -> str:
        source, own_id = self._locate(sample_id)
        return source.key(own_id)

    def location(self, sample_id: int) -> str:
        source, own_id = self._locate(sample_id)
        return source.location(own_id)

    def read(self, sample_id: int, fields: Sequence[str]) -> bytes:
        source, own_id = self._locate(sample_id)
        return source.read(own_id, fields)

    def _locate(self, sample_id: int) -> tuple[SampleSource, int]:
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id}, expected 0 to {self.num_samples - 1}")
        if self.kept is not None:
            sample_id = int(self.kept[sample_id])
        i = bisect_right(self._ends, sample_id)
        return self.sources[i], sample_id - (self._ends[i - 1] if i else 0)


def selected(source: SampleSource, ids: npt.NDArray[np.int64]) -> SampleSource:
    """Return the samples `ids` of a source, ascending, int64 [m]."""
    if not isinstance(source, Selection):
        return Selection([source], ids)
    return Selection(source.sources, ids if source.kept is None else source.kept[ids])


def class_names_of(source: SampleSource) -> Sequence[str] | None:
    """Return the names of a source's classes, in the order of the numbers in `cls`; None if it knows none."""
    (*_, last) = source.sources if isinstance(source, Selection) else (source,)
    return last.class_names if isinstance(last, ClassifiedSource) else None


def concatenated(parts: Sequence[SampleSource]) -> SampleSource:
    """Concatenate sources, in their order; each keeps its selection of samples."""
    selections = [part if isinstance(part, Selection) else Selection([part]) for part in parts]
    sources = [source for part in selections for source in part.sources]
    if all(part.kept is None for part in selections):
        return Selection(sources)
    firsts = np.cumsum([0, *(part.num_stored for part in selections[:-1])])
    kept = [np.arange(part.num_stored) if part.kept is None else part.kept for part in selections]
    return Selection(sources, np.concatenate([first + ids for first, ids in zip(firsts, kept, strict=True)]))


def _compressed(pattern: str) -> str | None:
    """Return a compressed tar in a folder, or None."""
    return next((path for end in ("*.tgz", "*.tar.gz") for path in glob.glob(f"{glob.escape(pattern)}/{end}")), None)


def expand_paths(
    patterns: str | Sequence[str], root: str | None = None, key: str = "shards", kind: str = "tar"
) -> list[str]:
    """Expand brace patterns, globs and folders (their files of a kind), relative to `root`, to paths of files.

    Args:
        patterns: a pattern, or several.
        root: folder of relative patterns.
        key: name of the option, for messages.
        kind: suffix of the files, without a dot.

    Raises: ValueError if a pattern matches nothing, names a missing file, or is remote.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched: list[str] = []
        for part in braceexpand.braceexpand(pattern):
            if "://" in part:
                raise ValueError(f"{key} {pattern!r}: expected local {kind}s; copy remote ones first")
            path = os.path.join(root or "", part)
            if os.path.isdir(path):
                matched += sorted(glob.glob(os.path.join(glob.escape(path), f"*.{kind}")))
            elif os.path.exists(path):
                matched.append(path)
            elif glob.has_magic(path):
                matched += sorted(glob.glob(path, recursive=True))
            else:
                raise ValueError(
                    f"{key} {pattern!r}: no file {path!r}; name existing {kind}s, a folder of them or a glob"
                )
        if not matched:
            if kind == "tar" and (packed := _compressed(os.path.join(root or "", pattern))):
                raise ValueError(f"{key} {pattern!r}: {packed} is compressed; unpack it first: gunzip -k {packed}")
            where = f" in {os.path.abspath(root or '.')!r}"
            raise ValueError(
                f"{key} {pattern!r}: no {kind} matches{where}; name existing {kind}s, a folder of them or a glob"
            )
        paths += matched
    if not paths:
        raise ValueError(f"{key} []: expected at least one {kind}, a folder of them or a glob")
    return paths
