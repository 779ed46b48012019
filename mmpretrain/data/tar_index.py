"""Where every member of a tar lies: the offset index that stands beside it.

A tar is scanned once. Its index, `NAME.tar.index.npz`, carries the tar's size and modification time and serves
as long as both agree; the tar itself stays what WebDataset or img2dataset wrote.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # what training reads a sample's image from
CAPTION_EXTENSIONS = ("txt", "text", "caption")

_BLOCK = 512
_END_OF_ARCHIVE = bytes(_BLOCK)
_REGULAR_KINDS = frozenset((b"0", b"\0", b"7"))
_EXTENDED_KINDS = frozenset((b"L", b"K", b"x", b"X", b"g"))  # these describe the members behind them
_KINDS_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))  # whatever the size of a link or folder says
_MAX_EXTENDED_BYTES = 1 << 20
_NEEDED_PAX = re.compile(rb"path=|size=|GNU\.sparse")  # path, size: most pax headers hold a time and no more
_INDEX_VERSION = 2
_NAMED_PER_PROBLEM = 10
_METADATA_NAME = re.compile(rb"__[^/]*__($|/)")  # webdataset skips these names, and so do we
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TarIndex:
    """Where the members of a tar's n samples lie.

    `members` maps an extension to offsets and sizes in bytes (int64 [n] each; size -1 where a sample lacks it).
    The keys are one UTF-8 blob (uint8) and the end of each in it (int64 [n]): a tenth of what n strings take.
    `digest` covers every header block, the block before it and the middle of each member; `problems` names what is
    wrong with the tar.
    """

    key_blob: npt.NDArray[np.uint8]
    key_ends: npt.NDArray[np.int64]
    members: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
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
        """The key of sample `row`: its members' path up to the first dot of the base name."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.key_blob[start : int(self.key_ends[row])].tobytes().decode("utf-8", "surrogateescape")


# ---------------------------------------------------------------- scanning a tar


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


class _Damage(Exception):
    """The tar cannot be followed beyond this point; the members found so far stand."""


class _Cut(_Damage):
    """The tar ends inside the member `name`."""

    def __init__(self, name: bytes, message: str) -> None:
        super().__init__(message)
        self.name = name


def index_tar(path: str | os.PathLike[str]) -> TarIndex:
    """Scans a tar's headers and groups its members into samples by WebDataset's rule.

    Consecutive members with one key (the path up to the first dot of the base name) are one sample; the rest
    of the name, lower-cased, is the extension. Damage and odd samples are named in `problems`; a sample that the
    file's end cuts is left out. Raises ValueError where the file is no plain tar at all, and OSError.
    """
    keys: list[bytes] = []
    starts: list[int] = []
    columns: dict[bytes, tuple[list[int], list[int], list[int]]] = {}  # extension -> rows, offsets, sizes
    problems: list[str] = []
    digest = hashlib.sha256()  # in hardware: three times faster than blake2b
    previous: bytes | None = None
    fd = os.open(path, os.O_RDONLY)
    try:
        stat = os.fstat(fd)
        try:
            for name, offset, size in _regular_members(fd, stat.st_size, digest):
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
                    column = columns[extension] = ([], [], [])
                rows, offsets, sizes = column
                if rows and rows[-1] == row:
                    problems.append(f"duplicate member {_text(name)!r} at byte {offset}: the first one counts")
                    continue
                rows.append(row)
                offsets.append(offset)
                sizes.append(size)
        except _Damage as damage:
            if not keys and stat.st_size and not isinstance(damage, _Cut):
                raise ValueError(f"{path}: {damage}; expected a plain, uncompressed tar") from None
            problems.append(str(damage))
            split = _split_name(damage.name) if isinstance(damage, _Cut) else None
            if split is not None and split[0] == previous:
                keys.pop()
    finally:
        os.close(fd)

    count = len(keys)
    members = {}
    for extension, (rows, offsets, sizes) in sorted(columns.items()):
        if rows and rows[-1] == count:  # of the sample that was cut
            rows, offsets, sizes = rows[:-1], offsets[:-1], sizes[:-1]
        if rows:
            placed = np.zeros(count, np.int64), np.full(count, -1, np.int64)
            placed[0][rows], placed[1][rows] = offsets, sizes
            members[_text(extension)] = placed
    problems += _sample_problems(keys, starts, members)
    return TarIndex(
        key_blob=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum(np.fromiter(map(len, keys), np.int64, count)),
        members=members,
        tar_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        digest=digest.hexdigest(),
        problems=problems,
    )


