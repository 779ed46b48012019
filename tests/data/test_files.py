"""Images in files of their own as samples: class folders, texts beside images, tables and COCO's captions."""

import json
import os
import shutil
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from mmpretrain.data.decode import BadSample
from mmpretrain.data.fields import read_captions
from mmpretrain.data.files import FileSource
from mmpretrain.data.source import ClassifiedSource, SampleSource
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from tests.tars import encode, smooth_pixels


def write_image(path: Path, seed: int, format: str = "PNG") -> bytes:
    """Write a small image, and return its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data := encode(smooth_pixels(8, 9, seed), format))
    return data


def class_folders(folder: Path) -> Path:
    """Five images of the classes 10, 9 and cat, one of them below a further folder and one a BMP."""
    write_image(folder / "cat" / "b.png", 0)
    write_image(folder / "cat" / "deep" / "a.PNG", 1)
    write_image(folder / "9" / "x.png", 2)
    write_image(folder / "10" / "x.bmp", 3, "BMP")
    write_image(folder / "10" / "y.jpg", 4, "JPEG")
    (folder / "README.md").write_text("no image")
    return folder


def table(folder: Path, text: str, name: str = "pairs.csv") -> Path:
    """A table beside three images a.png, b.png and c.png."""
    for number, image in enumerate("abc"):
        write_image(folder / f"{image}.png", number)
    (folder / name).write_text(text)
    return folder / name


def test_class_folders_are_torchvisions(tmp_path: Path) -> None:
    source, theirs = FileSource("set", str(class_folders(tmp_path / "set").parent)), ImageFolder(tmp_path / "set")
    assert isinstance(source, SampleSource) and isinstance(source, ClassifiedSource)
    assert source.class_names == theirs.classes == ["10", "9", "cat"]
    ours = {str(tmp_path / "set" / source.key(i)): int(source.read(i, ("cls",))) for i in range(source.num_samples)}
    assert ours == dict(theirs.samples)
    for i in range(source.num_samples):
        assert source.read(i, IMAGE_EXTENSIONS) == (tmp_path / "set" / source.key(i)).read_bytes()
        assert json.loads(source.read(i, ("json",)))["label"] == source.key(i).split("/")[0]
    with pytest.raises(BadSample, match=r"it has no txt \(its columns are image, label\)"):
        source.read(0, ("txt",))
    with pytest.raises(IndexError, match="expected 0 to 4"):
        source.read(5, ("cls",))


def test_texts_lie_beside_their_images(tmp_path: Path) -> None:
    for name in "ab":
        write_image(tmp_path / f"{name}.png", 0)
    (tmp_path / "a.txt").write_text("one\ntwo")
    source = FileSource(str(tmp_path))
    assert source.num_samples == 2 and source.class_names is None
    assert read_captions(source, 0, "txt") == ["one\ntwo"]
    assert read_captions(source, 0, "txt.lines") == ["one", "two"]
    with pytest.raises(BadSample, match=r"no b\.txt beside it"):
        source.read(1, IMAGE_EXTENSIONS)


def test_columns_of_a_table_are_fields(tmp_path: Path) -> None:
    table(tmp_path, "id,file,title,kind,rest\n7,a.png,an a,x,1\n8,c.png,a c,w,2\n")
    source = FileSource("pairs.csv", str(tmp_path), image="file", caption="title", label="kind", key="id")
    assert [source.key(i) for i in range(2)] == ["7", "8"] and source.location(1) == str(tmp_path / "pairs.csv")
    assert source.read(1, ("jpg", "png")) == (tmp_path / "c.png").read_bytes()
    assert source.read(1, ("txt",)) == b"a c" and source.read(1, ("rest",)) == b"2"
    assert source.class_names == ["w", "x"] and [source.read(i, ("cls",)) for i in range(2)] == [b"1", b"0"]
    assert json.loads(source.read(0, ("json",))) == {
        "id": "7", "file": "a.png", "title": "an a", "kind": "x", "rest": "1"
    }  # fmt: skip


def test_labels_that_are_numbers_are_classes_as_they_are(tmp_path: Path) -> None:
    table(tmp_path, "image\tlabel\na.png\t3\nb.png\t0\n", "pairs.tsv")
    source = FileSource(str(tmp_path / "pairs.tsv"), caption=None, label="label")
    assert source.class_names is None and [source.read(i, ("cls",)) for i in range(2)] == [b"3", b"0"]


def test_all_captions_of_coco_are_texts_of_their_image(tmp_path: Path) -> None:
    for number in range(2):
        write_image(tmp_path / "val" / f"{number}.png", number)
    images = [{"id": 5 + i, "file_name": f"{i}.png"} for i in range(2)]
    captions = [{"image_id": 5 + i % 2, "caption": f"text {i}\n"} for i in range(10)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    source = FileSource("captions.json", str(tmp_path), images="val")
    assert read_captions(source, 1, "json.caption") == [f"text {i}" for i in range(1, 10, 2)]
    assert source.key(1) == "6" and source.read(1, IMAGE_EXTENSIONS) == (tmp_path / "val" / "1.png").read_bytes()
    with pytest.raises(BadSample, match=r"its txt is a list; name it as json\.<column>"):
        source.read(0, ("txt",))


def test_rows_of_one_image_are_one_sample_where_they_are_merged(tmp_path: Path) -> None:
    path = table(tmp_path, "image,caption\na.png,one\nb.png,two\na.png,three\n")
    assert FileSource(str(path)).num_samples == 3
    source = FileSource(str(path), merge=True)
    assert [read_captions(source, i, "json.caption") for i in range(2)] == [["one", "three"], ["two"]]
    with pytest.raises(ValueError, match="expected columns of images and captions"):
        FileSource(str(path), caption=None, merge=True)


def test_rows_and_files_that_cannot_be_used_are_refused_when_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    write_image(tmp_path / "secret.png", 0)
    table(tmp_path / "inside", "image,caption\n../secret.png,a\n/etc/passwd,b\nnone.png,c\nonly one\n,e\nlink.png,f\n")
    os.symlink(tmp_path / "secret.png", tmp_path / "inside" / "link.png")
    source = FileSource(str(tmp_path / "inside" / "pairs.csv"))
    for i, message in enumerate(
        [
            r"its path leaves .*`images`",
            r"its path leaves",
            r"no such file",
            r"1 fields, the header has 2",
            r"it has no image",
        ]
    ):
        with pytest.raises(BadSample, match=message):
            source.read(i, IMAGE_EXTENSIONS)
    assert (
        source.read(5, IMAGE_EXTENSIONS) == (tmp_path / "secret.png").read_bytes()
    )  # the folder's owner made the link
    assert FileSource(str(tmp_path / "inside" / "pairs.csv"), images="/").read(1, ("txt",)) == b"b"


def test_the_fingerprint_changes_with_the_data_and_not_with_their_place(tmp_path: Path) -> None:
    first = FileSource(str(class_folders(tmp_path / "a"))).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert FileSource(str(tmp_path / "b")).fingerprint.is_of(first)
    data = bytearray((tmp_path / "b" / "9" / "x.png").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b" / "9" / "x.png").write_bytes(data)
    changed = FileSource(str(tmp_path / "b")).fingerprint
    assert not changed.is_of(first)
    shutil.move(tmp_path / "b" / "9", tmp_path / "b" / "8")
    assert not FileSource(str(tmp_path / "b")).fingerprint.is_of(changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "nothing"}, r"path .*nothing': no such file; expected a"),
        ({"path": "pairs.csv", "caption": "title"}, r"^caption \(or null\) 'title': no such column; .*image, caption"),
        ({"path": "pairs.csv", "images": "nowhere"}, r"^images is .*nowhere', which is no folder"),
        ({"path": "odd.json"}, r"^path .*odd\.json': not JSON"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    table(tmp_path, "image,caption\na.png,one\n")
    (tmp_path / "odd.json").write_text("no json")
    with pytest.raises(ValueError, match=message) as error:
        FileSource(**arguments, root=str(tmp_path))
    assert "\n" not in str(error.value)
