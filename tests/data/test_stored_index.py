"""Indexes stored beside tars: read back, refreshed when the tar changes, made again when damaged."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmpretrain.data.shards import Shards
from mmpretrain.data.storage import FileChanged
from mmpretrain.data.stored_index import cached_index_path, index_path, load_index, read_index, store_index, write_index
from mmpretrain.data.tar_index import TarIndex, index_tar
from tests.tars import pairs, write_members


def same_index(a: TarIndex, b: TarIndex) -> bool:
    fields = ("keys", "tar_bytes", "mtime_ns", "digest", "problems")
    return all(getattr(a, field) == getattr(b, field) for field in fields) and all(
        np.array_equal(a.members[extension], b.members[extension]) for extension in {*a.members, *b.members}
    )


@pytest.mark.parametrize("keys", [["a", "Ü/b", "c" * 90], []])
def test_a_stored_index_is_read_back(tmp_path: Path, keys: list[str]) -> None:
    index = index_tar(write_members(tmp_path / "a.tar", [*pairs(keys)]))
    write_index(index, tmp_path / "a.npz")
    assert same_index(read_index(tmp_path / "a.npz"), index)
    assert [path.name for path in tmp_path.glob(".*")] == []  # no temporary file is left


def test_the_stored_index_is_used_while_the_tar_stays_and_refreshed_when_it_changes(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", pairs(["a"]))
    load_index(path)
    assert index_path(path).name == "a.tar.index.npz"
    stat = path.stat()
    write_members(path, pairs(["b"]))  # of the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_index(path).keys == ["a"]  # the stored one: nothing says that the tar changed
    with pytest.raises(FileChanged, match=r"a\.tar is not what its index says \(another header at byte 0\).*remove "):
        Shards([str(path)]).read(0, ["jpg"])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load_index(path).keys == ["b"]
    assert read_index(index_path(path)).keys == ["b"]


def rewritten_index(path: Path, compressed: bool = False, **changed: object) -> None:
    """A stored index with other arrays, or other values in its header."""
    with np.load(path) as arrays:
        parts = dict(arrays)
    header = json.loads(parts["header"].tobytes())
    for name, value in changed.items():
        if name in parts:
            parts[name] = np.asarray(value(parts[name]) if callable(value) else value)
        else:
            header[name] = value
    if "header" not in changed:
        parts["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    (np.savez_compressed if compressed else np.savez)(path, **parts)


@pytest.mark.parametrize(
    "changed",
    [
        {"offsets": lambda offsets: offsets.astype(np.int32)},
        {"offsets": lambda offsets: offsets.astype(np.float64)},
        {"offsets": lambda offsets: offsets + (1 << 40)},
        {"offsets": lambda offsets: offsets - 4096},
        {"offsets": lambda offsets: offsets + 1},
        {"offsets": lambda offsets: offsets * 0 + (2**63 - 512)},
        {"offsets": lambda offsets: offsets[:, :1]},
        {"offsets": lambda offsets: offsets[0]},
        {"sizes": lambda sizes: sizes - 100},
        {"sizes": lambda sizes: sizes * 0 + (2**63 - 1)},
        {"header_sums": lambda sums: sums.astype(np.int64)},
        {"key_ends": lambda ends: ends[::-1]},
        {"key_ends": lambda ends: ends * 0},
        {"key_ends": lambda ends: ends + 1},
        {"key_ends": np.array([2**62, -(2**63)])},
        {"key_blob": lambda blob: blob[:-1]},
        {"header": np.frombuffer(b"\xff\xfe{}", np.uint8)},
        {"header": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"header": np.frombuffer(b"[]", np.uint8)},
        {"extensions": ["jpg", "jpg"]},
        {"extensions": [1, 2]},
        {"extensions": "jt"},
        {"problems": None},
        {"digest": 7},
        {"mtime_ns": 1.5},
        {"tar_bytes": 10**30},
        {"tar_bytes": 0},
        {"compressed": True},
    ],
)
def test_an_index_that_cannot_be_is_made_again(
    tmp_path: Path, changed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_members(tmp_path / "a.tar", pairs(["a", "b"]))
    load_index(path)
    stored = index_path(path)
    whole = stored.read_bytes()
    rewritten_index(stored, **changed)
    with pytest.raises(ValueError, match=r"a\.tar\.index\.npz: unusable index \(.*\)$"):
        read_index(stored)
    assert load_index(path).keys == ["a", "b"] and stored.read_bytes() == whole
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "a.tar.index.npz" in caplog.text


def test_an_index_of_another_version_is_made_again_without_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_members(tmp_path / "a.tar", pairs(["a", "b"]))
    load_index(path)
    rewritten_index(index_path(path), version=3)
    assert load_index(path).keys == ["a", "b"] and not caplog.records
    assert read_index(index_path(path)).keys == ["a", "b"]


@pytest.mark.parametrize("where", ["shape", "directory"])
def test_planted_sizes_allocate_nothing(tmp_path: Path, where: str) -> None:
    path = write_members(tmp_path / "a.tar", pairs(["a", "b"]))
    load_index(path)
    data = bytearray(index_path(path).read_bytes())
    if where == "shape":
        place = data.index(b"(2, 2)")
        data[place : place + 12] = b"(2, 9999999)"
    else:
        entry = data.index(b"PK\1\2")
        data[entry + 20 : entry + 28] = (0xFFFF_FFF0).to_bytes(4, "little") * 2
    index_path(path).write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match="unusable index"):
        read_index(index_path(path))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_an_index_that_cannot_be_opened_is_told_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_members(tmp_path / "a.tar", pairs(["a"]))
    index_path(path).mkdir()
    assert load_index(path).keys == ["a"]
    assert f"{index_path(path)}: the stored index cannot be read (not a regular file)" in caplog.text
    assert read_index(cached_index_path(path)).keys == ["a"]


@pytest.mark.parametrize("kind", ["device", "fifo", "huge"])
def test_an_index_that_is_endless_is_made_again(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_members(tmp_path / "a.tar", pairs(["a"]))
    if kind == "device":
        index_path(path).symlink_to("/dev/zero")
    elif kind == "fifo":
        os.mkfifo(index_path(path))
    else:
        index_path(path).touch()
        os.truncate(index_path(path), 1 << 40)
    assert load_index(path).keys == ["a"]
    reason = "for a tar of" if kind == "huge" else "not a regular file"
    assert reason in caplog.text and str(index_path(path)) in caplog.text
    assert not index_path(path).is_symlink() and read_index(index_path(path)).keys == ["a"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "pickle"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    path = write_members(tmp_path / "a.tar", pairs(["a", "b"]))
    load_index(path)
    stored = index_path(path)
    data = stored.read_bytes()
    flipped = bytearray(data)
    flipped[data.index(b"ab")] ^= 1  # in the keys
    if damage == "pickle":
        np.savez(stored, header=np.array([{"version": 1}], dtype=object))
    else:
        stored.write_bytes({"truncated": data[:-60], "flipped": flipped, "empty": b"", "text": b"index"}[damage])
    with pytest.raises(ValueError, match=r"unusable index"):
        read_index(stored)
    assert load_index(path).keys == ["a", "b"]
    assert stored.read_bytes() == data


def test_the_cache_serves_where_the_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_members(tmp_path / "a.tar", pairs(["a"]))
    index_path(path).mkdir()  # whoever runs this, root included, cannot rename a file onto a folder
    cached = cached_index_path(path)
    assert store_index(index_tar(path), path) == cached
    assert cached.is_relative_to(tmp_path / "cache" / "mmpretrain" / "indexes")
    assert same_index(read_index(cached), index_tar(path))