def _regular_members(fd: int, tar_bytes: int, digest: _Digest) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, data offset, size) of each regular file; digests each header with the block before it.

    Reads by `pread`: under `mmap`, a tar that someone truncates meanwhile would end this process with SIGBUS.
    """
    window, start, limit = b"", 0, 0
    position = 0
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    global_pax: dict[bytes, bytes] = {}
    while True:
        data = position + _BLOCK
        first = position - _BLOCK if position else 0
        if data > limit:
            # Small members lie many to a window; behind a large one little more than a header is wanted.
            window_bytes = 1 << 16 if first - start < 1 << 17 else 1 << 13
            window, start = os.pread(fd, window_bytes, first), first
            limit = start + len(window)
        pair = window[first - start : data - start]
        digest.update(pair)
        if data > limit:
            raise _Damage(f"truncated: no end-of-archive block at byte {position}, the file has {tar_bytes}")
        header = pair[-_BLOCK:]
        if header == _END_OF_ARCHIVE:
            return
        try:  # the usual layout: six digits of checksum, eleven of size
            checksum, size = int(header[148:154], 8), int(header[124:135], 8)
        except ValueError:
            checksum, size = _number(header[148:156]), _number(header[124:136])
        if size < 0 or header[135] > 32:
            size = _number(header[124:136])
        # The checksum is the sum of all bytes, its own field counted as eight spaces. Adler-32's low half is 1 + the
        # sum of the bytes modulo 65521, ten times faster than adding them here.
        field = header[148:156]
        rest = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 8 * 32
        if (rest - checksum) % 65521 and (rest - _number(field)) % 65521:
            raise _Damage(f"no tar header at byte {position}")
        kind = header[156:157]
        if kind in _EXTENDED_KINDS:
            if data + size > tar_bytes:
                raise _Damage(f"truncated: the extended header at byte {position} needs {size} bytes")
            if size > _MAX_EXTENDED_BYTES:
                raise _Damage(f"the extended header at byte {position} has {size} bytes, over {_MAX_EXTENDED_BYTES}")
            end = data + size
            content = window[data - start : end - start] if end <= limit else os.pread(fd, size, data)
            if kind == b"L":
                long_name = content.partition(b"\0")[0]
            elif kind == b"g":
                global_pax |= _pax_records(content, position)
            elif kind != b"K" and _NEEDED_PAX.search(content):
                pax = _pax_records(content, position)
            position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK
            continue
        name = header[:100].partition(b"\0")[0]
        if header[345] and header[257:263] == b"ustar\0":
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        if pax or global_pax or long_name is not None:
            records = global_pax | pax
            if any(keyword.startswith(b"GNU.sparse") for keyword in records):
                kind = b"S"
            name = records.get(b"path", name if long_name is None else long_name)
            size = _number(records[b"size"], base=10) if b"size" in records else size
            long_name, pax = None, {}
        if kind in _KINDS_WITHOUT_DATA:
            position = data
            continue
        if kind == b"S":
            raise _Damage(f"sparse file at byte {position}: its data is not in one piece; write it without --sparse")
        position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if data + size > tar_bytes:
            raise _Cut(
                name,
                f"truncated: {_text(name)!r} needs bytes {data} to {data + size}, the file has {tar_bytes}",
            )
        if kind in _REGULAR_KINDS and not name.endswith(b"/"):
            if size > 2 * _BLOCK:
                digest.update(os.pread(fd, _BLOCK, data + size // 2))
            yield name, data, size


def _number(field: bytes, base: int = 8) -> int:
    """A number's digits, padded with spaces and NULs, or GNU's base 256 after the byte 0x80; raises _Damage."""
    try:
        number = int(field.rstrip(b"\0 ") or b"0", base)
    except ValueError:
        number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    if number < 0:
        raise _Damage(f"no number in the header field {field!r}")
    return number


def _pax_records(content: bytes, position: int) -> dict[bytes, bytes]:
    """The `LENGTH KEYWORD=VALUE` lines of a pax header."""
    records = {}
    while content and content[0]:
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        keyword, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if not equals or length > len(content) or not value.endswith(b"\n"):
            raise _Damage(f"malformed pax header at byte {position}")
        records[keyword] = value[:-1]
        content = content[length:]
    return records


def _split_name(name: bytes) -> tuple[bytes, bytes] | None:
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    if dot <= base or (name.startswith(b"__") and _METADATA_NAME.match(name)):
        return None
    return name[:dot], name[dot + 1 :].lower()


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _sample_problems(
    keys: list[bytes],
    starts: list[int],
    members: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
) -> list[str]:
    """Names repeated keys, and samples without an image or a caption."""

    def named(rows: Sequence[int] | npt.NDArray[np.int64]) -> str:
        shown = ", ".join(f"{_text(keys[row])!r} at byte {starts[row]}" for row in rows[:_NAMED_PER_PROBLEM])
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
        # A json may hold the caption, but says nothing in a tar that has captions of their own.
        "a caption": captions or [extension for extension, suffix in suffixes.items() if suffix == "json"],
    }
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
    """Where a tar's index lies when its folder is writable."""
    return Path(f"{os.fspath(tar)}.index.npz")


