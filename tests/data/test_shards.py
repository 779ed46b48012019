"""Random access over several tars."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mmpretrain.data.decode import BadSample
from mmpretrain.data.shards import Shards, expand_shards
from mmpretrain.data.source import Fingerprint, selected
from mmpretrain.data.storage import FileChanged
from mmpretrain.data.stored_index import index_path, load_index, read_index
from tests.tars import pairs, write_members


def test_shards_locate_every_sample(tmp_path: Path) -> None:
    groups = [["a", "b"], ["c"], ["d", "e", "f"]]
    paths = [str(write_members(tmp_path / f"{i}.tar", pairs(keys))) for i, keys in enumerate(groups)]
    shards = Shards(paths)
    assert shards.num_samples == 6 and shards.counts.tolist() == [2, 1, 3] and shards.problems == []
    assert [shards.key(i) for i in range(6)] == ["a", "b", "c", "d", "e", "f"]
    assert [shards.location(i) for i in range(6)] == [paths[shard] for shard in (0, 0, 1, 2, 2, 2)]
    for outside in (-1, 6):
        with pytest.raises(IndexError, match=r"expected 0 to 5"):
            shards.location(outside)
        with pytest.raises(IndexError, match=r"expected 0 to 5"):
            shards.member(outside, ["jpg"])


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of more than 2 samples count as large, and a process keeps the indexes of 2 shards."""
    monkeypatch.setattr("mmpretrain.data.shards._KEPT_SAMPLES", 2)
    monkeypatch.setattr("mmpretrain.data.shards._LOADED_SHARDS", 2)


@pytest.mark.usefixtures("large")
def test_indexes_of_a_large_set_are_loaded_when_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [["a", "b"], ["c"], ["d", "e", "f"], ["g"]]
    paths = [str(write_members(tmp_path / f"{i}.tar", pairs(keys, b"jpeg"))) for i, keys in enumerate(groups)]
    Shards(paths[:1])  # whose index is stored already
    read: list[str] = []
    monkeypatch.setattr("mmpretrain.data.shards.load_index", lambda path, _: read.append(path) or load_index(path))
    shards = Shards(paths)
    assert not read and shards.counts.tolist() == [2, 1, 3, 1]
    assert shards.fingerprint == Shards(paths).fingerprint and not read
    assert [shards.key(i) for i in range(7)] == list("abcdefg") and read == paths
    assert shards.read(5, ["jpg"]) == b"jpeg" and read == paths  # the last two shards are kept
    assert shards.key(0) == "a" and read == [*paths, paths[0]]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("damage", ["index", "both"])
def test_a_large_sets_index_that_is_damaged_later_is_made_again(tmp_path: Path, damage: str) -> None:
    path = write_members(tmp_path / "0.tar", pairs(["a", "b", "c"]))
    shards = Shards([str(path)])
    stored = index_path(path)
    stored.write_bytes(stored.read_bytes()[:-100])
    if damage == "both":
        write_members(path, pairs(["d", "e"]))
        with pytest.raises(FileChanged, match=r"its index has 2 samples, at the start 3\); restore it and go on"):
            shards.read(0, ["jpg"])
    else:
        assert [shards.key(i) for i in range(3)] == ["a", "b", "c"]
        assert read_index(stored).keys == ["a", "b", "c"]


@pytest.mark.usefixtures("large")
def test_a_large_sets_index_that_cannot_be_stored_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_members(tmp_path / "0.tar", pairs(["a", "b", "c"]))
    monkeypatch.setattr("mmpretrain.data.stored_index.write_index", lambda *_: (_ for _ in ()).throw(OSError("full")))
    shards = Shards([str(path)])
    monkeypatch.setattr("mmpretrain.data.shards.load_index", lambda *_: pytest.fail("scanned again"))
    assert [shards.key(i) for i in range(3)] == ["a", "b", "c"]


def test_member_is_the_first_extension_present(tmp_path: Path) -> None:
    path = write_members(tmp_path / "a.tar", [*pairs(["a"], b"jpeg"), ("b.png", b"png"), ("b.txt", b"t")])
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
    paths = [str(write_members(tmp_path / f"{i}.tar", pairs(["a", "b"], image=b"x" * 9000))) for i in range(40)]
    shards = Shards(paths)
    assert shards.read(0, ["jpg"]) == b"x" * 9000
    if how == "replaced":
        write_members(tmp_path / "new", pairs(["a", "b"], image=b"y" * 9000)).rename(paths[0])
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
        paths = [str(write_members(tmp_path / f"{i}.tar", pairs([key]))) for i, key in enumerate(keys)]
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
    paths = [str(write_members(tmp_path / folder / "0.tar", pairs(["a"]))) for folder in "ab"]
    changed = str(write_members(tmp_path / "c" / "0.tar", pairs(["a"], caption=b"captiom")))
    fingerprints = [Shards([path]).fingerprint for path in (*paths, changed)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_an_empty_shard_is_refused_by_name(tmp_path: Path) -> None:
    path = write_members(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match=r"empty\.tar.*no sample in it, expected at least one"):
        Shards([str(path)])


def test_patterns_expand(tmp_path: Path) -> None:
    root = str(tmp_path)
    names = [f"{i:03d}.tar" for i in range(4)]
    for name in names:
        write_members(tmp_path / name, pairs(["a"]))
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
    write_members(tmp_path / "000.tar", pairs(["a"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message) as error:
        expand_shards(shards, str(tmp_path))
    assert "\n" not in str(error.value) and "shards" in str(error.value)


def test_compressed_members_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    members = [("a.jpg", b"jpeg"), ("a.txt.gz", gzip.compress(b"a text")), ("b.jpg", b"jpeg"), ("b.txt.gz", b"damaged")]
    members += [("c.jpg", b"jpeg"), ("c.txt.gz", gzip.compress(bytes(20 << 20)))]
    members += [("d.jpg", b"jpeg"), ("d.txt.gz", gzip.compress(b"first ") + gzip.compress(b"second"))]
    members += [("e.jpg", b"jpeg"), ("e.txt.gz", gzip.compress(b"a text that is cut off")[:-9])]
    path = write_members(tmp_path / "0.tar", members)
    shards = Shards([str(path)])
    assert not shards.problems and shards.read(0, ["txt"]) == b"a text"
    sample = next(iter(webdataset.WebDataset(str(path), shardshuffle=False).decode()))
    assert sample["txt.gz"] == "a text" or sample.get("txt") == "a text"
    assert shards.read(3, ["txt"]) == b"first second"
    for i, told in ((1, "does not decompress"), (2, "more than the limit"), (4, r"does not decompress \(it ends too")):
        with pytest.raises(BadSample, match=told):
            shards.read(i, ["txt"])


def test_compressed_tars_are_named_with_the_command_that_unpacks_them(tmp_path: Path) -> None:
    path = write_members(tmp_path / "0.tar", [("a.jpg", b"jpeg")])
    packed = tmp_path / "0.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    with pytest.raises(ValueError, match=rf"is compressed; unpack it first: gunzip -k {packed}$"):
        expand_shards(str(tmp_path))
    path.write_bytes(packed.read_bytes())  # renamed only
    with pytest.raises(ValueError, match=rf"uncompressed tar: gunzip < {path} > unpacked\.tar$"):
        Shards([str(path)])
