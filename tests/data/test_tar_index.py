"""Scans of tars, against tarfile and webdataset themselves."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mmpretrain.data.stored_index import load_index
from mmpretrain.data.tar_index import TarIndex, index_tar
from tests.tars import pairs, write_members


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
    path = write_members(tmp_path / "a.tar", pairs(["a"], image=b"image"))
    rewritten_header(path, size, checksum)
    index = index_tar(path)
    assert index.problems == [] and index.members["jpg"][1].tolist() == [5]


@pytest.mark.parametrize("size", [b"-0000000512\0", b"xxxxxxxxxxx\0", b"\xff" * 12, b"00000000009\0"])
def test_sizes_that_are_none_end_the_scan(tmp_path: Path, size: bytes) -> None:
    path = write_members(tmp_path / "a.tar", pairs(["a"]))
    rewritten_header(path, size, "%06o\0 ")
    with pytest.raises(ValueError, match="no number in the header field"):
        index_tar(path)


def test_dtypes_and_absent_members(tmp_path: Path) -> None:
    index = index_tar(write_members(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.txt", b"2"), ("b.jpg", b"3")]))
    offsets, sizes = index.members["txt"]
    assert offsets.dtype == sizes.dtype == index.key_ends.dtype == np.int64
    assert sizes.tolist() == [1, -1]


def test_problems_are_named(tmp_path: Path) -> None:
    members = [*pairs(["a", "b"]), ("c.jpg", b""), ("d.txt", b""), *pairs(["a"]), ("e.jpg", b"1"), ("e.jpg", b"2")]
    index = index_tar(write_members(tmp_path / "a.tar", members))
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
    assert index_tar(write_members(tmp_path / "json.tar", json_only)).problems == []
    mixed = index_tar(write_members(tmp_path / "mixed.tar", [*json_only, *pairs(["c"])]))
    assert len(mixed.problems) == 1 and "2 samples without a caption: 'a'" in mixed.problems[0]
    images = index_tar(write_members(tmp_path / "images.tar", [("a.jpg", b""), ("b.jpg", b"")]))
    assert images.problems == ["none of the 2 samples has a caption"]


def test_labelled_images_need_no_captions(tmp_path: Path) -> None:
    labelled = [("a.jpg", b""), ("a.cls", b"0"), ("b.jpg", b""), ("b.cls", b"1")]
    assert index_tar(write_members(tmp_path / "labelled.tar", labelled)).problems == []


def test_every_truncation_is_named_and_leaves_whole_samples(tmp_path: Path) -> None:
    whole = write_members(tmp_path / "whole.tar", pairs(["a", "b", "c"], image=b"x" * 700)).read_bytes()
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
    path = write_members(tmp_path / "a.tar", pairs(["a", "b"], caption=b"y" * 600))
    second_caption = int(index_tar(path).members["txt"][0][1])
    path.write_bytes(path.read_bytes()[: second_caption + 20])
    index = index_tar(path)
    assert index.keys == ["a"]
    assert index.problems == [
        f"truncated: 'b.txt' needs bytes {second_caption} to {second_caption + 600}, the file has {second_caption + 20}"
    ]


def test_damage_inside_ends_the_scan_and_is_named(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", pairs(["a", "b", "c"]))
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
    path = write_members(tmp_path / "a.tar", pairs([f"{i:02d}" for i in range(20)], image=b"x" * 5000))
    middle = int(index_tar(path).members["txt"][0][9]) + 512
    data = path.read_bytes()
    path.write_bytes(data[:middle] + bytes(len(data) - middle))
    index = index_tar(path)
    assert index.num_samples == 10
    (problem,) = index.problems
    assert problem.startswith(f"{len(data) - middle} bytes of zeros from byte {middle} to the end")


@pytest.mark.parametrize("zero_bytes", [1024, 1536, 10_240, 11_264])
def test_zeros_that_end_an_archive_are_no_problem(tmp_path: Path, zero_bytes: int) -> None:
    path = write_members(tmp_path / "a.tar", pairs(["a"]))
    path.write_bytes(path.read_bytes()[: end_of_members(path)] + bytes(zero_bytes))
    assert index_tar(path).problems == []


@pytest.mark.parametrize("lost", ["nothing", "a header"])
def test_a_lone_block_of_zeros_is_told_and_reading_goes_on(tmp_path: Path, lost: str) -> None:
    path = write_members(tmp_path / "a.tar", pairs(["a", "b", "c"]))
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
    path, other = (write_members(tmp_path / f"{name}.tar", pairs([name])) for name in "ab")
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
    path = write_members(tmp_path / "a.tar", pairs(["a"]))
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
    index = index_tar(write_members(tmp_path / "a.tar", members))
    assert len(index.members) == 256 and {"jpg", "txt"} <= index.members.keys()
    assert index.problems[0].startswith("302 extensions, of which the 256 most frequent are kept (not such as ")


@pytest.mark.parametrize("format", ["gnu", "pax"])
@pytest.mark.parametrize("num_pieces", [2, 40])
def test_sparse_members_are_named_and_passed_over(format: str, num_pieces: int, tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / f"{name}.jpg").write_bytes(name.encode() * 600)
    with open(tmp_path / "b.jpg", "wb") as file:
        for piece in range(num_pieces):
            file.seek(piece << 16)
            file.write(b"b" * 5000)
    command = ["tar", f"--format={format}", "--sparse", "-cf", "s.tar", "a.jpg", "b.jpg", "c.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    index = index_tar(tmp_path / "s.tar")
    assert index.keys == ["a", "c"]
    assert index.problems[0].startswith("sparse file 'b.jpg' at byte ") or "GNUSparseFile" in index.problems[0]
    offsets, sizes = index.members["jpg"]
    content = (tmp_path / "s.tar").read_bytes()
    assert [content[o : o + s] for o, s in zip(offsets, sizes, strict=True)] == [b"a" * 600, b"c" * 600]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(content[: int(offsets[1]) - 600])
    assert index_tar(cut).keys == ["a"]


def test_a_long_name_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    path = write_members(tmp_path / "a.tar", pairs(["a"]))
    with open(path, "r+b") as file:
        file.seek(2048)
        file.write(name.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 31)
    index = index_tar(path)
    assert index.keys == ["a"] and "over 1048576" in index.problems[0]


def test_digest_sees_changes_of_equal_size(tmp_path: Path) -> None:
    first = index_tar(write_members(tmp_path / "a.tar", pairs(["a", "b"])))
    assert index_tar(write_members(tmp_path / "b.tar", pairs(["a", "b"]))).digest == first.digest
    assert index_tar(write_members(tmp_path / "c.tar", pairs(["a", "b"], image=b"imagf"))).digest != first.digest
    assert index_tar(write_members(tmp_path / "d.tar", pairs(["a", "c"]))).digest != first.digest
    large, middle = b"x" * 4096, b"x" * 2100 + b"y" + b"x" * 1995
    whole = index_tar(write_members(tmp_path / "f.tar", pairs(["a"], image=large)))
    assert index_tar(write_members(tmp_path / "g.tar", pairs(["a"], image=middle))).digest != whole.digest
    # What is read as text is covered whole, of a larger image its beginning, middle and end.
    caption = b"x" * 600
    first_caption = index_tar(write_members(tmp_path / "h.tar", [("a.jpg", large), ("a.txt", caption + caption)]))
    for place in (0, 511, 512, 700, 1199):
        changed = bytearray(caption + caption)
        changed[place] ^= 1
        index = index_tar(write_members(tmp_path / "i.tar", [("a.jpg", large), ("a.txt", bytes(changed))]))
        assert index.digest != first_caption.digest, place
    photograph = b"x" * 40_000
    whole = index_tar(write_members(tmp_path / "j.tar", pairs(["a"], image=photograph)))
    for place in (0, 511, 20_000, 39_999):
        change = bytearray(photograph)
        change[place] ^= 1
        assert index_tar(write_members(tmp_path / "k.tar", pairs(["a"], image=bytes(change)))).digest != whole.digest, (
            place
        )
    last = [*pairs(["a"]), ("b.jpg", b"image"), ("b.txt", b"captiom")]
    assert index_tar(write_members(tmp_path / "e.tar", last)).digest != first.digest


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
    path = write_members(tmp_path / "a.tar", pairs(["a"]))
    os.truncate(path, 1 << 42)
    index = load_index(path)
    assert index.keys == ["a"]
    assert f"to {1 << 42}, after 64 MiB of zeros from byte {end_of_members(path)} on" in index.problems[-1]
