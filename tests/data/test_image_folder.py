"""A folder of image files as a source of samples."""

import os
from pathlib import Path

import pytest

from mmpretrain.data.decode import BadSample
from mmpretrain.data.image_folder import ImageFolder
from mmpretrain.data.source import SampleSource
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS


def make(folder: Path) -> Path:
    for name in ("b.PNG", "deep/a.jpg", "deep/notes.txt", "c.jpeg.part"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
        os.utime(folder / name, (1, 1))
    return folder


def test_images_are_sorted_by_path_and_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    source = ImageFolder(make(tmp_path))
    assert isinstance(source, SampleSource)
    assert [source.key(i) for i in range(source.num_samples)] == ["b.PNG", "deep/a.jpg"]
    assert source.read(1, IMAGE_EXTENSIONS) == b"deep/a.jpg" and source.location(1) == str(tmp_path)
    with pytest.raises(BadSample, match="an image without txt"):
        source.read(1, ("txt",))


def test_the_fingerprint_changes_with_files_and_not_with_the_place(tmp_path: Path) -> None:
    here, there = make(tmp_path / "here"), make(tmp_path / "there")
    assert ImageFolder(here).fingerprint == ImageFolder(there).fingerprint
    prints = {ImageFolder(here).fingerprint}
    (there / "b.PNG").write_bytes(b"longer than it was")
    os.utime(there / "b.PNG", (1, 1))
    prints.add(ImageFolder(there).fingerprint)
    os.utime(here / "b.PNG", (1, 2))
    prints.add(ImageFolder(here).fingerprint)
    (here / "b.PNG").rename(here / "d.PNG")
    prints.add(ImageFolder(here).fingerprint)
    assert len(prints) == 4


def test_a_huge_file_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    os.truncate(make(tmp_path) / "b.PNG", (1 << 29) + 1)
    with pytest.raises(BadSample, match="more than the limit"):
        ImageFolder(tmp_path).read(0, IMAGE_EXTENSIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no image in it; expected \.jpeg"):
        ImageFolder(tmp_path / "empty")
