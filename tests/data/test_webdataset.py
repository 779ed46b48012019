"""Any tar that webdataset reads gives the same samples here, whatever its members are called."""

import io
import tarfile
import tempfile
from pathlib import Path

import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmpretrain.data.shards import Shards

_part = st.text(
    st.sampled_from("aBcÜ日._- __\t\n\x7f0") | st.characters(codec="utf-8", exclude_characters="/\0"), max_size=6
)
_long = st.sampled_from(["folder", "x.y", "Ü" * 5]).map(lambda part: part * 25)
_names = st.lists(st.one_of(_part, _long), min_size=1, max_size=3).map("/".join)
_extensions = st.sampled_from(["jpg", "JPG", "txt", "Txt", "seg.png", "json", "a.b.c", "", "cls"])
Members = list[tuple[str, list[str]]]


def write(path: Path, members: Members, format: int, gap: int) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for number, (name, extensions) in enumerate(members):
            for extension in extensions:
                info = tarfile.TarInfo(f"{name}.{extension}" if extension else name)
                content = f"{number} {extension}".encode() * (1 + 200 * (number % 3))
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            if gap and number % gap == 0:
                tar.addfile(tarfile.TarInfo(f"{name}.link"))
                link = tarfile.TarInfo(f"{name}.jpg")
                link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
                tar.addfile(link)


def by_webdataset(path: Path) -> list[dict[str, object]] | None:
    """Its samples, or None if it refuses the tar."""
    try:
        return [
            {name: value for name, value in sample.items() if not name.startswith("__") or name == "__key__"}
            for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
        ]
    except ValueError:  # a name that occurs twice in a sample
        return None


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@example([("a.b/c", ["jpg", "txt"]), ("a.b/C", ["JPG", "seg.png"]), ("a.b/c", ["txt"])], tarfile.PAX_FORMAT, 2)
@given(
    st.lists(
        st.tuples(_names, st.lists(_extensions, min_size=1, max_size=3, unique_by=str.lower)), min_size=1, max_size=6
    ),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.integers(0, 2),
)
def test_a_tar_has_the_samples_that_webdataset_reads(members: Members, format: int, gap: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "0.tar")
        try:
            write(path, members, format, gap)
        except (ValueError, UnicodeEncodeError):  # the format has no such name
            return
        expected = by_webdataset(path)
        if not expected:
            return
        shards = Shards([str(path)])
        assert [shards.key(i) for i in range(shards.num_samples)] == [sample["__key__"] for sample in expected]
        for i, sample in enumerate(expected):
            for extension in sample.keys() - {"__key__"}:
                assert shards.read(i, [extension]) == sample[extension]