def cached_index_path(tar: str | os.PathLike[str]) -> Path:
    """Where a tar's index lies when its folder is not writable: `$XDG_CACHE_HOME/mmpretrain/indexes`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.blake2b(os.path.abspath(tar).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return cache / "mmpretrain" / "indexes" / f"{name}.index.npz"


def write_index(index: TarIndex, path: str | os.PathLike[str]) -> None:
    """Writes an index beside itself and renames it into place; several processes may do so at once."""
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
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
        try:
            np.savez(
                file,
                header=np.frombuffer(json.dumps(header).encode(), np.uint8),
                key_blob=index.key_blob,
                key_ends=index.key_ends,
                offsets=np.array([offsets for offsets, _ in index.members.values()], np.int64).reshape(shape),
                sizes=np.array([sizes for _, sizes in index.members.values()], np.int64).reshape(shape),
            )
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read_index(path: str | os.PathLike[str]) -> TarIndex:
    """Reads a stored index; raises FileNotFoundError, and ValueError for a damaged one or another version."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            if header["version"] != _INDEX_VERSION:
                raise ValueError(f"version {header['version']}, expected {_INDEX_VERSION}")
            offsets, sizes, key_ends = arrays["offsets"], arrays["sizes"], arrays["key_ends"]
            if not offsets.shape == sizes.shape == (len(header["extensions"]), len(key_ends)):
                raise ValueError(f"offsets {offsets.shape} and sizes {sizes.shape} for {len(key_ends)} keys")
            return TarIndex(
                key_blob=arrays["key_blob"],
                key_ends=key_ends,
                members={extension: (offsets[i], sizes[i]) for i, extension in enumerate(header["extensions"])},
                tar_bytes=header["tar_bytes"],
                mtime_ns=header["mtime_ns"],
                digest=header["digest"],
                problems=header["problems"],
            )
    except (
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as error:
        raise ValueError(f"{path}: damaged index ({error}); delete it and it is made again") from error


def load_index(tar: str | os.PathLike[str]) -> TarIndex:
    """A tar's stored index if the tar's size and modification time agree, else a fresh one, stored.

    Raises what `index_tar` does. Where neither the tar's folder nor the cache is writable, it logs a warning.
    """
    stat = os.stat(tar)
    for path in (index_path(tar), cached_index_path(tar)):
        try:
            index = read_index(path)
        except FileNotFoundError:
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
    """Writes a tar's index beside it, else into the cache; returns where, None (and warns) if it cannot."""
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
