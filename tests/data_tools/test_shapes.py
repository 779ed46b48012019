"""The embedded data set: its pixels are what its captions say."""

import io
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.__main__ import main
from data_tools.drawing import REACH, draw_scene
from data_tools.scenes import CLASSES, COLORS, HELD_OUT, RELATIONS, SHAPES, SIZES, TRAINED, make_scene
from mmpretrain.seeds import hash64

SCENES = [make_scene(hash64("test", i), CLASSES[i % 64]) for i in range(1280)]


def samples(folder: Path) -> list[dict[str, bytes]]:
    return list(webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    counts = ["--train", "1120", "--val", "112", "--composition", "48"]
    assert main(["shapes", "--output", str(folder), *counts, "--workers", "2"]) == 0
    return folder


def test_the_same_bytes_whatever_the_workers(shapes: Path, tmp_path: Path) -> None:
    counts = ["--train", "1120", "--val", "112", "--composition", "48"]
    assert main(["shapes", "--output", str(tmp_path), *counts, "--workers", "1"]) == 0
    tars = sorted(path.relative_to(shapes) for path in shapes.rglob("*.tar"))
    assert len(tars) == 4
    for tar in tars:
        assert (tmp_path / tar).read_bytes() == (shapes / tar).read_bytes()


def test_splits_are_balanced_and_composition_is_never_trained(shapes: Path) -> None:
    rows = {
        split: [json.loads(s["json"]) for s in samples(shapes / split)] for split in ("train", "val", "composition")
    }
    labels = {split: Counter(row["label"] for row in rows[split]) for split in rows}
    assert set(labels["train"].values()) == {20} and set(labels["val"].values()) == {2}
    assert set(labels["composition"].values()) == {6} and len(labels["composition"]) == 8
    assert labels["train"].keys() == labels["val"].keys()
    held_out = set(labels["composition"])
    for split in ("train", "val"):
        assert not held_out & set(labels[split])
        assert not held_out & {row["second_label"] for row in rows[split]}
    assert {row["shape"] for row in rows["train"]} == {row["shape"] for row in rows["composition"]} == set(SHAPES)
    assert {row["color"] for row in rows["train"]} == {row["color"] for row in rows["composition"]} == set(COLORS)
    assert {s["txt"] for s in samples(shapes / "train")} != {s["txt"] for s in samples(shapes / "val")}


def test_members_agree_with_the_class_list(shapes: Path) -> None:
    lines = [line.split("\t") for line in (shapes / "classes.tsv").read_text().splitlines()]
    assert lines[0] == ["index", "label", "held_out"] and len(lines) == 65
    names = {line[0]: line[1] for line in lines[1:]}
    assert list(names) == [str(i) for i in range(64)] and sum(line[2] == "1" for line in lines[1:]) == 8
    for sample in samples(shapes / "val"):
        row = json.loads(sample["json"])
        assert names[sample["cls"].decode()] == row["label"] and sample["txt"].decode() == row["caption"]
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            assert image.size == (64, 64) and image.mode == "RGB"


def test_another_seed_draws_other_scenes_and_holds_out_the_same(shapes: Path, tmp_path: Path) -> None:
    counts = ["--train", "56", "--val", "56", "--composition", "8", "--image-size", "32"]
    assert main(["shapes", "--output", str(tmp_path), *counts, "--seed", "1", "--workers", "1"]) == 0
    assert (tmp_path / "classes.tsv").read_text() == (shapes / "classes.tsv").read_text()
    captions = [{sample["txt"] for sample in samples(folder / "val")} for folder in (tmp_path, shapes)]
    assert captions[0] != captions[1]


def test_held_out_pairs_are_one_of_each_shape_and_colour() -> None:
    assert len(CLASSES) == 64 and len(TRAINED) == 56 and len(HELD_OUT) == 8
    assert {color for color, _ in HELD_OUT} == set(COLORS) and {shape for _, shape in HELD_OUT} == set(SHAPES)


def test_scenes_are_as_they_say() -> None:
    for scene in SCENES:
        main_object, *others = scene.objects
        assert SIZES[scene.size][0] <= main_object.radius <= SIZES[scene.size][1]
        across = "left" if main_object.x < 0.42 else "right" if main_object.x > 0.58 else ""
        down = ("upper" if main_object.y < 0.42 else "lower" if main_object.y > 0.58 else "") if across else ""
        if across or down:
            assert across in scene.position and down in scene.position
        else:
            assert any(word in scene.position for word in ("top", "bottom", "center"))
        for thing in scene.objects:
            reach = thing.radius * REACH[thing.shape]
            assert reach < min(thing.x, thing.y) and max(thing.x, thing.y) < 1 - reach  # wholly inside
        for other in others:
            assert other.radius < 0.63 * main_object.radius
            apart = math.hypot(other.x - main_object.x, other.y - main_object.y)
            assert apart > other.radius * REACH[other.shape] + main_object.radius * REACH[main_object.shape]
            right, below = other.x - main_object.x, other.y - main_object.y
            side = (int(np.sign(right)), 0) if abs(right) > 2 * abs(below) else (0, int(np.sign(below)))
            assert abs(right) > 2 * abs(below) or abs(below) > 2 * abs(right)
            assert RELATIONS[side] == scene.relation
    assert 0.4 < sum(scene.second is not None for scene in SCENES) / len(SCENES) < 0.6


def test_captions_name_the_main_object_first_and_vary() -> None:
    for scene in SCENES:
        main_object = f"{scene.color} {scene.shape}"
        assert main_object in scene.caption and scene.caption.startswith(("a ", "an ", "there is a"))
        assert " a orange" not in f" {scene.caption}"
        if scene.second is not None and " ".join(scene.second) in scene.caption:
            assert scene.caption.index(main_object) < scene.caption.rindex(" ".join(scene.second))
        elif scene.second is None:
            assert not any(word in scene.caption for word in RELATIONS.values())
    whole = sum(scene.position in scene.caption for scene in SCENES) / len(SCENES)
    assert 0.3 < whole < 0.5
    names = {f"{article} {scene.color} {scene.shape}" for scene in SCENES for article in ("a", "an")}
    assert 0.4 < sum(scene.caption in names for scene in SCENES) / len(SCENES) < 0.6
    worded = {scene.caption for scene in SCENES} - names
    assert len(worded) > 600
    assert min(len(scene.caption.split()) for scene in SCENES) == 3


def test_pixels_have_the_colour_that_the_caption_says() -> None:
    """The pixels that differ from the background are the object's colour, inside its reach, and the most of them."""
    for scene in SCENES[:256]:
        thing = scene.objects[0]
        pixels = np.asarray(draw_scene([thing], scene.background, 64)).astype(int)
        drawn = np.abs(pixels - scene.background).sum(axis=2) > 60
        y, x = np.nonzero(drawn)
        assert (
            np.hypot(x + 0.5 - 64 * thing.x, y + 0.5 - 64 * thing.y).max() < 64 * thing.radius * REACH[thing.shape] + 1
        )
        assert drawn.sum() > 0.9 * (64 * thing.radius) ** 2
        color = np.median(pixels[drawn], axis=0)
        nearest = min(COLORS, key=lambda name: float(np.abs(color - COLORS[name]).sum()))
        assert nearest == scene.color
