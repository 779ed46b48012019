"""Index of a tar: the offset and size of every member, stored beside the tar.

A tar is scanned once. Its index, `NAME.tar.index.npz`, records the tar's size and modification time and is valid as
long as both agree. The tar itself stays as WebDataset or img2dataset wrote it.
"""

import hashlib
import io
import json
import logging
import math
import os
import re
import threading
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmpretrain.data.storage import NotRegular, open_regular
from mmpretrain.data.tar_headers import HEADER_BYTES, Cut, Damage, as_text, regular_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # extensions of the images that training reads
CAPTION_EXTENSIONS = ("txt", "text", "caption")

_INDEX_VERSION = 4
_MAX_EXTENSIONS = 256
_NAMED_PER_PROBLEM = 10
_METADATA_NAME = re.compile(rb"__[^/]*__($|/)")  # webdataset skips these names, too
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TarIndex:
    """Offset index of a tar with n samples.

    `members` maps an extension to offsets and sizes in bytes, int64 [n] each; the size is -1 if a sample lacks it.
    `header_sums` maps an extension to a checksum of the header block in front of each member, uint32 [n].
    `key_blob` (uint8) holds all keys in UTF-8, and `key_ends` (int64 [n]) the end of each: a tenth of the memory of n
    strings.
    `digest` covers every header, members of up to 8 KiB whole, and the beginning, middle and end of larger ones.
    `problems` lists the defects of the tar.
    """

    key_blob: npt.NDArray[np.uint8]
    key_ends: npt.NDArray[np.int64]
    members: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
    header_sums: dict[str, npt.NDArray[np.uint32]]
    tar_bytes: int
    mtime_ns: int
    digest: str
    problems: list[str]

    @property
    def num_samples(self) -> int:
        return len(self.key_ends)

    @property
    def keys(self) -> list[str]:
        return [self.key(row) for row in range(self.num_samples)]

    def key(self, row: int) -> str:
        """Return the key of sample `row`: the path of its members up to the first dot of the base name."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.key_blob[start : int(self.key_ends[row])].tobytes().decode("utf-8", "surrogateescape")


# ---------------------------------------------------------------- scanning a tar


def index_tar(path: str | os.PathLike[str]) -> TarIndex:
    """Scan the headers of a tar and group its members into samples by WebDataset's rule.

    Consecutive members with the same key (the path up to the first dot of the base name) form one sample. The rest
    of the name, lower-cased, is the extension; the 256 most frequent extensions are kept. `problems` lists damage and
    odd samples. A sample that is cut off by the end of the file is left out.

    Raises: ValueError if the file is not a plain tar; OSError.
    """
    keys: list[bytes] = []
    starts: list[int] = []
    columns: dict[bytes, tuple[list[int], list[int], list[int], list[int]]] = {}  # rows, offsets, sizes, header sums
    problems: list[str] = []
    digest = hashlib.sha256()  # in hardware: three times faster than blake2b
    previous: bytes | None = None
    try:
        fd = open_regular(path)
    except NotRegular as error:
        raise ValueError(f"{path} is {error.strerror}; expected a plain, uncompressed tar") from None
    try:
        stat = os.fstat(fd)
        try:
            for name, offset, size, header in regular_members(fd, stat.st_size, digest, problems):
                split = _split_name(name)
                if split is None:
                    continue
                key, extension = split
                if key != previous:
                    previous = key
                    keys.append(key)
                    starts.append(offset)
                row = len(keys) - 1
                column = columns.get(extension)
                if column is None:
                    column = columns[extension] = ([], [], [], [])
                rows, offsets, sizes, headers = column
                if rows and rows[-1] == row:
                    problems.append(f"duplicate member {as_text(name)!r} at byte {offset}: the first one counts")
                    continue
                rows.append(row)
                offsets.append(offset)
                sizes.append(size)
                headers.append(header)
        except Damage as damage:
            if not keys and stat.st_size and not isinstance(damage, Cut):
                raise ValueError(f"{path}: {damage}; expected a plain, uncompressed tar") from None
            problems.append(str(damage))
            split = _split_name(damage.name) if isinstance(damage, Cut) else None
            if split is not None and split[0] == previous:
                keys.pop()
    finally:
        os.close(fd)

    count = len(keys)
    members, header_sums = {}, {}
    for extension in sorted(_frequent(columns, problems)):
        column = columns[extension]
        if column[0][-1] == count:  # belongs to the sample that was cut off
            for values in column:
                values.pop()
        rows, offsets, sizes, headers = column
        if rows:
            placed = np.zeros(count, np.int64), np.full(count, -1, np.int64)
            placed[0][rows], placed[1][rows] = offsets, sizes
            members[as_text(extension)] = placed
            header_sums[as_text(extension)] = np.zeros(count, np.uint32)
            header_sums[as_text(extension)][rows] = headers
    problems += _sample_problems(keys, starts, members)
    return TarIndex(
        key_blob=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum(np.fromiter(map(len, keys), np.int64, count)),
        members=members,
        header_sums=header_sums,
        tar_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        digest=digest.hexdigest(),
        problems=problems,
    )


def _frequent(columns: Mapping[bytes, tuple[list[int], ...]], problems: list[str]) -> list[bytes]:
    """Return the most frequent extensions. With dots inside names, every member would have its own extension."""
    extensions = sorted(columns, key=lambda extension: (-len(columns[extension][0]), extension))
    if left_out := extensions[_MAX_EXTENSIONS:]:
        problems.append(
            f"{len(extensions)} extensions, of which the {_MAX_EXTENSIONS} most frequent are kept (not such as "
            f"{as_text(left_out[0])[:40]!r}): a key ends at the first dot of a member's name; rename the members"
        )
    return extensions[:_MAX_EXTENSIONS]


def _split_name(name: bytes) -> tuple[bytes, bytes] | None:
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    if dot <= base or (name.startswith(b"__") and _METADATA_NAME.match(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


def _sample_problems(
    keys: list[bytes],
    starts: list[int],
    members: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
) -> list[str]:
    """Report repeated keys, and samples without an image or a caption. A tar of texts alone needs no images."""

    def named(rows: Sequence[int] | npt.NDArray[np.int64]) -> str:
        shown = ", ".join(f"{as_text(keys[row])!r} at byte {starts[row]}" for row in rows[:_NAMED_PER_PROBLEM])
        more = len(rows) - _NAMED_PER_PROBLEM
        return f"{shown} and {more} more" if more > 0 else shown

    problems = []
    if len(set(keys)) < len(keys):
        seen: set[bytes] = set()
        repeated = [row for row, key in enumerate(keys) if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        problems.append(f"{len(repeated)} duplicate keys: {named(repeated)}")
    suffixes = {extension: extension.rpartition(".")[2] for extension in members}
    captions = [extension for extension, suffix in suffixes.items() if suffix in CAPTION_EXTENSIONS]
    wanted = {
        "an image": [extension for extension, suffix in suffixes.items() if suffix in IMAGE_EXTENSIONS],
        # A json may hold the caption, but does not count as one in a tar that has caption members.
        "a caption": captions or [extension for extension, suffix in suffixes.items() if suffix == "json"],
    }
    if captions and all(suffix in (*CAPTION_EXTENSIONS, "json") for suffix in suffixes.values()):
        del wanted["an image"]  # a tar meant to have images would have other members
    for what, extensions in wanted.items():
        present = np.zeros(len(keys), bool)
        for extension in extensions:
            present |= members[extension][1] >= 0
        absent = np.flatnonzero(~present)
        if len(absent) == len(keys) and keys:
            problems.append(f"none of the {len(keys)} samples has {what}")
        elif len(absent):
            problems.append(f"{len(absent)} samples without {what}: {named(absent)}")
    return problems


# ---------------------------------------------------------------- the stored index


def index_path(tar: str | os.PathLike[str]) -> Path:
    """Return the path of a tar's index beside the tar, used if the folder is writable."""
    return Path(f"{os.fspath(tar)}.index.npz")


