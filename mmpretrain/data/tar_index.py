"""Index of a tar: the offset and size of every member, found by a scan of the headers."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmpretrain.data.storage import NotRegular, open_regular
from mmpretrain.data.tar_headers import Cut, Damage, as_text, regular_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # extensions of the images that training reads
CAPTION_EXTENSIONS = ("txt", "text", "caption")
MAX_EXTENSIONS = 256
_NAMED_PER_PROBLEM = 10
# webdataset's rule, also for names that begin with a dot or hold line breaks.
_KEY_AND_EXTENSION = re.compile(rb"^((?:.*/|)[^.]+)[.]([^/]*)$")
_METADATA_NAME = re.compile(rb"__[^/]*__($|/)")  # webdataset skips these names, too


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
    num_duplicates = 0
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
                    num_duplicates += 1
                    if num_duplicates <= _NAMED_PER_PROBLEM:  # a tar may repeat one a million times
                        problems.append(f"duplicate member {as_text(name)!r} at byte {offset}: the first one counts")
                    continue
                rows.append(row)
                offsets.append(offset)
                sizes.append(size)
                headers.append(header)
        except Damage as damage:
            if not keys and stat.st_size and not isinstance(damage, Cut):
                raise ValueError(
                    f"{path}: {_packed(fd, path) or f'{damage}; expected a plain, uncompressed tar'}"
                ) from None
            problems.append(str(damage))
            split = _split_name(damage.name) if isinstance(damage, Cut) else None
            if split is not None and split[0] == previous:
                keys.pop()
    finally:
        os.close(fd)

    if num_duplicates > _NAMED_PER_PROBLEM:
        problems.append(f"{num_duplicates - _NAMED_PER_PROBLEM} more duplicate members")
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


_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


def _packed(fd: int, path: str | os.PathLike[str]) -> str | None:
    """Describe a compressed tar, with the command that unpacks it; None for any other file."""
    begin = os.pread(fd, 8, 0)
    command = next((command for magic, command in _COMPRESSED.items() if begin.startswith(magic)), None)
    return (
        command
        and f"it is compressed; expected a plain, uncompressed tar: {command} < {os.fspath(path)} > unpacked.tar"
    )


def _frequent(columns: Mapping[bytes, tuple[list[int], ...]], problems: list[str]) -> list[bytes]:
    """Return the most frequent extensions. With dots inside names, every member would have its own extension."""
    extensions = sorted(columns, key=lambda extension: (-len(columns[extension][0]), extension))
    if left_out := extensions[MAX_EXTENSIONS:]:
        problems.append(
            f"{len(extensions)} extensions, of which the {MAX_EXTENSIONS} most frequent are kept (not such as "
            f"{as_text(left_out[0])[:40]!r}): a key ends at the first dot of a member's name; rename the members"
        )
    return extensions[:MAX_EXTENSIONS]


def _split_name(name: bytes) -> tuple[bytes, bytes] | None:
    if name.startswith(b"__") and _METADATA_NAME.match(name):
        return None
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    if dot > base and b"\n" not in name:
        key, extension = name[:dot], name[dot + 1 :]
    elif found := _KEY_AND_EXTENSION.match(name):
        key, extension = found.groups()
    else:
        return None
    if extension.isascii():
        return key, extension.lower()
    return key, as_text(extension).lower().encode("utf-8", "surrogateescape")


def is_text_alone(extensions: Iterable[str]) -> bool:
    """Return True if a tar with these members needs no images: captions, with nothing but json beside them."""
    suffixes = {_suffix(extension) for extension in extensions}
    # A tar meant to have images would have other members.
    return not suffixes.isdisjoint(CAPTION_EXTENSIONS) and suffixes <= {*CAPTION_EXTENSIONS, "json"}


def _suffix(extension: str) -> str:
    """Return the kind of a member: `png` for `seg.png`, and `txt` for `txt.gz`."""
    return extension.removesuffix(".gz").rpartition(".")[2]


def _sample_problems(
    keys: list[bytes],
    starts: list[int],
    members: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
) -> list[str]:
    """Report repeated keys, and samples without an image or a caption.

    A tar of texts alone needs no images, and one of labelled images (`cls`) no captions.
    """

    def named(rows: Sequence[int] | npt.NDArray[np.int64]) -> str:
        shown = ", ".join(f"{as_text(keys[row])!r} at byte {starts[row]}" for row in rows[:_NAMED_PER_PROBLEM])
        more = len(rows) - _NAMED_PER_PROBLEM
        return f"{shown} and {more} more" if more > 0 else shown

    problems = []
    if len(set(keys)) < len(keys):
        seen: set[bytes] = set()
        repeated = [row for row, key in enumerate(keys) if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        problems.append(f"{len(repeated)} duplicate keys: {named(repeated)}")
    suffixes = {extension: _suffix(extension) for extension in members}
    captions = [extension for extension, suffix in suffixes.items() if suffix in CAPTION_EXTENSIONS]
    wanted = {
        "an image": [extension for extension, suffix in suffixes.items() if suffix in IMAGE_EXTENSIONS],
        # A json may hold the caption, but does not count as one in a tar that has caption members.
        "a caption": captions or [extension for extension, suffix in suffixes.items() if suffix == "json"],
    }
    if is_text_alone(members):
        del wanted["an image"]
    if "cls" in suffixes.values() and not wanted["a caption"]:
        del wanted["a caption"]
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
