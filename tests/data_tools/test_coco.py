"""`build --coco` on captions in COCO's format."""

import json
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from data_tools.__main__ import main
from mmpretrain.data.fields import read_captions
from mmpretrain.data.shards import Shards, expand_shards


def write_coco(folder: Path, num_images: int = 4) -> dict[str, Any]:
    """Write images to `folder/photos` and their captions, five each, to `folder/captions.json`."""
    (folder / "photos").mkdir()
    images, annotations = [], []
    for i in range(num_images):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / "photos" / f"{i:012d}.jpg")
        images.append({"id": 100 + i, "file_name": f"{i:012d}.jpg", "height": 8, "width": 8})
        annotations += [{"image_id": 100 + i, "id": 5 * i + j, "caption": f" Text {j} of {i}.\n"} for j in range(5)]
    coco = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(coco))
    return coco


def build(folder: Path) -> int:
    source = ["--coco", str(folder / "captions.json"), "--image-root", str(folder / "photos")]
    return main(["build", *source, "--output", str(folder / "out"), "--workers", "1"])


def test_an_image_and_all_of_its_captions_are_one_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path)
    assert build(tmp_path) == 0
    tars = [str(path) for path in (tmp_path / "out").glob("*.tar")]
    found = {sample["__key__"]: sample for sample in webdataset.WebDataset(tars, shardshuffle=False)}
    assert sorted(found) == ["100", "101", "102", "103"]
    assert found["102"]["txt"] == b"Text 0 of 2."
    assert json.loads(found["102"]["json"])["caption"] == [f"Text {j} of 2." for j in range(5)]
    shards = Shards(expand_shards(str(tmp_path / "out")))
    assert all(len(read_captions(shards, i, "json.caption")) == 5 for i in range(4)), (
        "as training and retrieval read them"
    )
    assert found["102"]["jpg"] == (tmp_path / "photos" / f"{2:012d}.jpg").read_bytes()
    assert "data.train.pairs.caption=json.caption" in capsys.readouterr().err


def test_images_without_captions_or_files_are_refused(tmp_path: Path) -> None:
    coco = write_coco(tmp_path)
    coco["annotations"] = coco["annotations"][5:]
    del coco["images"][1]["file_name"]
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    assert build(tmp_path) == 0
    lines = (tmp_path / "out" / "refused.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert reasons == ["no caption: caption empty", "no path in column 'image'"]


def test_captions_of_images_that_are_not_listed_are_refused(tmp_path: Path) -> None:
    coco = write_coco(tmp_path)
    del coco["images"][1]
    del coco["annotations"][15]["image_id"]
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    assert build(tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert [(line["row_number"], line["reason"]) for line in lines] == [
        (4, "5 captions of image 101, which `images` does not list"),
        (5, "1 captions of image None, which `images` does not list"),
    ]


def test_a_bad_caption_in_first_place_leaves_the_good_ones(tmp_path: Path) -> None:
    coco = write_coco(tmp_path, 2)
    coco["annotations"][0]["caption"], coco["annotations"][5]["caption"] = "\ud800", "\u200b"
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    assert build(tmp_path) == 0
    shards = Shards(expand_shards(str(tmp_path / "out")))
    assert sorted(shards.read(i, ("txt",)) for i in range(2)) == [b"Text 1 of 0.", b"Text 1 of 1."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "no list of `images` in it"),
        ('{"images": [{"id": 1}], "annotations": []}', "no list of `annotations` in it"),
        ('{"images": [{"id": 1}], "annotations": [{"bbox": []}]}', "an annotation without a caption"),
    ],
)
def test_other_files_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    (tmp_path / "photos").mkdir()
    if content is not None:
        (tmp_path / "captions.json").write_text(content)
    assert build(tmp_path) == 2
    error = capsys.readouterr().err
    assert f"captions.json': {message}" in error and "expected a captions file of COCO" in error
    assert error.count("\n") == 1


def test_the_folder_of_the_images_has_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path)
    assert main(["build", "--coco", str(tmp_path / "captions.json"), "--output", str(tmp_path / "out")]) == 2
    assert "captions.json': expected --image-root FOLDER of its images beside it" in capsys.readouterr().err