def cached_index_path(tar: str | os.PathLike[str]) -> Path:
    """Return the path of a tar's index in `$XDG_CACHE_HOME/mmpretrain/indexes`, used if its folder is not writable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.blake2b(os.path.abspath(tar).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return cache / "mmpretrain" / "indexes" / f"{name}.index.npz"


def write_index(index: TarIndex, path: str | os.PathLike[str]) -> None:
    """Write an index to a temporary file and rename it into place. Several processes may write it at once."""
    path = Path(path)
    header = {
        "version": _INDEX_VERSION,
        "extensions": list(index.members),
        "tar_bytes": index.tar_bytes,
        "mtime_ns": index.mtime_ns,
        "digest": index.digest,
        "problems": index.problems,
    }
    shape = (len(index.members), index.num_samples)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(
                file,
                header=np.frombuffer(json.dumps(header).encode(), np.uint8),
                key_blob=index.key_blob,
                key_ends=index.key_ends,
                offsets=np.array([offsets for offsets, _ in index.members.values()], np.int64).reshape(shape),
                sizes=np.array([sizes for _, sizes in index.members.values()], np.int64).reshape(shape),
                header_sums=np.array(list(index.header_sums.values()), np.uint32).reshape(shape),
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class OldIndex(ValueError):
    """The stored index has another version."""


def _most_index_bytes(tar_bytes: int) -> int:
    """Return an upper bound on the size of an index, in bytes, for a tar of `tar_bytes` bytes.

    A sample takes at least one block of the tar. In the index it takes 8 bytes, 20 per extension, its key and its
    problems. Keys and problems hold names from the tar, at most six bytes per byte as text.
    """
    return (1 << 20) + tar_bytes // HEADER_BYTES * (8 + 20 * _MAX_EXTENSIONS) + 8 * tar_bytes


def read_index(path: str | os.PathLike[str], tar_bytes: int | None = None) -> TarIndex:
    """Read a stored index.

    No array larger than the file is allocated, and all values must be valid for a tar of the size that the index
    records.

    Args:
        path: path of the index.
        tar_bytes: size of the tar; an index too large for such a tar is not read. None skips this check.

    Raises: OSError (FileNotFoundError) if it cannot be opened; NotRegular if it is not a regular file; ValueError if it
        is not a valid index; OldIndex if it has another version.
    """
    with open(open_regular(path), "rb") as file:
        try:
            file_bytes = os.fstat(file.fileno()).st_size
            if tar_bytes is not None and file_bytes > _most_index_bytes(tar_bytes):
                raise ValueError(f"{file_bytes} bytes, too many for a tar of {tar_bytes}")
            with zipfile.ZipFile(file) as archive:
                if any(max(info.file_size, info.compress_size) > file_bytes for info in archive.infolist()):
                    raise ValueError(f"an array is larger than the file's {file_bytes} bytes")
                header = json.loads(_stored_array(archive, "header", np.uint8, 1).tobytes())
                if header["version"] != _INDEX_VERSION:
                    raise OldIndex(f"{path}: index of version {header['version']}, expected {_INDEX_VERSION}")
                return _valid_index(
                    header,
                    _stored_array(archive, "key_blob", np.uint8, 1),
                    _stored_array(archive, "key_ends", np.int64, 1),
                    _stored_array(archive, "offsets", np.int64, 2),
                    _stored_array(archive, "sizes", np.int64, 2),
                    _stored_array(archive, "header_sums", np.uint32, 2),
                )
        except OldIndex:
            raise
        except Exception as error:  # zipfile, NumPy and json raise many exceptions, OSError among them
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise ValueError(f"{path}: unusable index ({reason}); it is made again") from error


def _stored_array(archive: zipfile.ZipFile, name: str, dtype: npt.DTypeLike, num_dimensions: int) -> npt.NDArray[Any]:
    """Return an array of an uncompressed .npz, without a copy. Raises: ValueError; errors of zipfile."""
    info = archive.getinfo(f"{name}.npy")
    # The archive's directory states the size, which may be wrong; without compression, no more than the file is read.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    file = io.BytesIO(archive.read(info))
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{name} is not an array of format version 1.0")
    shape, fortran_order, found = np.lib.format.read_array_header_1_0(file)
    if found != dtype or fortran_order or len(shape) != num_dimensions:
        raise ValueError(f"{name} is {found} {shape}, expected {np.dtype(dtype)} of {num_dimensions} dimensions")
    data = file.getbuffer()[file.tell() :]
    if math.prod(shape) * found.itemsize != len(data):
        raise ValueError(f"{name} has {len(data)} bytes for {shape} numbers")
    return np.frombuffer(data, found).reshape(shape)


def _valid_index(
    header: Mapping[str, Any],
    key_blob: npt.NDArray[np.uint8],
    key_ends: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    header_sums: npt.NDArray[np.uint32],
) -> TarIndex:
    """Return the index after checking that its parts are consistent with each other and with the tar's size.

    Raises: ValueError, KeyError or TypeError if they are not.
    """
    extensions, problems, tar_bytes = header["extensions"], header["problems"], header["tar_bytes"]
    for texts in (extensions, problems, [header["digest"]]):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("extensions, problems and digest must be strings")
    if type(tar_bytes) is not int or type(header["mtime_ns"]) is not int:
        raise ValueError("tar_bytes and mtime_ns must be integers")
    if len(set(extensions)) < len(extensions) or not (
        offsets.shape == sizes.shape == header_sums.shape == (len(extensions), len(key_ends))
    ):
        raise ValueError(f"offsets {offsets.shape}, sizes {sizes.shape} for {len(key_ends)} keys of {extensions}")
    bounds = np.concatenate([[0], key_ends])
    if not (bounds[1:] > bounds[:-1]).all() or bounds[-1] != len(key_blob):
        raise ValueError("key_ends do not ascend to the end of key_blob")
    # Compare with tar_bytes - offsets, since offsets + sizes can overflow.
    inside = (sizes >= 0) & (offsets >= 512) & (offsets % 512 == 0) & (offsets <= tar_bytes)
    if not (inside & (sizes <= tar_bytes - offsets) | (sizes == -1)).all():
        raise ValueError(f"members outside of the tar's {tar_bytes} bytes")
    return TarIndex(
        key_blob=key_blob,
        key_ends=key_ends,
        members={extension: (offsets[i], sizes[i]) for i, extension in enumerate(extensions)},
        header_sums={extension: header_sums[i] for i, extension in enumerate(extensions)},
        tar_bytes=tar_bytes,
        mtime_ns=header["mtime_ns"],
        digest=header["digest"],
        problems=problems,
    )


def load_index(tar: str | os.PathLike[str]) -> TarIndex:
    """Return a tar's stored index if it matches the tar's size and modification time; else build and store a new one.

    An unreadable or damaged index is rebuilt, with a warning. A warning is also logged if neither the tar's folder nor
    the cache is writable.

    Raises: errors of `index_tar`.
    """
    stat = os.stat(tar)
    for path in (index_path(tar), cached_index_path(tar)):
        try:
            index = read_index(path, stat.st_size)
        except FileNotFoundError:
            continue
        except OldIndex as error:
            _logger.info("%s; it is made again", error)
            continue
        except OSError as error:
            _logger.warning("%s: the stored index cannot be read (%s); the tar is scanned", path, error.strerror)
            continue
        except ValueError as error:
            _logger.warning("%s", error)
            continue
        if (index.tar_bytes, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return index
    index = index_tar(tar)
    store_index(index, tar)
    return index


def store_index(index: TarIndex, tar: str | os.PathLike[str]) -> Path | None:
    """Write a tar's index beside the tar, or else to the cache.

    Returns: the path of the index; None, with a warning, if neither is writable.
    """
    try:
        write_index(index, index_path(tar))
        return index_path(tar)
    except OSError as beside:
        cached = cached_index_path(tar)
        _logger.info("%s: its index goes to the cache (%s)", tar, beside)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_index(index, cached)
            return cached
        except OSError as error:
            _logger.warning("%s: index not stored (%s; %s): it is scanned again every time", tar, beside, error)
            return None
