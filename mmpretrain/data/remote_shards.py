"""Remote tars: their indexes and sample counts, and their bytes through a local cache.

A tar with an index is read in ranges of 16 MiB, which hold neighbouring samples. A tar without one is fetched whole when a
sample of it is first needed, and indexed then; the number of its samples has to be known before.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmpretrain.data.cache import Cache
from mmpretrain.data.fetcher import Fetcher
from mmpretrain.data.remote import Remote, check_address, check_parents, is_remote
from mmpretrain.data.shard_table import ShardTable
from mmpretrain.data.storage import FileChanged
from mmpretrain.data.stored_index import INDEX_SUFFIX, index_place, mirrored, read_header, read_index
from mmpretrain.data.tar_index import TarIndex, index_tar
from mmpretrain.errors import Forbidden, Unreachable
from mmpretrain.files import MAX_JSON_BYTES, parse_json

Item = TypeVar("Item")
Result = TypeVar("Result")

RANGE_BYTES = 16 << 20
_REQUESTS = 16  # at a time, while the tars are opened
_MAX_TAR_BYTES = 1 << 50
_PAGE_BYTES = 64  # from which a web page is told


class _Row(NamedTuple):
    """What is known of a tar before it is read; `digest` is empty if it has no index."""

    num_samples: int
    digest: str
    problems: Sequence[str] = ()


class RemoteShards:
    """Storage of remote tars, through a cache that the processes of a machine share.

    Args:
        cache: the cache.
        index_dir: folder or address of the indexes; None: they lie beside the tars.
        deadline_seconds: time after which a request that fails again and again raises its error.
    """

    def __init__(self, cache: Cache, index_dir: str | None, deadline_seconds: float) -> None:
        self._cache = cache
        self._index_dir = index_dir
        self._remote = Remote(deadline_seconds)
        self._fetcher = Fetcher()
        self._objects: dict[str, tuple[int, str]] = {}  # size and version of the objects that are read whole
        self._refused: list[str] = []  # why files that may describe the tars were taken as missing

    def expand(self, patterns: Iterable[str], key: str = "shards") -> list[str]:
        """Expand globs and folders to the addresses of tars. An address that ends in `.tar` is taken as it is.

        Raises: ValueError if nothing matches, or for an address with credentials or `..`; Unreachable.
        """
        urls: list[str] = []
        for pattern in patterns:
            check_address(pattern, key)
            if any(sign in pattern for sign in "*[?"):
                found = self._remote.glob(pattern)
            else:
                found = [pattern] if pattern.endswith(".tar") else self._remote.glob(f"{pattern.rstrip('/')}/*.tar")
            if not found:
                raise ValueError(f"{key} {pattern!r}: no tar there; name tars, a folder that can be listed, or a glob")
            for url in found:
                check_parents(url)
            urls += found
        return urls

    def open(self, urls: Sequence[str]) -> ShardTable:
        """Find the number of samples of each tar, without reading the tars.

        Beside the tars, or under `index_dir`, these are looked for: `manifest.json` (as `data_tools build` writes it),
        `shards.json` (`data_tools index`), the indexes, `sizes.json` (WebDataset) and `NAME_stats.json` (img2dataset).
        One that the server forbids, or answers with a web page, counts as missing.

        Raises: ValueError if the number of samples of a tar is not known; Unreachable.
        """
        folders: dict[str, list[str]] = defaultdict(list)
        for url in urls:
            folder, _, name = url.rpartition("/")
            folders[folder].append(name)
        known = {
            f"{folder}/{name}": row for folder in folders for name, row in self._rows(folder, folders[folder]).items()
        }
        for url in urls:
            if url not in known:
                raise ValueError(
                    f"{url}: the number of its samples is not known; expected an index, shards.json, sizes.json or "
                    f"{_stats_name(url.rpartition('/')[2])} beside it or in data.index_dir: `python -m data_tools index "
                    f"{url.rpartition('/')[0]}/ --index-dir DIR` makes them{''.join(f'; {why}' for why in self._refused[:1])}"
                )
            if known[url].num_samples < 1:
                raise ValueError(f"shard {url!r}: no sample in it, expected at least one; leave it out")
        rows = [known[url] for url in urls]
        problems = [f"{url}: {problem}" for url, row in zip(urls, rows, strict=True) for problem in row.problems]
        return ShardTable.of(urls, [row.num_samples for row in rows], [row.digest for row in rows], problems)

    def _rows(self, folder: str, names: Sequence[str]) -> dict[str, _Row]:
        """Return what is known of the tars of a folder, by name."""
        place = mirrored(folder, self._index_dir)
        listed = self._listing(place)

        def content(name: str) -> dict[str, Any]:
            return self._json(f"{place}/{name}") if listed is None or name in listed else {}

        def lacking(rows: Mapping[str, _Row]) -> list[str]:
            return [name for name in names if name not in rows]

        has_index = {name: listed is None or name + INDEX_SUFFIX in listed for name in names}
        rows: dict[str, _Row] = {}
        for file in ("shards.json", "manifest.json"):
            for name, row in _described(content(file), f"{place}/{file}").items():
                rows[name] = row if has_index.get(name) else row._replace(digest="")
        wanted = [f"{folder}/{name}" for name in lacking(rows) if has_index[name]]
        rows |= {url.rpartition("/")[2]: row for url, row in self._each(self._row_of_index, wanted) if row is not None}
        if lacking(rows):
            sizes = content("sizes.json")
            rows |= {
                name: _Row(_count(sizes[name], f"{place}/sizes.json"), "") for name in lacking(rows) if name in sizes
            }
        for name, stats in self._each(lambda name: content(_stats_name(name)), lacking(rows)):
            if "successes" in stats:
                rows[name] = _Row(_count(stats["successes"], f"{place}/{_stats_name(name)}"), "")
        return rows

    def _row_of_index(self, url: str) -> _Row | None:
        place = index_place(url, self._index_dir)
        try:
            with self._whole(place) as descriptor:
                if self._is_page(place, os.pread(descriptor, _PAGE_BYTES, 0)):
                    return None
                with _named(place, url, descriptor):
                    header = read_header(f"/proc/self/fd/{descriptor}", _MAX_TAR_BYTES)
        except (FileNotFoundError, Forbidden) as error:
            self._note(error)
            return None
        return _Row(header.num_samples, header.digest, header.problems)

    def _listing(self, place: str) -> set[str] | None:
        """Return the names in a folder; None if it cannot be listed, as is usual over HTTP."""
        if not is_remote(place):
            return set(os.listdir(place)) if os.path.isdir(place) else set()
        try:
            return {url.rstrip("/").rpartition("/")[2] for url in self._remote.glob(f"{place}/*")} or None
        except (FileNotFoundError, Unreachable):
            return None

    def _json(self, place: str) -> dict[str, Any]:
        """Return the JSON object at a path or address; an empty one if there is none. Raises: ValueError."""
        try:
            num_bytes = self._remote.size(place)[0] if is_remote(place) else os.path.getsize(place)
            if num_bytes > MAX_JSON_BYTES:
                raise ValueError(f"{place} has {num_bytes} bytes; expected at most {MAX_JSON_BYTES}")
            text = self._remote.read_range(place, 0, num_bytes) if is_remote(place) else Path(place).read_bytes()
        except (FileNotFoundError, Forbidden) as error:
            self._note(error)
            return {}
        if self._is_page(place, text):
            return {}
        value = parse_json(text, place)
        return value if isinstance(value, dict) else {}

    def _note(self, error: OSError) -> None:
        if isinstance(error, Forbidden):
            self._refused.append(str(error))

    def _is_page(self, place: str, content: bytes) -> bool:
        """Return True for a web page, with which some servers answer instead of status 404."""
        is_page = content[:_PAGE_BYTES].lstrip().startswith(b"<")
        if is_page:
            self._refused.append(f"{place} is a web page")
        return is_page

    def _each(self, call: Callable[[Item], Result], items: Sequence[Item]) -> Iterable[tuple[Item, Result]]:
        """Call a function for each item, several at a time."""
        if not items:
            return []
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return list(zip(items, pool.map(call, items), strict=True))

    def load_index(self, url: str, digest: str) -> TarIndex:
        """Return the index of a tar: the stored one, or, without a digest, one made of the tar, which is fetched whole.

        Raises: Unreachable, also if the index or the tar is damaged; FileNotFoundError if the stored index is missing.
        """
        if digest:
            index = self._stored_index(url)
            # Where a server tells times in seconds, the cache may hold an index that was replaced within one.
            return index if index.digest == digest else self._stored_index(url, digest)
        with self._newest(url) as descriptor:
            try:
                return index_tar(f"/proc/self/fd/{descriptor}")
            except ValueError as error:
                reason = (str(error).partition(": ")[2] or str(error)).replace(f"/proc/self/fd/{descriptor}", url)
                raise Unreachable(f"{url}: {reason}") from error

    def _stored_index(self, url: str, digest: str = "") -> TarIndex:
        place = index_place(url, self._index_dir)
        with self._newest(place, digest) as descriptor, _named(place, url, descriptor):
            return read_index(f"/proc/self/fd/{descriptor}")

    def read_range(self, url: str, digest: str, index: TarIndex, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset` of a tar.

        Raises: Unreachable; FileNotFoundError; OSError of the cache; FileChanged if a tar without a digest is no longer the
            one that was indexed.
        """
        if not digest:
            with self._whole(url) as descriptor:
                return os.pread(descriptor, size, offset)
        parts = []
        for start, end in _ranges(offset, offset + size, index.tar_bytes):
            with self._cache.opened(*self._range(url, digest, start, end)) as descriptor:
                first = max(offset, start)
                parts.append(os.pread(descriptor, min(offset + size, end) - first, first - start))
        return b"".join(parts)

    def prefetch(
        self, url: str, digest: str, index: TarIndex | None, spans: Iterable[tuple[int, int]], is_urgent: bool
    ) -> None:
        """Fetch parts of a tar in the background, unless they are in the cache.

        Args:
            url: address of the tar.
            digest: digest of its index; empty: the tar is fetched whole.
            index: its index; None without a digest.
            spans: first byte of each part and the one after its last.
            is_urgent: whether the parts come before those that are not urgent.
        """
        if index is None:
            self._fetcher.submit(url, partial(self._ensure_whole, url), is_urgent)
            return
        for start, end in sorted({part for span in spans for part in _ranges(*span, index.tar_bytes)}):
            wanted = self._range(url, digest, start, end)
            self._fetcher.submit(wanted[0], partial(self._cache.ensure, *wanted), is_urgent)

    def _range(self, url: str, digest: str, start: int, end: int) -> tuple[str, int, Callable[[int], None]]:
        """Return the name, the size and the fetching function of a range, for the cache."""
        return f"{url} {digest} {start}-{end}", end - start, partial(self._fetch, url, start, end)

    def _fetch(self, url: str, first: int, end: int, descriptor: int) -> None:
        for start in range(first, end, RANGE_BYTES):
            data = self._remote.read_range(url, start, min(start + RANGE_BYTES, end))
            _write_all(descriptor, data, start - first)

    def _object(self, place: str, digest: str = "") -> tuple[str, int, Callable[[int], None]]:
        """Return the name, with a digest if known, the size and the fetching function of a whole object, for the cache."""
        if place not in self._objects:
            self._objects[place] = self._remote.size(place)
        size, version = self._objects[place]
        return f"{place} {version}{digest}", size, partial(self._fetch_whole, place, size, version)

    def _fetch_whole(self, place: str, size: int, version: str, descriptor: int) -> None:
        """Fetch an object. Raises: FileChanged if its ranges may be of several versions."""
        self._fetch(place, 0, size, descriptor)
        if size > RANGE_BYTES and self._remote.size(place) != (size, version):
            raise FileChanged(
                f"{place} was changed or replaced while it was read; restore it and go on, or start a new run on the "
                "changed file"
            )

    @contextmanager
    def _newest(self, place: str, digest: str = "") -> Iterator[int]:
        """As `_whole`; an object that changes while it is fetched is fetched again, at most twice."""
        with ExitStack() as stack:
            for attempt in range(3):
                try:
                    descriptor = stack.enter_context(self._whole(place, digest))
                    break
                except FileChanged:
                    if attempt == 2:
                        raise
                    self._objects.pop(place, None)
            yield descriptor

    def _ensure_whole(self, place: str) -> None:
        self._cache.ensure(*self._object(place))

    @contextmanager
    def _whole(self, place: str, digest: str = "") -> Iterator[int]:
        """Open a whole file or object, and yield its descriptor."""
        if is_remote(place):
            with self._cache.opened(*self._object(place, digest)) as descriptor:
                yield descriptor
        else:
            with open(place, "rb") as file:
                yield file.fileno()


