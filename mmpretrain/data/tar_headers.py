"""Listing of a tar's members from its headers, without reading the data of large members in full."""

import os
import re
import zlib
from collections.abc import Iterator
from typing import Protocol

HEADER_BYTES = _BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAX_PADDING = 20 << 10  # an archive ends with two blocks of zeros, padded to records of 10 KiB
_MAX_COUNTED = 64 << 20  # bytes of zeros to count at most; a sparse file may have terabytes
_REGULAR_KINDS = frozenset((b"0", b"\0", b"7"))
_EXTENDED_KINDS = frozenset((b"L", b"K", b"x", b"X", b"g"))  # headers that describe the next members
_KINDS_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))  # whatever their size field says
_MAX_EXTENDED_BYTES = 1 << 20
_MAX_SPARSE_NAMED = 100  # a tar may have a million
_WHOLE_BYTES = 1 << 13
_NEEDED_PAX = re.compile(rb"path=|size=|GNU\.sparse")  # most pax headers hold only a time
_PAX_LENGTH = re.compile(rb"(\d{1,7}) ")


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


class Damage(Exception):
    """The tar cannot be read beyond this point; the members found so far are valid."""


class Cut(Damage):
    """The tar ends inside the member `name`."""

    def __init__(self, name: bytes, message: str) -> None:
        super().__init__(message)
        self.name = name


def as_text(name: bytes) -> str:
    """Decode a member's name to text, reversibly."""
    return name.decode("utf-8", "surrogateescape")


def header_sum(header: bytes) -> int:
    """Return a checksum of a header block, uint32."""
    return zlib.adler32(header)


