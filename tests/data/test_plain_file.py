"""Reading files that others name."""

import os
from pathlib import Path

import pytest

from mmpretrain.data.decode import BadSample
from mmpretrain.data.plain_file import read_file


def test_a_regular_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    data, state = read_file(tmp_path / "a", 5)
    assert data == b"12345" and state.st_size == 5
    with pytest.raises(BadSample, match=r"^5 bytes, more than the limit of 4$"):
        read_file(tmp_path / "a", 4)


def test_a_giant_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "giant", "wb") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(BadSample, match=r"^1000000000000 bytes, more than the limit of 1000$"):
        read_file(tmp_path / "giant", 1000)


def test_a_file_that_does_not_know_its_size_is_read_up_to_the_limit() -> None:
    expected = Path("/proc/version").read_bytes()
    assert read_file("/proc/version", len(expected))[0] == expected
    with pytest.raises(BadSample, match=r"^6 bytes, more than the limit of 5$"):
        read_file("/proc/version", 5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such file"),
        ("file/below", "no such file"),
        ("folder", "a folder, expected a regular file"),
        ("pipe", "a pipe, a socket or a device, expected a regular file"),
        ("device", "a pipe, a socket or a device, expected a regular file"),
        ("loop", "the file cannot be read (Too many levels of symbolic links)"),
        ("x" * 256, "the file cannot be read (File name too long)"),
        ("broken", "the file cannot be read (Input/output error)"),
        ("nul\0", "no such file (embedded null byte)"),
        ("half\ud800", "no such file ('utf-8' codec can't encode"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_reason(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("/proc/self/mem")
    with pytest.raises(BadSample) as error:
        read_file(tmp_path / name, 1000)
    assert str(error.value).startswith(reason)
