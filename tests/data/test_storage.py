"""Bytes at an offset, from real files."""

import os
import pickle
from pathlib import Path

import pytest

from mmpretrain.data.storage import LocalStorage


def open_files_under(folder: Path) -> int:
    """How many of this process's descriptors are of files in `folder`."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # the one that lists
            continue
    return sum(target.startswith(f"{folder}{os.sep}") for target in targets)


def test_reads_exactly_the_range(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    storage = LocalStorage()
    for offset, size in [(0, 2560), (0, 0), (5, 1), (1000, 1560), (2559, 1)]:
        assert storage.read(str(path), offset, size) == data[offset : offset + size]


def test_a_missing_file_is_an_io_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        LocalStorage().read(str(tmp_path / "gone.tar"), 0, 1)


def test_a_file_cut_short_is_an_io_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(100))
    storage = LocalStorage()
    assert storage.read(str(path), 90, 10) == bytes(10)
    os.truncate(path, 95)
    with pytest.raises(OSError, match=r"expected 10 bytes at offset 90, got 5.*a\.tar"):
        storage.read(str(path), 90, 10)
    assert open_files_under(tmp_path) == 0


def test_a_failed_read_is_tried_again_on_the_file_that_lies_there_now(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.tar", tmp_path / "whole"
    path.write_bytes(b"half")
    whole.write_bytes(b"half and half")
    storage = LocalStorage()
    assert storage.read(str(path), 0, 4) == b"half"
    whole.rename(path)
    assert storage.read(str(path), 4, 9) == b" and half"


def test_few_files_stay_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.tar" for i in range(300)]
    for i, path in enumerate(paths):
        path.write_bytes(i.to_bytes(4, "big"))
    storage = LocalStorage()
    for _ in range(2):
        assert [int.from_bytes(storage.read(str(path), 0, 4), "big") for path in paths] == list(range(300))
        assert 1 < open_files_under(tmp_path) <= 256


def test_a_copy_opens_its_own_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"abc")
    storage = LocalStorage()
    storage.read(str(path), 0, 3)
    copy = pickle.loads(pickle.dumps(storage))
    assert open_files_under(tmp_path) == 1
    assert copy.read(str(path), 1, 2) == b"bc"
    assert open_files_under(tmp_path) == 2


def test_a_forked_child_reads_beside_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(range(200)))
    storage = LocalStorage()
    storage.read(str(path), 0, 1)
    child = os.fork()
    if child == 0:
        right = all(storage.read(str(path), i, 1)[0] == i for i in range(200))
        os._exit(0 if right else 1)
    assert all(storage.read(str(path), i, 1)[0] == i for i in range(200))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
