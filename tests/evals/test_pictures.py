"""What evaluators give to be looked at."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmpretrain import pictures
from mmpretrain.evals.evaluation import Context, evaluate
from mmpretrain.evals.gallery import Gallery
from mmpretrain.evals.patch_similarity import PatchSimilarity
from mmpretrain.evals.projector import Projector
from mmpretrain.evals.zero_shot import ZeroShot, read_classes
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.open_clip import open_clip_model
from mmpretrain.models.vit import TimmEncoder
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
    monkeypatch.setattr(pictures, "confusion", lambda matrix, names: (seen.append(matrix), draw(matrix, names))[1])
    scores = evaluate({"zero_shot": ZeroShot()}, context)
    (matrix,) = seen
    assert matrix.sum() == NUM_SAMPLES - 2
    assert matrix.trace() / matrix.sum() == pytest.approx(scores["eval-val/acc1"])
    assert matrix.sum(axis=1).tolist() == torch.bincount(context.embedded("val").labels, minlength=3).tolist()
    assert context.shown.pictures["eval-val/confusion"].std() > 1


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
    assert PatchSimilarity().wants(make_context(model=without, data=make_set(tmp_path))) == []


@pytest.mark.parametrize("pooling", [{"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_heads": 2}])
def test_patch_similarity_is_not_shown_where_no_token_is_pooled(pooling: dict[str, Any], tmp_path: Path) -> None:
    vision = {"layers": 1, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8}
    text = {"width": 32, "heads": 2, "layers": 1, "context_length": 16}
    data = make_set(tmp_path)
    pooled = open_clip_model("ViT-B-32", vision={**vision, **pooling}, text=text)
    assert PatchSimilarity().wants(make_context(model=pooled, data=data)) == []
    token = open_clip_model("ViT-B-32", vision=vision, text=text)
    assert PatchSimilarity().wants(make_context(model=token, data=data)) == ["val"]


def test_grey_and_transparent_images_can_be_drawn() -> None:
    images = [torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(4, 8, 8, dtype=torch.uint8)]
    answers = [pictures.Answers("query", None, images, (), (True, False))]
    assert pictures.gallery(answers).shape == (132, 280 + 2 * 132, 3)