def regular_members(
    fd: int, tar_bytes: int, digest: _Digest, problems: list[str]
) -> Iterator[tuple[bytes, int, int, int]]:
    """Yield (name, data offset, size, `header_sum` of the block before the data) of each regular file in a tar.

    The tar is read by `pread`: under `mmap`, truncating the tar meanwhile would end this process with SIGBUS.

    Args:
        fd: file descriptor of the tar.
        tar_bytes: size of the tar, in bytes.
        digest: updated with each header and the block before it, with members of up to 8 KiB (captions, labels, json)
            whole, and with the first and middle block of larger members. Reading every image in full would take as long
            as training on them.
        problems: receives sparse members, and irregularities at the end of the archive, or at an apparent end. Data behind
            the end are not read.

    Raises: Damage if the tar cannot be read further; Cut if it ends inside a member.
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
            # One window covers many small members; after a large member little more than a header is needed.
            window_bytes = 1 << 16 if first - start < 1 << 17 else 1 << 13
            window, start = os.pread(fd, window_bytes, first), first
            limit = start + len(window)
        pair = window[first - start : data - start]
        digest.update(pair)
        if data > limit:
            raise Damage(f"truncated: no end-of-archive block at byte {position}, the file has {tar_bytes}")
        header = pair[-_BLOCK:]
        if header == _ZEROS:
            zero_bytes = _count_zeros(fd, position, tar_bytes)
            if problem := _end_problem(position, zero_bytes, tar_bytes):
                problems.append(problem)
            if zero_bytes < 2 * _BLOCK and data < tar_bytes:
                position = data
                continue
            return
        try:  # the usual layout: six digits of checksum, eleven of size
            checksum, size = int(header[148:154], 8), int(header[124:135], 8)
        except ValueError:
            checksum, size = _number(header[148:156]), _number(header[124:136])
        if size < 0 or header[135] > 32:
            size = _number(header[124:136])
        # The checksum is the sum of all bytes, with its own field taken as eight spaces. The low half of Adler-32 is
        # 1 + the sum of the bytes modulo 65521, and ten times faster than adding them in Python.
        field = header[148:156]
        sum_of_header = zlib.adler32(header)
        rest = (sum_of_header & 0xFFFF) - 1 - sum(field) + 8 * 32
        if (rest - checksum) % 65521 and (rest - _number(field)) % 65521:
            raise Damage(f"no tar header at byte {position}")
        kind = header[156:157]
        if kind in _EXTENDED_KINDS:
            if data + size > tar_bytes:
                raise Damage(f"truncated: the extended header at byte {position} needs {size} bytes")
            if size > _MAX_EXTENDED_BYTES:
                raise Damage(f"the extended header at byte {position} has {size} bytes, over {_MAX_EXTENDED_BYTES}")
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
        is_folder = kind == b"\0" and name.endswith(b"/")  # as the oldest format has folders
        if header[345] and header[257:263] == b"ustar\0":
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        if pax or global_pax or long_name is not None:
            records = global_pax | pax
            if any(keyword.startswith(b"GNU.sparse") for keyword in records):
                kind = b"S"
            if long_name is not None:
                name = long_name
            if b"path" in records:
                name = records[b"path"].rstrip(b"/")
            size = _number(records[b"size"], base=10) if b"size" in records else size
            long_name, pax = None, {}
        if kind in _KINDS_WITHOUT_DATA:
            position = data
            continue
        if kind == b"S":
            if len(problems) < _MAX_SPARSE_NAMED:
                problems.append(
                    f"sparse file {as_text(name)!r} at byte {position} is passed over: its data is not in one piece; write "
                    "it without --sparse"
                )
            is_extended = kind == header[156:157] and header[482]
            while is_extended:  # blocks of GNU's map stand between the header and the data
                block = os.pread(fd, _BLOCK, data)
                digest.update(block)
                data += _BLOCK
                is_extended = len(block) == _BLOCK and block[504]
            position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK
            if position > tar_bytes:
                raise Cut(
                    name, f"truncated: {as_text(name)!r} needs bytes {data} to {data + size}, the file has {tar_bytes}"
                )
            continue
        position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if data + size > tar_bytes:
            raise Cut(
                name,
                f"truncated: {as_text(name)!r} needs bytes {data} to {data + size}, the file has {tar_bytes}",
            )
        if kind in _REGULAR_KINDS and not is_folder:
            wanted = size if size <= _WHOLE_BYTES else _BLOCK
            at_hand = data + wanted <= limit
            digest.update(window[data - start : data - start + wanted] if at_hand else os.pread(fd, wanted, data))
            if size > wanted:
                digest.update(os.pread(fd, _BLOCK, data + size // 2))
            yield name, data, size, sum_of_header


def _count_zeros(fd: int, position: int, tar_bytes: int) -> int:
    """Count the zero bytes from `position` on. Counting stops soon after 64 MiB."""
    end = position
    while end < tar_bytes and end - position <= _MAX_COUNTED and (chunk := os.pread(fd, 1 << 20, end)):
        if kept := chunk.lstrip(b"\0"):
            return end + len(chunk) - len(kept) - position
        end += len(chunk)
    return end - position


def _end_problem(position: int, zero_bytes: int, tar_bytes: int) -> str | None:
    """Describe the problem of a zero block in place of a header; None if it properly ends the archive."""
    after = position + zero_bytes // _BLOCK * _BLOCK
    if zero_bytes < 2 * _BLOCK:
        return f"a lone block of zeros at byte {position}; expected a member, or the two blocks that end an archive"
    if zero_bytes > _MAX_COUNTED:
        return (
            f"not read: bytes {after} to {tar_bytes}, after {_MAX_COUNTED >> 20} MiB of zeros from byte {position} on; an "
            "archive ends with a few thousand, so the tar is damaged or a sparse file"
        )
    if position + zero_bytes < tar_bytes:
        return (
            f"not read: bytes {after} to {tar_bytes}, since the archive ends at byte {position}; pack concatenated tars "
            "again; zeros inside a tar are damage"
        )
    if zero_bytes > _MAX_PADDING:
        return (
            f"{zero_bytes} bytes of zeros from byte {position} to the end; an archive ends with a few thousand, so the "
            "tar may be damaged"
        )
    return None


def _number(field: bytes, base: int = 8) -> int:
    """Parse a number: digits padded with spaces and NULs, or GNU's base 256 after the byte 0x80. Raises: Damage."""
    try:
        number = int(field.rstrip(b"\0 ") or b"0", base)
    except ValueError:
        number = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    if number < 0:
        raise Damage(f"no number in the header field {field!r}")
    return number


def _pax_records(content: bytes, position: int) -> dict[bytes, bytes]:
    """Parse the `LENGTH KEYWORD=VALUE` records of a pax header; keep those on a member's path, size or sparseness.

    Raises: Damage if a record is malformed.
    """
    records = {}
    start = 0
    while start < len(content) and content[start]:
        found = _PAX_LENGTH.match(content, start)
        end = start + int(found[1]) if found else 0
        keyword, equals, value = content[found.end() if found else end : end].partition(b"=")
        if not equals or end > len(content) or not value.endswith(b"\n"):
            raise Damage(f"malformed pax header at byte {position}")
        if keyword in (b"path", b"size") or keyword.startswith(b"GNU.sparse"):
            records[keyword] = value[:-1]
        start = end
    return records
