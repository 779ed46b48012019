"""What evaluators give to be looked at."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmpretrain.data.classes import read_classes
from mmpretrain.evals.base import Context, evaluate
from mmpretrain.evals.gallery import Gallery
from mmpretrain.evals.patch_similarity import PatchSimilarity
from mmpretrain.evals.projector import Projector
from mmpretrain.evals.zero_shot import ZeroShot
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.open_clip import open_clip_model
from mmpretrain.models.vit import TimmEncoder
from mmpretrain.reporting import pictures
from tests.evals.held_out import LABELS, NUM_SAMPLES, make_context, make_model, make_set, pixels

GREEN, RED = (26, 140, 60), (200, 40, 40)


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == np.array(colour)).all(axis=-1).sum())


def context_with_classes(folder: Path) -> Context:
    (folder / "classes.txt").write_text("\n".join(LABELS) + "\n")
    classes = read_classes(folder / "classes.txt", templates=["a {}"])
    return make_context(data=make_set(folder, label="json.label", classes=classes))


def test_gallery_shows_right_answers_in_green_and_wrong_ones_in_red(tmp_path: Path) -> None:
    context = make_context(data=make_set(tmp_path))
    assert evaluate({"gallery": Gallery(num_queries=4, num_answers=3)}, context) == {}
    assert set(context.shown.pictures) == {"eval-val/text_to_image", "eval-val/image_to_text"}
    for picture in context.shown.pictures.values():
        assert picture.dtype == np.uint8 and picture.shape[2] == 3
        assert count(picture, GREEN) > 0 or count(picture, RED) > 0
    embedded = context.embedded("val")
    belongs = {tuple(pair) for pair in embedded.pairs.tolist()}
    right = 0
    for text in torch.linspace(0, len(embedded.texts) - 1, 4).round().long().tolist():
        for image in (embedded.texts[text] @ embedded.images.T).topk(3).indices.tolist():
            right += (image, text) in belongs
    border = 126**2 - 120**2
    shown = context.shown.pictures["eval-val/text_to_image"]
    assert count(shown, GREEN) == right * border
    assert count(shown, RED) == (12 - right) * border


def test_the_images_of_rows_are_those_of_their_samples(tmp_path: Path) -> None:
    context = make_context(data=make_set(tmp_path))
    samples = context.embedded("val").samples.tolist()
    assert len(samples) == NUM_SAMPLES - 2, "two cannot be used"
    for row in (0, 5, 11, len(samples) - 1):
        assert torch.equal(context.image("val", row), torch.from_numpy(pixels(samples[row])).permute(2, 0, 1))


def test_confusion_counts_every_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_with_classes(tmp_path)
    seen: list[np.ndarray] = []
    draw = pictures.confusion
    monkeypatch.setattr(pictures, "confusion", lambda matrix, *rest: (seen.append(matrix), draw(matrix, *rest))[1])
    scores = evaluate({"zero_shot": ZeroShot()}, context)
    (matrix,) = seen
    assert matrix.sum() == NUM_SAMPLES - 2
    assert matrix.trace() / matrix.sum() == pytest.approx(scores["eval-val/acc1"])
    assert matrix.sum(axis=1).tolist() == torch.bincount(context.embedded("val").labels, minlength=3).tolist()
    assert context.shown.pictures["eval-val/confusion"].std() > 1


def numbered(size: int) -> list[str]:
    return [f"class {i}" for i in range(size)]


def counts(size: int, cells: dict[tuple[int, int], int]) -> np.ndarray:
    matrix = np.zeros((size, size), dtype=np.int64)
    for cell, count in cells.items():
        matrix[cell] = count
    return matrix


def cell(names: Sequence[str], row: int, column: int) -> tuple[slice, slice]:
    """Where in the picture all of class `row` taken for class `column` is seen: its rows and its columns."""
    picture = pictures.confusion(counts(len(names), {(row, column): 1}), names)
    blank = pictures.confusion(counts(len(names), {}), names)
    ys, xs = np.nonzero((picture != blank).any(axis=-1))
    assert (picture[ys, xs] == picture[ys[0], xs[0]]).all() and picture[ys[0], xs[0]].sum() < 150, "it is dark"
    return slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)


def ink(part: np.ndarray) -> int:
    """How far the text of [h, w, 3] reaches from left to right."""
    columns = np.nonzero((part < 128).all(axis=-1).any(axis=0))[0]
    return int(np.ptp(columns)) + 1 if len(columns) else 0


def test_confusion_is_darker_where_more_are_confused() -> None:
    names = numbered(5)
    rows, columns = cell(names, 1, 3)
    blank, lightness = pictures.confusion(counts(5, {}), names), []
    for count in (0, 1, 100, 250, 500, 750, 1000):
        picture = pictures.confusion(counts(5, {(1, 3): count, (1, 0): 1000 - count}), names)
        colour = picture[rows.stop - 2, columns.stop - 2]
        lightness.append(int(colour.sum()))
        assert (blank == colour).all(axis=-1).any(), "the scale shows it, too"
    assert lightness == sorted(set(lightness), reverse=True)
    assert lightness[0] == 3 * 255 and lightness[1] < 3 * 255 - 100, "one in 1000 is not none"


@pytest.mark.parametrize("size", [3, 32, 120])
def test_confusion_has_true_classes_in_rows_and_predicted_ones_in_columns(size: int) -> None:
    names = numbered(size)
    first, other = cell(names, 0, 0), cell(names, size - 1, 1)
    side = other[1].stop - first[1].stop
    assert 12 <= side <= 120
    assert other[0].stop - first[0].stop == (size - 1) * side


@pytest.mark.parametrize("size", [3, 32, 120])
def test_names_stand_beside_their_rows_and_below_their_columns(size: int) -> None:
    names = ["i"] * size
    names[1] = "a long name"
    picture = pictures.confusion(counts(size, {}), names)
    for label, is_long in ((0, False), (1, True), (2, False)):
        rows, left = cell(names, label, 0)
        bottom, columns = cell(names, size - 1, label)
        beside, below = picture[rows, : left.start], picture[bottom.stop :, columns].transpose(1, 0, 2)
        for part in (beside, below):
            assert ink(part) > 40 if is_long else 0 < ink(part) < 10


def test_names_of_any_alphabet_are_told_apart_and_long_ones_are_cut() -> None:
    drawn = [pictures.confusion(counts(1, {}), [name]).tobytes() for name in "ôЖλ"]
    assert len(set(drawn)) == 3
    long, longer = (pictures.confusion(counts(1, {}), ["n" * length]) for length in (41, 300))
    assert long.shape == longer.shape


@pytest.mark.parametrize("size", [1, 2, 32, 81, 120, 121, 600, 1000, 1001, 2500])
def test_confusion_has_a_sensible_size(size: int) -> None:
    height, width, _ = pictures.confusion(counts(size, {}), numbered(size)).shape
    largest = 1600 if size == 120 else 1250  # 120 names of 12 pixels each
    assert 200 < height < largest and 350 < width < largest


@pytest.mark.parametrize("size", [3, 121, 1000, 1001, 2500])
def test_no_lone_confusion_is_lost(size: int) -> None:
    for row, column in ((0, 0), (0, size - 1), (size - 1, 0), (size - 1, size - 1), (size // 3, size // 2 + 1)):
        cell(numbered(size), row, column)


@pytest.mark.parametrize(("size", "numbered_row", "other_row"), [(121, 100, 110), (1000, 300, 350), (2500, 500, 750)])
def test_numbers_stand_beside_many_classes(size: int, numbered_row: int, other_row: int) -> None:
    names = numbered(size)
    picture = pictures.confusion(counts(size, {}), names)
    for row, has_number in ((numbered_row, True), (other_row, False)):
        rows, left = cell(names, row, 0)
        assert (ink(picture[rows.start - 6 : rows.stop + 6, : left.start - 1]) > 0) == has_number


def test_the_numbers_of_some_of_many_classes_are_their_own() -> None:
    own, others = (pictures.confusion(counts(121, {}), numbered(121), range(first, first + 121)) for first in (0, 900))
    np.testing.assert_array_equal(own, pictures.confusion(counts(121, {}), numbered(121)))
    assert others.shape != own.shape or (others != own).any()


@pytest.mark.filterwarnings("error")
def test_heat_maps_are_lightest_where_the_similarity_is_highest() -> None:
    grey, values = torch.full((3, 32, 32), 100, dtype=torch.uint8), np.zeros((4, 4), dtype=np.float32)
    values[1, 3], values[2, 0] = 1, -1
    picture = pictures.heat_maps([grey, grey], [values, values * 0], ["a caption", "flat"], side=80)
    assert count(picture, (100, 100, 100)) >= 2 * 80 * 80, "the images as they are"
    left, top = picture.shape[1] - 8 - 80, 24
    patches = picture[top : top + 80, left : left + 80].reshape(4, 20, 4, 20, 3).mean(axis=(1, 3, 4))
    assert patches.argmax() == 1 * 4 + 3 and patches.argmin() == 2 * 4
    assert picture[-8 - 80 : -8, left : left + 80].std(axis=(0, 1)).max() == 0, "one colour where all are equal"


def test_heat_maps_say_what_and_how_similar() -> None:
    image, values = torch.zeros(3, 8, 8, dtype=torch.uint8), np.arange(4, dtype=np.float32).reshape(2, 2)
    lower, higher = values.copy(), values.copy()
    lower[0, 0], higher[1, 1] = -1, 4
    drawn = [
        pictures.heat_maps([image], [shown], [caption])
        for shown, caption in (
            (values, "a caption"),
            (values, "other words"),
            (lower, "a caption"),
            (higher, "a caption"),
        )
    ]
    assert len({picture[:24].tobytes() for picture in drawn}) == 4, "the titles"
    assert (drawn[0][24:] == drawn[1][24:]).all()


def test_evaluations_do_not_wait_for_matplotlib() -> None:
    code = (
        "import sys, numpy as np; from mmpretrain.reporting import pictures; pictures.confusion(np.eye(3), 'abc');"
        "sys.exit('matplotlib.figure' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_projector_gets_rows_labels_and_thumbnails(tmp_path: Path) -> None:
    context = context_with_classes(tmp_path)
    evaluate({"projector": Projector(num_images=7)}, context)
    rows, labels, images = context.shown.projections["eval-val"]
    assert rows.shape == (7, 12) and len(labels) == 7 and images.shape == (7, 3, 32, 32)
    assert labels[0] == context.embedded("val").captions[0]


def test_patch_similarity_is_shown_where_the_model_has_patches(tmp_path: Path) -> None:
    context = make_context(data=make_set(tmp_path))
    evaluate({"patches": PatchSimilarity(num_images=2)}, context)
    assert context.shown.pictures["eval-val/patch_similarity"].std() > 1
    without = ImageTextModel(TimmEncoder("test_resnet", 32), make_model().text, 12)
    assert PatchSimilarity().applicable_datasets(make_context(model=without, data=make_set(tmp_path))) == []


@pytest.mark.parametrize("pooling", [{"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_heads": 2}])
def test_patch_similarity_is_not_shown_where_no_token_is_pooled(pooling: dict[str, Any], tmp_path: Path) -> None:
    vision = {"layers": 1, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8}
    text = {"width": 32, "heads": 2, "layers": 1, "context_length": 16}
    data = make_set(tmp_path)
    pooled = open_clip_model("ViT-B-32", vision={**vision, **pooling}, text=text)
    assert PatchSimilarity().applicable_datasets(make_context(model=pooled, data=data)) == []
    token = open_clip_model("ViT-B-32", vision=vision, text=text)
    assert PatchSimilarity().applicable_datasets(make_context(model=token, data=data)) == ["val"]


def test_grey_and_transparent_images_can_be_drawn() -> None:
    images = [torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(4, 8, 8, dtype=torch.uint8)]
    answers = [pictures.Answers("query", None, images, (), (True, False))]
    assert pictures.gallery(answers).shape == (132, 280 + 2 * 132, 3)


def test_grid_shows_every_pair_as_the_model_sees_it() -> None:
    images = torch.stack([torch.full((3, 16, 16), 40 * number, dtype=torch.uint8) for number in range(6)])
    grid = pictures.pair_grid(images, [f"caption {number} {'word ' * 40}" for number in range(6)], columns=4, cell=32)
    assert grid.dtype == np.uint8
    assert grid.shape == (2 * (32 + 80), 4 * 32, 3)
    for number in range(6):
        top, left = (number // 4) * 112, (number % 4) * 32
        assert (grid[top + 10 : top + 20, left + 10 : left + 20] == 40 * number).all()
        assert (grid[top + 32 : top + 112, left : left + 32] < 128).any(), "its caption stands below it"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 2500.0, 5000.0, 10000.0], ["0", "2.5k", "5k", "10k"]),
        ([0.0, 4e6, 1.2e7], ["0", "4M", "12M"]),
        ([0.0, 0.00025, 0.001], ["0", "2.5e-4", "1e-3"]),
        ([0.0, 0.025, 0.1], ["0", "0.025", "0.1"]),
        ([14.281, 14.282], ["14.281", "14.282"]),
        ([-200.0, 0.1 + 0.2], ["-200", "0.3"]),
        ([], []),
    ],
)
def test_ticks_are_short_and_tell_values_apart(values: list[float], labels: list[str]) -> None:
    assert pictures.tick_labels(values) == labels
