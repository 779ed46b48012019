"""Bytes at an offset, from real files."""

import os
import pickle
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmpretrain.data import storage
from mmpretrain.data.decode import BadSample
from mmpretrain.data.shards import Shards
from mmpretrain.data.storage import FileChanged, NotRegular, read_range
from tests.tars import write_tars


@pytest.fixture(autouse=True)
def no_open_files() -> Iterator[None]:
    storage._opened.cache_clear()
    yield
    storage._opened.cache_clear()


def open_files_under(folder: Path) -> int:
    """How many of this process's descriptors are of files in `folder`."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # the one that lists
            continue
    return sum(target.startswith(f"{folder}{os.sep}") for target in targets)


def read(path: Path, offset: int, size: int) -> bytes:
    stat = path.stat()
    return read_range(str(path), offset, size, stat.st_size, stat.st_mtime_ns)


def test_reads_exactly_the_range(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    for offset, size in [(0, 2560), (0, 0), (5, 1), (1000, 1560), (2559, 1)]:
        assert read(path, offset, size) == data[offset : offset + size]


def test_a_missing_file_is_an_io_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        read_range(str(tmp_path / "gone.tar"), 0, 1, 1, 0)


def test_a_fifo_is_an_io_error_and_waits_for_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(NotRegular, match=r"not a regular file: .*a\.tar"):
        read(tmp_path / "a.tar", 0, 1)
    assert open_files_under(tmp_path) == 0


def test_a_range_beyond_the_end_is_an_io_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(95))
    with pytest.raises(OSError, match=r"expected 10 bytes at offset 90, got 5.*a\.tar"):
        read(path, 90, 10)
    assert open_files_under(tmp_path) == 0


def test_a_failed_read_is_tried_again_on_the_file_that_lies_there_now(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"half")
    assert read(path, 0, 4) == b"half"
    whole = tmp_path / "whole"
    whole.write_bytes(b"half and half")
    whole.rename(path)
    assert read(path, 4, 9) == b" and half"
    with pytest.raises(FileChanged, match=r"a\.tar was changed or replaced .* 13 bytes, .* indexed with 4 at 7"):
        read_range(str(path), 0, 4, 4, 7)


def test_a_transient_error_is_waited_out(tmp_path: Path) -> None:
    """No descriptor is free when the file is opened, and some are a moment later."""
    path = tmp_path / "a.tar"
    path.write_bytes(b"half and half")
    stat, limits = path.stat(), resource.getrlimit(resource.RLIMIT_NOFILE)
    restore = threading.Timer(0.02, resource.setrlimit, (resource.RLIMIT_NOFILE, limits))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    restore.start()
    try:
        assert read_range(str(path), 5, 3, stat.st_size, stat.st_mtime_ns) == b"and"
    finally:
        restore.join()


@pytest.mark.parametrize("kind", ["missing", "changed"])
def test_an_error_that_no_retry_can_change_is_raised_without_a_pause(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    if kind == "changed":
        path.write_bytes(b"half")
    began = time.monotonic()
    with pytest.raises(FileNotFoundError if kind == "missing" else FileChanged):
        read_range(str(path), 0, 4, 4, 7)
    assert time.monotonic() - began < storage.RETRY_SECONDS[0]


def test_few_files_stay_open_whatever_the_number_of_data_sets(tmp_path: Path) -> None:
    samples = [{"txt": f"text {number}"} for number in range(240)]
    paths = write_tars(tmp_path, samples, [2] * 120)
    sets = [Shards(paths[10 * i : 10 * (i + 1)]) for i in range(12)]
    for _ in range(2):
        texts = [shards.read(sample, ("txt",)).decode() for shards in sets for sample in range(shards.num_samples)]
        assert texts == [f"text {number}" for number in range(240)]
        assert 1 < open_files_under(tmp_path) <= 32


def test_a_copy_of_shards_reads_too(tmp_path: Path) -> None:
    shards = Shards(write_tars(tmp_path, [{"txt": "one"}, {"txt": "two"}], [1, 1]))
    assert shards.read(1, ("jpg", "txt")) == b"two"
    copy = pickle.loads(pickle.dumps(shards))
    assert [copy.read(sample, ("txt",)) for sample in range(2)] == [b"one", b"two"]
    with pytest.raises(BadSample, match="it has no member jpg or png"):
        copy.read(0, ("jpg", "png"))


def test_a_forked_child_reads_beside_its_parent(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.tar" for i in range(2)]
    for path in paths:
        path.write_bytes(bytes(range(200)))
    assert read(paths[0], 0, 1) == b"\0"
    child = os.fork()
    if child == 0:
        right = all(read(path, i, 1)[0] == i for i in range(200) for path in paths)
        storage._opened.cache_clear()
        os._exit(0 if right else 1)
    assert all(read(paths[0], i, 1)[0] == i for i in range(200))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(paths[0], 7, 1) == b"\x07" and open_files_under(tmp_path) == 1
