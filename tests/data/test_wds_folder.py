"""Folders in CLIP_benchmark's layout: what they say of their data sets, and what is refused."""

import re
from pathlib import Path

import pytest

from mmpretrain.data.wds_folder import folders_of_suite, read_wds_folder


def write_folder(folder: Path, shards: int = 2, train: bool = False, **texts: str) -> Path:
    """A folder with empty tars; `texts` are its files without their suffix."""
    for split in ("test", *(["train"] if train else [])):
        (folder / split).mkdir(parents=True)
        (folder / split / "nshards.txt").write_text(f"{shards}\n")
        for number in range(shards):
            (folder / split / f"{number}.tar").touch()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_a_classification_set_has_labels_classes_and_templates(tmp_path: Path) -> None:
    found = read_wds_folder(
        write_folder(
            tmp_path / "a",
            shards=11,
            train=True,
            classnames="cat\nblue dog\n",
            zeroshot_classification_templates="a photo of a {c}.\n{c}, {c}\n",
        )
    )
    assert found.test == [str(tmp_path / "a" / "test" / f"{number}.tar") for number in range(11)]
    assert found.train == [str(tmp_path / "a" / "train" / f"{number}.tar") for number in range(11)]
    assert (found.caption, found.label) == (None, "cls")
    assert found.classes == str(tmp_path / "a" / "classnames.txt")
    assert found.templates == ["a photo of a {}.", "{}, {}"]


def test_a_retrieval_set_has_a_caption_a_line(tmp_path: Path) -> None:
    found = read_wds_folder(write_folder(tmp_path / "a", dataset_type="Retrieval\n"))
    assert (found.caption, found.label, found.classes, found.train) == ("txt.lines", None, None, None)


def test_a_set_without_classes_or_templates_says_so(tmp_path: Path) -> None:
    found = read_wds_folder(write_folder(tmp_path / "a"))
    assert (found.label, found.classes, found.templates) == ("cls", None, None)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"dataset_type": "multilabel"}, "says 'multilabel'; expected classification or retrieval"),
        ({"classnames": "cat\n\ndog\n"}, "classnames.txt: line 2 is empty"),
        ({"classnames": ""}, "classnames.txt: line 1 is empty"),
        (
            {"zeroshot_classification_templates": "{c}.\na photo of {}.\n"},
            "line 2 is 'a photo of {}.'; expected {c} in it",
        ),
    ],
)
def test_malformed_files_are_refused_in_one_line(texts: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_wds_folder(write_folder(tmp_path / "a", **texts))
    assert "\n" not in str(error.value)


def test_missing_folders_and_tars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no folder; expected one of this machine"):
        read_wds_folder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"nshards\.txt: 'no such file'; expected the number of tars"):
        read_wds_folder(tmp_path / "empty")
    folder = write_folder(tmp_path / "a", shards=3)
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"test/1\.tar: no such file; expected 3 tars, as .*nshards\.txt says"):
        read_wds_folder(folder)


def test_a_suite_has_the_folders_that_are_data_sets(tmp_path: Path) -> None:
    write_folder(tmp_path / "wds_vtab-dtd")
    write_folder(tmp_path / "mine")
    (tmp_path / ".git").mkdir()
    assert folders_of_suite(tmp_path) == {"mine": tmp_path / "mine", "vtab-dtd": tmp_path / "wds_vtab-dtd"}
    with pytest.raises(ValueError, match=r"where no folder is called wds_NAME"):
        folders_of_suite(tmp_path / ".git")
    with pytest.raises(ValueError, match=r"is no folder of this machine"):
        folders_of_suite(tmp_path / "nothing")
