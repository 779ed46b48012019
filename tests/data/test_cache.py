"""Files of the cache are fetched once, never read in part, and never take more space than allowed."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from mmpretrain.data.cache import Cache
from mmpretrain.errors import CacheError, TrainingError, Unreachable, UsageError, enough_space, usage_errors
from tests import runs


def content(name: str, size: int) -> bytes:
    return (name.encode() * size)[:size]


def writes(name: str, size: int) -> Callable[[int], None]:
    return lambda descriptor: os.pwrite(descriptor, content(name, size), 0)


def read(cache: Cache, name: str, size: int, fetch: Callable[[int], None] | None = None) -> bytes:
    with cache.opened(name, size, fetch or writes(name, size)) as descriptor:
        return os.pread(descriptor, size + 1, 0)


def held(folder: Path) -> int:
    """Bytes of all files, while none can be added or removed to make room."""
    with open(folder / "lock", "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = {}
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):  # renamed meanwhile
                sizes[entry.inode()] = entry.stat().st_size
        return sum(sizes.values())


def test_a_file_is_fetched_once_and_the_ones_unused_for_longest_make_room(tmp_path: Path) -> None:
    cache, fetched = Cache(tmp_path / "cache", 100), []

    def get(name: str) -> None:
        def fetch(descriptor: int) -> None:
            fetched.append(name)
            writes(name, 40)(descriptor)

        assert read(cache, name, 40, fetch) == content(name, 40)

    for name in ("a", "b", "a", "c", "a", "b"):
        get(name)
    assert fetched == ["a", "b", "c", "b"]
    assert held(tmp_path / "cache") == 80
    with pytest.raises(ValueError, match=r"^data\.cache_bytes is 100, but one file needs 101 bytes"):
        read(cache, "d", 101)


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(1000))
    (tmp_path / "movie.partial").write_bytes(bytes(1000))
    cache = Cache(tmp_path, 100)
    for name in "abc":
        assert read(cache, name, 60) == content(name, 60)
    assert {path.name for path in tmp_path.iterdir()} >= {"pytorch_model.bin", "movie.partial"}


def test_ensure_fetches_what_is_not_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    cache.ensure("a", 10, writes("a", 10))
    cache.ensure("a", 10, lambda _: pytest.fail("fetched again"))
    assert read(cache, "a", 10, lambda _: pytest.fail("fetched again")) == content("a", 10)


def test_a_file_that_was_cut_off_is_fetched_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    for use in (read, Cache.ensure):
        read(cache, "a", 10)
        (file,) = tmp_path.glob("*.bin")
        os.truncate(file, 5)
        use(cache, "a", 10, writes("a", 10))
        assert file.stat().st_size == 10 and read(cache, "a", 10) == content("a", 10)


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fdatasync = [], os.fdatasync

    def recorded(descriptor: int) -> None:
        fdatasync(descriptor)
        synced.append((os.pread(descriptor, 10, 0), [path.suffix for path in tmp_path.glob("*.*")]))

    monkeypatch.setattr(os, "fdatasync", recorded)
    read(Cache(tmp_path, 100), "a", 10)
    assert synced == [(content("a", 10), [".partial"])]


def test_a_folder_without_space_names_the_settings_of_the_cache(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    code = f"from tests.data.test_cache import *; print(len(read(Cache({str(tmp_path)!r}, 5000), 'a', 2000)))"
    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limited, capture_output=True, text=True)
    told = f"CacheError: data.cache_dir {str(tmp_path)!r} cannot be written (File too large); expected a folder with "
    assert told + "data.cache_bytes (5,000) of space" in done.stderr
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"data\.cache_dir '.*file/cache' cannot be written \(Not a directory\)"):
        read(Cache(tmp_path / "file" / "cache", 100), "a", 10)
    for convert, kind in ((usage_errors(), UsageError), (enough_space(tmp_path), TrainingError)):
        with pytest.raises(kind, match=r"^data\.cache_dir cannot"), convert:
            raise CacheError("data.cache_dir cannot")


def use_many(folder: str, first: int) -> None:
    """Read files of a cache that holds three of them, and check the bound whenever one is fetched."""
    cache = Cache(folder, 3000)

    def fetch(name: str, descriptor: int) -> None:
        assert held(Path(folder)) <= 3000
        writes(name, 1000)(descriptor)

    def use(i: int) -> None:
        name = str((first + i) % 7)
        assert read(cache, name, 1000, partial(fetch, name)) == content(name, 1000)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(use, range(100)))


def test_processes_and_threads_share_a_cache_within_its_bound(tmp_path: Path) -> None:
    users = [runs.start(use_many, str(tmp_path), first) for first in range(3)]
    for user in users:
        user.join()
    assert [user.exitcode for user in users] == [0, 0, 0]
    assert held(tmp_path) <= 3000


def die_while_fetching(folder: str) -> None:
    def fetch(descriptor: int) -> None:
        os.pwrite(descriptor, b"half", 0)
        os.kill(os.getpid(), signal.SIGKILL)

    read(Cache(folder, 100), "a", 60, fetch)


def test_what_a_killed_process_left_is_not_read_and_makes_room(tmp_path: Path) -> None:
    killed = runs.start(die_while_fetching, str(tmp_path))
    killed.join()
    assert held(tmp_path) == 60
    cache = Cache(tmp_path, 100)
    assert read(cache, "b", 60) == content("b", 60) and held(tmp_path) == 60
    assert read(cache, "a", 60) == content("a", 60)


def test_all_who_wait_for_a_file_are_told_that_it_is_unreachable(tmp_path: Path) -> None:
    cache, has_begun, may_fail = Cache(tmp_path, 100), threading.Event(), threading.Event()

    def fails(_: int) -> None:
        has_begun.set()
        may_fail.wait()
        raise Unreachable("the server is away")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read, cache, "a", 10, fails)
        has_begun.wait()
        cache.ensure("a", 10, lambda _: pytest.fail("it is being fetched"))
        second = pool.submit(read, cache, "a", 10, lambda _: pytest.fail("nobody else tries"))
        while not _is_locked_by_two(tmp_path):
            pass
        may_fail.set()
        for waiting in (first, second):
            with pytest.raises(Unreachable, match="the server is away"):
                waiting.result()
    assert held(tmp_path) == 0
    assert read(cache, "a", 10) == content("a", 10), "the next one tries again"


def _is_locked_by_two(folder: Path) -> bool:
    """Whether one thread holds the lock of the partial file and another one waits for it (/proc/locks)."""
    (partial_file,) = folder.glob("*.partial")
    inode = f":{partial_file.stat().st_ino} "
    return sum(inode in line for line in Path("/proc/locks").read_text().splitlines()) == 2
