"""What the page's functions answer, against NumPy in float64."""

import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.data.image_folder import ImageFolder
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.evals.base import Context
from mmpretrain.evals.embedding_cache import EmbeddingCache
from mmpretrain.evals.embeddings import EvalSet
from mmpretrain.interactive.abilities import abilities_of
from mmpretrain.interactive.classification import Classifier, class_names
from mmpretrain.interactive.reconstruction import reconstructions
from mmpretrain.interactive.search import ImageSearch
from mmpretrain.interactive.word_maps import word_maps, words_of
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Objective
from mmpretrain.objectives.mae import MAE
from tests import tiny
from tests.evals.held_out import TOKENIZER, make_context, make_model, pixels

NUM_IMAGES, BROKEN = 9, 4
PREPROCESS = Preprocess(tiny.IMAGE_SIZE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in a folder, of which one does not decode."""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number in range(NUM_IMAGES):
        file = tmp_path / "photos" / f"{'deep/' if number % 2 else ''}{number}.png"
        if number == BROKEN:
            file.write_bytes(b"no image")
        else:
            Image.fromarray(pixels(number)).resize((64, 48)).save(file)
    return tmp_path / "photos"


def context_of(folder: Path, cache: EmbeddingCache | None = None) -> Context:
    data = EvalSet("images", ImageFolder(folder), PREPROCESS, key="images")
    return replace(make_context(make_model(), cache=cache), sets={"images": data})


def text_embeddings(context: Context, texts: list[str]) -> np.ndarray:
    return context.model.embed_texts(*TOKENIZER(texts)).double().numpy()


def image(number: int = 3) -> torch.Tensor:
    return torch.from_numpy(pixels(number)).permute(2, 0, 1).contiguous()


def embedded(context: Context, images: torch.Tensor) -> np.ndarray:
    return context.model.embed_images(images).double().numpy()


def test_search_orders_the_images_by_their_cosine(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = context_of(folder)
    search = ImageSearch(context, "images", side=40)
    keys = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    keys.remove(f"{BROKEN}.png")
    assert f"1 of the {NUM_IMAGES} samples of images cannot be used" in caplog.text
    rows = embedded(context, torch.stack([PREPROCESS(folder / key) for key in keys]))
    for found, query in (
        (search.by_text(" a red circle\n", 5), text_embeddings(context, ["a red circle"])[0]),
        (search.by_image(PREPROCESS(folder / keys[2]), 5), rows[2]),
    ):
        best = np.argsort(-(rows @ query))[:5]
        assert [each.key for each in found] == [keys[i] for i in best]
        np.testing.assert_allclose([each.similarity for each in found], (rows @ query)[best], atol=1e-5)
        assert all(each.image.shape == (30, 40, 3) and each.image.dtype == np.uint8 for each in found)
    assert found[0].key == keys[2]
    assert len(search.by_text("x", 60)) == search.num_images == NUM_IMAGES - 1


def test_search_refuses_a_blank_text_and_tells_of_a_file_that_is_gone(folder: Path) -> None:
    search = ImageSearch(context_of(folder), "images")
    with pytest.raises(ValueError, match="the text is empty"):
        search.by_text(" \n", 3)
    os.remove(folder / "0.png")
    with pytest.raises(ValueError, match=r"0\.png cannot be shown"):
        search.by_text("anything", NUM_IMAGES)


def test_embeddings_of_a_folder_are_kept_until_a_file_changes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for times in (0, 1):
        ImageSearch(context_of(folder, EmbeddingCache(folder.parent / "cache", "weights")), "images")
        assert caplog.text.count("the embeddings of images were computed before") == times
    Image.fromarray(pixels(50)).save(folder / "0.png")
    ImageSearch(context_of(folder, EmbeddingCache(folder.parent / "cache", "weights")), "images")
    assert caplog.text.count("the embeddings of images were computed before") == 1


@pytest.mark.parametrize("logit_scale", [None, 7.0])
def test_scores_of_classes_are_softmax_of_scaled_cosines_or_cosines(logit_scale: float | None) -> None:
    context = make_context(logit_scale=logit_scale)
    classifier = Classifier(context)
    names, templates = ["cat", "dog", "red fox"], ["a {}", "{}, drawn"]
    texts = [text_embeddings(context, [t.replace("{}", name) for t in templates]).mean(0) for name in names]
    rows = np.stack([row / np.linalg.norm(row) for row in texts])
    for number in (3, 5):
        expected = rows @ embedded(context, image(number)[None])[0]
        if logit_scale is not None:
            exponentials = [math.exp(logit_scale * cosine) for cosine in expected]
            expected = np.array(exponentials) / sum(exponentials)
        scored = classifier(image(number), names, templates)
        assert [name for name, _ in scored] == [names[i] for i in np.argsort(-expected)]
        np.testing.assert_allclose([score for _, score in scored], np.sort(expected)[::-1], atol=1e-5)
    assert classifier.has_probabilities == (logit_scale is not None)
    other = dict(classifier(image(5), names, ["{}"]))
    assert other.keys() == dict(scored).keys() and other != dict(scored), "other templates, other scores"


def test_class_names_are_distinct_lines() -> None:
    assert class_names(" cat\n\ndog \ncat\n") == ["cat", "dog"]
    with pytest.raises(ValueError, match="the number of classes is 1; expected two or more"):
        class_names("cat\ncat")
    with pytest.raises(ValueError, match=r"each with \{\}"):
        Classifier(make_context())(image(), ["cat", "dog"], ["a photo"])
    with pytest.raises(ValueError, match="make 24000 texts"):
        Classifier(make_context())(image(), [str(number) for number in range(300)], "openai")


def test_word_maps_are_cosines_of_projected_patches() -> None:
    context = make_context()
    found = word_maps(image(), "a red fox, red", context)
    assert [text for text, _ in found] == ["a red fox, red", "a", "red", "fox"]
    model = context.model
    with torch.no_grad():
        tokens = model.encode_image(image()[None]).tokens[0, 1:].double()
        assert model.image_projection is not None
        patches = (tokens @ model.image_projection.weight.double().T).numpy()
    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    for (_, values), row in zip(found, text_embeddings(context, [text for text, _ in found]), strict=True):
        np.testing.assert_allclose(values, (patches @ row).reshape(4, 4), atol=1e-5)
    assert [text for text, _ in word_maps(image(), " fox ", context)] == ["fox"]


def test_words_are_letters_and_digits() -> None:
    assert words_of("It's a «state-of-the-art» naïve café, 2 a") == [
        "It's", "a", "state-of-the-art", "naïve", "café", "2",
    ]  # fmt: skip
    for text in ("", "!?", " ".join(map(str, range(33)))):
        with pytest.raises(ValueError, match="distinct words; expected 1 to 32"):
            words_of(text)


def autoencoder(model: ImageTextModel) -> MAE:
    return tiny.randomize(MAE(model, decoder_width=16, decoder_depth=1, decoder_heads=2, norm_pix=False))


def test_reconstructions_keep_visible_patches_and_predict_the_others() -> None:
    context = make_context()
    rows = reconstructions(image(), [1, 2], autoencoder(context.model), context)
    masks = []
    for original, visible, predicted in rows:
        assert torch.equal(original, image())
        is_kept = (visible == original).all(0).reshape(4, 8, 4, 8).all(3).all(1)
        assert is_kept.sum() == 4, "a quarter of 16 patches"
        pixels_kept = is_kept.repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert torch.equal(predicted[:, pixels_kept], original[:, pixels_kept])
        assert not torch.equal(predicted[:, ~pixels_kept], original[:, ~pixels_kept])
        masks.append(is_kept)
    assert not torch.equal(*masks)
    again = reconstructions(image(), [1], autoencoder(make_model()), make_context())
    assert torch.equal(again[0][1], rows[0][1])


def loaded(model: ImageTextModel, objectives: dict[str, Objective], error: str = "") -> Loaded:
    def build() -> dict[str, Objective]:
        if error:
            raise ValueError(error)
        return objectives

    preprocess = None if model.image is None else PREPROCESS
    return Loaded(model, preprocess, TOKENIZER, {}, {}, Path("run"), build_objectives=build)


def test_absent_tabs_are_told_with_the_reason(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = make_model()
    full = abilities_of(loaded(model, {"mae": autoencoder(model)}), context_of(folder))
    assert full.search and full.classifier and full.has_word_maps and full.autoencoder
    assert "no tab" not in caplog.text
    images_alone = ImageTextModel(tiny.vit(), None, embed_dim=12)
    none = abilities_of(loaded(images_alone, {}), make_context(images_alone))
    assert (none.search, none.classifier, none.has_word_maps, none.autoencoder) == (None, None, False, None)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("no tab")]
    assert lines == [
        "no tab Search: images is not given",
        "no tab Zero-shot: the model has no text encoder",
        "no tab Words: the model has no text encoder",
        "no tab Reconstruction: the checkpoint has no objective mae",
    ]
    failing = abilities_of(loaded(model, {}, "objective.x is somebody's"), make_context(model))
    assert failing.autoencoder is None and failing.classifier is not None
    assert "no tab Reconstruction: the objectives cannot be built (objective.x is somebody's)" in caplog.text
    texts_alone = ImageTextModel(None, tiny.text(), embed_dim=12)
    with pytest.raises(ValueError, match="the model has no image encoder"):
        abilities_of(loaded(texts_alone, {}), make_context(texts_alone))