@contextmanager
def _named(place: str, url: str, descriptor: int) -> Iterator[None]:
    """Convert the ValueError of a damaged index. Raises: Unreachable, with its place and the command that makes it again."""
    try:
        yield
    except ValueError as error:
        raise Unreachable(
            f"{str(error).replace(f'/proc/self/fd/{descriptor}', place)}; make it again with `python -m data_tools index "
            f"{url} --index-dir DIR`, and put it in place"
        ) from error


def _ranges(start: int, end: int, tar_bytes: int) -> list[tuple[int, int]]:
    """Return the ranges of the cache that hold the bytes from `start` to `end`."""
    firsts = range(start // RANGE_BYTES * RANGE_BYTES, end, RANGE_BYTES)
    return [(first, min(first + RANGE_BYTES, tar_bytes)) for first in firsts]


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _stats_name(tar: str) -> str:
    """Return the name of img2dataset's statistics of a tar: `00000_stats.json` for `00000.tar`."""
    return f"{tar.removesuffix('.tar')}_stats.json"


def _described(content: Mapping[str, Any], place: str) -> dict[str, _Row]:
    """Return the rows of a manifest. Raises: ValueError if an entry is malformed."""
    try:
        return {
            str(entry["name"]): _Row(
                _count(entry["num_samples"], place),
                str(entry["digest"]),
                [str(each) for each in entry.get("problems", [])],
            )
            for entry in content.get("shards", [])
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place}: its shards lack {error}; expected name, num_samples and digest of each") from error


def _count(value: Any, place: str) -> int:
    """Return a number of samples. Raises: ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{place} has {value!r} for a number of samples; expected a whole number")
    return value
