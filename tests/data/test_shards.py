"""Offset indexes against tarfile and webdataset themselves, and random access over several tars."""

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mmpretrain.data.decode import BadSample
from mmpretrain.data.shards import Shards, expand_shards
from mmpretrain.data.source import Fingerprint, selected
from mmpretrain.data.storage import FileChanged
from mmpretrain.data.tar_index import (
    TarIndex,
    cached_index_path,
    index_path,
    index_tar,
    load_index,
    read_index,
    store_index,
    write_index,
)

Member = tuple[str, bytes]


def write_tar(path: Path, members: list[Member], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def pairs(keys: list[str], image: bytes = b"image", caption: bytes = b"caption") -> list[Member]:
    return [member for key in keys for member in ((f"{key}.jpg", image), (f"{key}.txt", caption))]


def read_samples(path: Path, index: TarIndex) -> list[dict[str, bytes | str]]:
    data = path.read_bytes()
    samples: list[dict[str, bytes | str]] = []
    for row, key in enumerate(index.keys):
        sample: dict[str, bytes | str] = {"__key__": key}
        for extension, (offsets, sizes) in index.members.items():
            if sizes[row] >= 0:
                sample[extension] = data[offsets[row] : offsets[row] + sizes[row]]
        samples.append(sample)
    return samples


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(4))
def test_index_is_what_webdataset_reads(tmp_path: Path, format: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ["plain", "Ünïcode", "deep/er.folder/name", "with space"]
    if format != tarfile.USTAR_FORMAT:
        names += ["long" * 60, "folder/" * 40 + "name"]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for number in range(60):
            key = f"{rng.choice(names)}{number}"
            for extension in rng.permutation(["JPG", "txt", "seg.png", "json", ""])[: rng.integers(1, 5)]:
                header = tarfile.TarInfo(f"{key}.{extension}" if extension else f"{key}_without_extension")
                header.size = int(rng.choice([0, 1, 511, 512, 513, 70_000]))
                header.mtime = float(
                    rng.uniform(0, 1 << 30)
                )  # as webdataset's TarWriter has it; pax keeps the fraction
                tar.addfile(header, io.BytesIO(rng.bytes(header.size)))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
                other = tarfile.TarInfo(f"{key}.{kind.decode()}")
                other.type, other.linkname = kind, f"{key}.jpg" if kind != tarfile.SYMTYPE else "x" * 50
                tar.addfile(other)
            for name in (f".hidden{number}.txt", f"__meta__/{number}.txt"):
                header = tarfile.TarInfo(name)
                header.size = 3
                tar.addfile(header, io.BytesIO(b"abc"))
    expected = [
        {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert len(expected) > 40
    assert read_samples(path, index_tar(path)) == expected


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sizes_beyond_eight_gigabytes(tmp_path: Path, format: int) -> None:
    size = (9 << 30) + 5
    big = tarfile.TarInfo("a.bin")
    big.size = size
    header = big.tobuf(format=format)
    small = tarfile.TarInfo("a.txt")
    small.size = 2
    path = tmp_path / "big.tar"
    with open(path, "wb") as file:  # a sparse file: it takes a few kilobytes
        file.write(header)
        file.seek(len(header) + size + (-size % 512))
        file.write(small.tobuf() + b"ab" + bytes(510 + 1024))
    index = index_tar(path)
    assert index.keys == ["a"]
    assert index.members["bin"][1].tolist() == [size]
    assert index.members["txt"][0].tolist() == [len(header) + size + (-size % 512) + 512]


def rewritten_header(path: Path, size: bytes, checksum: str) -> None:
    """The first header with another size field (12 bytes), and its checksum in another layout."""
    data = bytearray(path.read_bytes())
    data[124:136], data[148:156] = size, b" " * 8
    data[148:156] = (checksum % sum(data[:512])).encode()
    path.write_bytes(data)


@pytest.mark.parametrize("checksum", ["%06o\0 ", "%07o\0", "%6o\0 ", "%08o", "%7o "])
@pytest.mark.parametrize(
    "size", [b"00000000005\0", b"00000000005 ", b"          5 ", b"000000000005", b"5" + bytes(11)]
)
def test_numbers_in_other_writers_layouts(tmp_path: Path, size: bytes, checksum: str) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a"], image=b"image"))
    rewritten_header(path, size, checksum)
    index = index_tar(path)
    assert index.problems == [] and index.members["jpg"][1].tolist() == [5]


@pytest.mark.parametrize("size", [b"-0000000512\0", b"xxxxxxxxxxx\0", b"\xff" * 12, b"00000000009\0"])
def test_sizes_that_are_none_end_the_scan(tmp_path: Path, size: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a"]))
    rewritten_header(path, size, "%06o\0 ")
    with pytest.raises(ValueError, match="no number in the header field"):
        index_tar(path)


def test_dtypes_and_absent_members(tmp_path: Path) -> None:
    index = index_tar(write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.txt", b"2"), ("b.jpg", b"3")]))
    offsets, sizes = index.members["txt"]
    assert offsets.dtype == sizes.dtype == index.key_ends.dtype == np.int64
    assert sizes.tolist() == [1, -1]


def test_problems_are_named(tmp_path: Path) -> None:
    members = [*pairs(["a", "b"]), ("c.jpg", b""), ("d.txt", b""), *pairs(["a"]), ("e.jpg", b"1"), ("e.jpg", b"2")]
    index = index_tar(write_tar(tmp_path / "a.tar", members))
    assert index.keys == ["a", "b", "c", "d", "a", "e"]
    problems = "\n".join(index.problems)
    assert "1 duplicate keys: 'a' at byte 5632" in problems
    assert "duplicate member 'e.jpg'" in problems
    assert "1 samples without an image: 'd'" in problems
    assert "2 samples without a caption: 'c'" in problems and "'e'" in problems
    offsets, sizes = index.members["jpg"]
    assert (tmp_path / "a.tar").read_bytes()[offsets[5] : offsets[5] + sizes[5]] == b"1"  # the first one counts


def test_a_json_counts_as_caption_only_where_no_sample_has_another(tmp_path: Path) -> None:
    json_only = [("a.jpg", b""), ("a.json", b"{}"), ("b.jpg", b""), ("b.json", b"{}")]
    assert index_tar(write_tar(tmp_path / "json.tar", json_only)).problems == []
    mixed = index_tar(write_tar(tmp_path / "mixed.tar", [*json_only, *pairs(["c"])]))
    assert len(mixed.problems) == 1 and "2 samples without a caption: 'a'" in mixed.problems[0]
    images = index_tar(write_tar(tmp_path / "images.tar", [("a.jpg", b""), ("b.jpg", b"")]))
    assert images.problems == ["none of the 2 samples has a caption"]


def test_every_truncation_is_named_and_leaves_whole_samples(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", pairs(["a", "b", "c"], image=b"x" * 700)).read_bytes()
    end_of_members = 3 * (512 + 1024 + 512 + 512)
    cut = tmp_path / "cut.tar"
    for length in range(513, end_of_members + 1, 101):
        cut.write_bytes(whole[:length])
        index = index_tar(cut)
        assert "truncated" in index.problems[0], length
        for sample in read_samples(cut, index):
            assert sample.get("jpg", b"x" * 700) == b"x" * 700 and sample.get("txt", b"caption") == b"caption"
    cut.write_bytes(b"")
    assert index_tar(cut).num_samples == 0 and "truncated" in index_tar(cut).problems[0]


def test_the_cut_sample_is_left_out(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a", "b"], caption=b"y" * 600))
    second_caption = int(index_tar(path).members["txt"][0][1])
    path.write_bytes(path.read_bytes()[: second_caption + 20])
    index = index_tar(path)
    assert index.keys == ["a"]
    assert index.problems == [
        f"truncated: 'b.txt' needs bytes {second_caption} to {second_caption + 600}, the file has {second_caption + 20}"
    ]


def test_damage_inside_ends_the_scan_and_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a", "b", "c"]))
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 3] ^= 1  # the header of b.jpg
    path.write_bytes(data)
    index = index_tar(path)
    assert index.keys == ["a"] and index.problems == ["no tar header at byte 2048"]


@pytest.mark.parametrize("content", [b"\x1f\x8b" + bytes(2000), b"not a tar" * 200, b"short", b"9" * 4096])
def test_what_is_no_tar_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar.*expected a plain, uncompressed tar") as error:
        index_tar(tmp_path / "a.tar")
    assert "\n" not in str(error.value)


def end_of_members(path: Path) -> int:
    """Where the archive's end begins."""
    index = index_tar(path)
    ends = [int((offsets + sizes).max()) for offsets, sizes in index.members.values()]
    return -(-max(ends) // 512) * 512


def test_a_shard_that_is_zero_from_its_middle_on_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs([f"{i:02d}" for i in range(20)], image=b"x" * 5000))
    middle = int(index_tar(path).members["txt"][0][9]) + 512
    data = path.read_bytes()
    path.write_bytes(data[:middle] + bytes(len(data) - middle))
    index = index_tar(path)
    assert index.num_samples == 10
    (problem,) = index.problems
    assert problem.startswith(f"{len(data) - middle} bytes of zeros from byte {middle} to the end")


@pytest.mark.parametrize("zero_bytes", [1024, 1536, 10_240, 11_264])
def test_zeros_that_end_an_archive_are_no_problem(tmp_path: Path, zero_bytes: int) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a"]))
    path.write_bytes(path.read_bytes()[: end_of_members(path)] + bytes(zero_bytes))
    assert index_tar(path).problems == []


@pytest.mark.parametrize("lost", ["nothing", "a header"])
def test_a_lone_block_of_zeros_is_told_and_reading_goes_on(tmp_path: Path, lost: str) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a", "b", "c"]))
    data = path.read_bytes()
    place = int(index_tar(path).members["jpg"][0][1]) - 512
    path.write_bytes(data[:place] + bytes(512) + data[place + (512 if lost == "a header" else 0) :])
    index = index_tar(path)
    lone = f"a lone block of zeros at byte {place}; expected a member, or the two blocks that end an archive"
    if lost == "nothing":
        assert index.keys == ["a", "b", "c"] and index.problems == [lone]
    else:  # what follows is the member's content
        assert index.keys == ["a"] and index.problems == [lone, f"no tar header at byte {place + 512}"]
    path.write_bytes(data[:3072] + bytes(512))
    assert index_tar(path).problems[0].startswith("a lone block of zeros at byte 3072")


@pytest.mark.parametrize("behind", ["tar", "garbage"])
def test_what_follows_the_end_of_an_archive_is_told(tmp_path: Path, behind: str) -> None:
    path, other = (write_tar(tmp_path / f"{name}.tar", pairs([name])) for name in "ab")
    first = path.read_bytes()
    path.write_bytes(first + (other.read_bytes() if behind == "tar" else b"\1" * 100))
    index = index_tar(path)
    assert index.keys == ["a"]
    (problem,) = index.problems
    assert problem.startswith(f"not read: bytes {len(first)} to {path.stat().st_size}")


def test_a_long_pax_header_is_read_in_one_pass(tmp_path: Path) -> None:
    """As many records as there is room for, and a length of more digits than Python takes for a number."""
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, 1 << 20
    path = write_tar(tmp_path / "a.tar", pairs(["a"]))
    whole = path.read_bytes()
    for content, keys in ((b"12 path=b.x\n" + b"6 a=b\n" * 170_000, ["b"]), (b"9" * 5000 + b" path=b.x\n", [])):
        header = extended.tobuf(tarfile.USTAR_FORMAT) + content.ljust(1 << 20, b"\0")
        path.write_bytes(header + whole)
        if keys:
            assert index_tar(path).keys[:1] == keys
        else:
            with pytest.raises(ValueError, match="malformed pax header at byte 0"):
                index_tar(path)


def test_names_with_dots_in_their_middle_do_not_make_a_column_each(tmp_path: Path) -> None:
    members = [*pairs([f"{i:03d}" for i in range(300)]), *[(f"x{i}.{i}_0.7.jpg", b"x") for i in range(300)]]
    index = index_tar(write_tar(tmp_path / "a.tar", members))
    assert len(index.members) == 256 and {"jpg", "txt"} <= index.members.keys()
    assert index.problems[0].startswith("302 extensions, of which the 256 most frequent are kept (not such as ")


def test_sparse_members_are_named_not_misread(tmp_path: Path) -> None:
    members = tarfile.TarInfo("b.jpg")
    members.type = tarfile.GNUTYPE_SPARSE
    path = write_tar(tmp_path / "a.tar", pairs(["a"]))
    path.write_bytes(path.read_bytes()[:2048] + members.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    index = index_tar(path)
    assert index.keys == ["a"] and "sparse" in index.problems[0]


def test_a_long_name_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    path = write_tar(tmp_path / "a.tar", pairs(["a"]))
    with open(path, "r+b") as file:
        file.seek(2048)
        file.write(name.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 31)
    index = index_tar(path)
    assert index.keys == ["a"] and "over 1048576" in index.problems[0]


def test_digest_sees_changes_of_equal_size(tmp_path: Path) -> None:
    first = index_tar(write_tar(tmp_path / "a.tar", pairs(["a", "b"])))
    assert index_tar(write_tar(tmp_path / "b.tar", pairs(["a", "b"]))).digest == first.digest
    assert index_tar(write_tar(tmp_path / "c.tar", pairs(["a", "b"], image=b"imagf"))).digest != first.digest
    assert index_tar(write_tar(tmp_path / "d.tar", pairs(["a", "c"]))).digest != first.digest
    large, middle = b"x" * 4096, b"x" * 2100 + b"y" + b"x" * 1995
    whole = index_tar(write_tar(tmp_path / "f.tar", pairs(["a"], image=large)))
    assert index_tar(write_tar(tmp_path / "g.tar", pairs(["a"], image=middle))).digest != whole.digest
    # What is read as text is covered whole, of a larger image its beginning, middle and end.
    caption = b"x" * 600
    first_caption = index_tar(write_tar(tmp_path / "h.tar", [("a.jpg", large), ("a.txt", caption + caption)]))
    for place in (0, 511, 512, 700, 1199):
        changed = bytearray(caption + caption)
        changed[place] ^= 1
        index = index_tar(write_tar(tmp_path / "i.tar", [("a.jpg", large), ("a.txt", bytes(changed))]))
        assert index.digest != first_caption.digest, place
    photograph = b"x" * 40_000
    whole = index_tar(write_tar(tmp_path / "j.tar", pairs(["a"], image=photograph)))
    for place in (0, 511, 20_000, 39_999):
        change = bytearray(photograph)
        change[place] ^= 1
        assert index_tar(write_tar(tmp_path / "k.tar", pairs(["a"], image=bytes(change)))).digest != whole.digest, place
    last = [*pairs(["a"]), ("b.jpg", b"image"), ("b.txt", b"captiom")]
    assert index_tar(write_tar(tmp_path / "e.tar", last)).digest != first.digest


def same_index(a: TarIndex, b: TarIndex) -> bool:
    fields = ("keys", "tar_bytes", "mtime_ns", "digest", "problems")
    return all(getattr(a, field) == getattr(b, field) for field in fields) and all(
        np.array_equal(a.members[extension], b.members[extension]) for extension in {*a.members, *b.members}
    )


@pytest.mark.parametrize("keys", [["a", "Ü/b", "c" * 90], []])
def test_a_stored_index_is_read_back(tmp_path: Path, keys: list[str]) -> None:
    index = index_tar(write_tar(tmp_path / "a.tar", [*pairs(keys)]))
    write_index(index, tmp_path / "a.npz")
    assert same_index(read_index(tmp_path / "a.npz"), index)
    assert [path.name for path in tmp_path.glob(".*")] == []  # no temporary file is left


def test_the_stored_index_is_used_while_the_tar_stays_and_refreshed_when_it_changes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a"]))
    load_index(path)
    assert index_path(path).name == "a.tar.index.npz"
    stat = path.stat()
    write_tar(path, pairs(["b"]))  # of the same size
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
    path = write_tar(tmp_path / "a.tar", pairs(["a", "b"]))
    load_index(path)
    stored = index_path(path)
    whole = stored.read_bytes()
    rewritten_index(stored, **changed)
    with pytest.raises(ValueError, match=r"a\.tar\.index\.npz: unusable index \(.*\); it is made again$"):
        read_index(stored)
    assert load_index(path).keys == ["a", "b"] and stored.read_bytes() == whole
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "a.tar.index.npz" in caplog.text


def test_an_index_of_another_version_is_made_again_without_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a", "b"]))
    load_index(path)
    rewritten_index(index_path(path), version=3)
    assert load_index(path).keys == ["a", "b"] and not caplog.records
    assert read_index(index_path(path)).keys == ["a", "b"]


@pytest.mark.parametrize("where", ["shape", "directory"])
def test_planted_sizes_allocate_nothing(tmp_path: Path, where: str) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a", "b"]))
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
    path = write_tar(tmp_path / "a.tar", pairs(["a"]))
    index_path(path).mkdir()
    assert load_index(path).keys == ["a"]
    assert f"{index_path(path)}: the stored index cannot be read (not a regular file)" in caplog.text
    assert read_index(cached_index_path(path)).keys == ["a"]


@pytest.mark.parametrize("kind", ["device", "fifo", "huge"])
def test_an_index_that_is_endless_is_made_again(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "a.tar", pairs(["a"]))
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


@pytest.mark.parametrize("kind", ["device", "fifo", "folder"])
def test_a_tar_that_is_no_regular_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path) if kind == "fifo" else path.mkdir()
    with pytest.raises(ValueError, match=r"a\.tar is not a regular file; expected a plain, uncompressed tar$"):
        load_index(path)


def test_terabytes_of_zeros_behind_a_tar_are_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a"]))
    os.truncate(path, 1 << 42)
    index = load_index(path)
    assert index.keys == ["a"]
    assert f"to {1 << 42}, after 64 MiB of zeros from byte {end_of_members(path)} on" in index.problems[-1]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "pickle"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(["a", "b"]))
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
    path = write_tar(tmp_path / "a.tar", pairs(["a"]))
    index_path(path).mkdir()  # whoever runs this, root included, cannot rename a file onto a folder
    cached = cached_index_path(path)
    assert store_index(index_tar(path), path) == cached
    assert cached.is_relative_to(tmp_path / "cache" / "mmpretrain" / "indexes")
    assert same_index(read_index(cached), index_tar(path))


def test_shards_locate_every_sample(tmp_path: Path) -> None:
    groups = [["a", "b"], ["c"], ["d", "e", "f"]]
    paths = [str(write_tar(tmp_path / f"{i}.tar", pairs(keys))) for i, keys in enumerate(groups)]
    shards = Shards(paths)
    assert shards.num_samples == 6 and shards.counts.tolist() == [2, 1, 3] and shards.problems == []
    assert [shards.key(i) for i in range(6)] == ["a", "b", "c", "d", "e", "f"]
    assert [shards.location(i) for i in range(6)] == [paths[shard] for shard in (0, 0, 1, 2, 2, 2)]
    for outside in (-1, 6):
        with pytest.raises(IndexError, match=r"expected 0 to 5"):
            shards.location(outside)
        with pytest.raises(IndexError, match=r"expected 0 to 5"):
            shards.member(outside, ["jpg"])


def test_member_is_the_first_extension_present(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*pairs(["a"], b"jpeg"), ("b.png", b"png"), ("b.txt", b"t")])
    shards = Shards([str(path)])
    found = [shards.member(sample, ["webp", "png", "jpg"]) for sample in range(2)]
    assert [(member[0], member[1]) for member in found if member] == [(str(path), "jpg"), (str(path), "png")]
    assert [path.read_bytes()[member[2] :][: member[3]] for member in found if member] == [b"jpeg", b"png"]
    assert shards.member(0, ["png", "webp"]) is None


@pytest.mark.parametrize(
    ("extension", "limit"), [("jpg", 1 << 29), ("json", 1 << 24), ("txt", 1 << 24), ("cls", 1 << 24)]
)
def test_a_member_beyond_the_limit_is_not_read(tmp_path: Path, extension: str, limit: int) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:  # a sparse file: it takes a few kilobytes
        for key, size in (("a", limit + 1), ("b", 1)):
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size = size
            file.write(header.tobuf())
            file.seek(-(-size // 512) * 512, io.SEEK_CUR)
        file.write(bytes(1024))
    shards = Shards([str(path)])
    with pytest.raises(
        BadSample, match=f"its {extension} member has {limit + 1} bytes, more than the limit of {limit}"
    ):
        shards.read(0, (extension,))
    assert shards.read(1, (extension,)) == b"\0"


@pytest.mark.parametrize("how", ["replaced", "edited", "cut", "touched"])
def test_a_shard_that_changes_while_it_is_read_ends_the_reading(tmp_path: Path, how: str) -> None:
    paths = [str(write_tar(tmp_path / f"{i}.tar", pairs(["a", "b"], image=b"x" * 9000))) for i in range(40)]
    shards = Shards(paths)
    assert shards.read(0, ["jpg"]) == b"x" * 9000
    if how == "replaced":
        write_tar(tmp_path / "new", pairs(["a", "b"], image=b"y" * 9000)).rename(paths[0])
        assert shards.read(1, ["jpg"]) == b"x" * 9000  # the file that is open is still the old one
        assert [shards.read(sample, ["txt"]) for sample in range(2, 80)] == [b"caption"] * 78
    elif how == "edited":
        with open(paths[0], "r+b") as file:
            file.write(b"y")
    else:
        os.truncate(paths[0], 11_000) if how == "cut" else os.utime(paths[0], ns=(0, 0))
    with pytest.raises(
        FileChanged, match=r"0\.tar was changed or replaced while it was read: .*; restore it and go on"
    ):
        shards.read(1, ["jpg"])
    assert shards.read(2, ["jpg"]) == b"x" * 9000


def test_the_fingerprint_says_which_shards_changed(tmp_path: Path) -> None:
    def fingerprint(*keys: str, kept: list[int] | None = None) -> Fingerprint:
        paths = [str(write_tar(tmp_path / f"{i}.tar", pairs([key]))) for i, key in enumerate(keys)]
        source = Shards(paths) if kept is None else selected(Shards(paths), np.array(kept))
        assert isinstance(source.fingerprint, Fingerprint)
        return source.fingerprint

    saved = str(fingerprint("a", "b", "c"))
    assert fingerprint("a", "b", "c").is_of(saved) and len(saved) == 33 + 3 * 4
    hash_alone = saved.partition(":")[0]  # as older checkpoints have it
    assert hash_alone == Shards([str(tmp_path / f"{i}.tar") for i in range(3)]).fingerprint.hash
    assert fingerprint("a", "b", "c").is_of(hash_alone)
    for changed, told in (
        (fingerprint("a", "x", "c"), f"changed: {tmp_path}/1.tar"),
        (fingerprint("a", "b"), "3 shards then, 2 now, 1 gone or changed"),
        (fingerprint("a", "b", "c", "d"), f"3 shards then, 4 now, 0 gone or changed; new or changed: {tmp_path}/3.tar"),
        (fingerprint("a", "b", "c", kept=[0, 2]), "the same shards with another selection of samples"),
        (fingerprint(*"1234567"), "3 shards then, 7 now, 3 gone or changed; new or changed: "),
    ):
        assert not changed.is_of(saved) and not changed.is_of(hash_alone)
        assert changed.changes_since(saved).startswith(told) and changed.changes_since(hash_alone) == ""


def test_fingerprint_follows_the_data_not_the_place(tmp_path: Path) -> None:
    for folder in "abc":
        (tmp_path / folder).mkdir()
    paths = [str(write_tar(tmp_path / folder / "0.tar", pairs(["a"]))) for folder in "ab"]
    changed = str(write_tar(tmp_path / "c" / "0.tar", pairs(["a"], caption=b"captiom")))
    fingerprints = [Shards([path]).fingerprint for path in (*paths, changed)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_an_empty_shard_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match=r"empty\.tar.*no sample in it, expected at least one"):
        Shards([str(path)])


def test_patterns_expand(tmp_path: Path) -> None:
    root = str(tmp_path)
    names = [f"{i:03d}.tar" for i in range(4)]
    for name in names:
        write_tar(tmp_path / name, pairs(["a"]))
    (tmp_path / "notes.txt").touch()
    paths = [os.path.join(root, name) for name in names]
    assert expand_shards("{000..003}.tar", root) == paths
    assert expand_shards("*.tar", root) == paths
    assert expand_shards(root) == paths
    assert expand_shards(paths[2]) == [paths[2]]
    assert expand_shards(["003.tar", "{000..001}.tar"], root) == [paths[3], paths[0], paths[1]]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("{000..001}.tar", "no file .*001.tar"),
        ("*.tgz", "no tar matches"),
        ("empty", "no tar matches"),
        ("https://example.org/0.tar", "expected local tars"),
        ([], "expected at least one"),
    ],
)
def test_what_matches_nothing_is_refused(tmp_path: Path, shards: str | list[str], message: str) -> None:
    write_tar(tmp_path / "000.tar", pairs(["a"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message) as error:
        expand_shards(shards, str(tmp_path))
    assert "\n" not in str(error.value) and "shards" in str(error.value)
