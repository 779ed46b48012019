"""Classification of texts: scikit-learn's scores, data sets without images, and models of one or two encoders."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from mmpretrain.data.packing import packed
from mmpretrain.data.shards import Shards
from mmpretrain.errors import UsageError
from mmpretrain.evals.base import Context, evaluate
from mmpretrain.evals.embeddings import EvalSet, embed
from mmpretrain.evals.linear_probe import LinearProbe
from mmpretrain.evals.text_classification import TextClassification
from mmpretrain.models.image_text import ImageTextModel
from tests import tiny
from tests.evals.held_out import TOKENIZER, make_context, make_model, make_set
from tests.tars import write_tars

WORDS = ["apple pear plum", "wolf bear fox", "car bus train", "red blue green", "one two three", "rain snow wind"]


def samples(count: int, seed: int, num_classes: int) -> list[dict[str, Any]]:
    """Texts of two words of their class and one of any."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        label = int(rng.integers(num_classes))
        own, other = WORDS[label].split(), WORDS[rng.integers(len(WORDS))].split()
        words = [*rng.choice(own, 2), rng.choice(other)]
        result.append({"txt": " ".join(words), "cls": str(label), "json": {"texts": [" ".join(words), "the same"]}})
    return result


def text_set(folder: Path, num_classes: int = 6, caption: str = "txt") -> EvalSet:
    shards = {}
    for split, seed, count in (("test", 0, 60), ("train", 1, 120)):
        (folder / split).mkdir()
        shards[split] = Shards(write_tars(folder / split, samples(count, seed, num_classes), [count]))
    return EvalSet("val", shards["test"], None, caption=caption, label="cls", train=shards["train"])


def text_model() -> ImageTextModel:
    torch.manual_seed(0)
    return tiny.randomize(ImageTextModel(None, tiny.text(vocab_size=TOKENIZER.vocab_size)))


def pooled(model: ImageTextModel, texts: Sequence[str]) -> Tensor:
    """The pooled states of texts, one at a time."""
    rows = []
    for text in texts:
        ids, lengths = TOKENIZER([text])
        rows.append(model.encode_text(ids, lengths, packed(lengths, ids.shape[1])).pooled[0])
    return torch.stack(rows)


def texts_and_labels(data: EvalSet) -> tuple[list[str], list[int]]:
    numbers = range(data.shards.num_samples)
    return (
        [data.shards.read(i, ("txt",)).decode() for i in numbers],
        [int(data.shards.read(i, ("cls",))) for i in numbers],
    )


@pytest.mark.parametrize("features", ["pooled", "embedding"])
@torch.no_grad()
def test_scores_are_scikit_learns(tmp_path: Path, features: Any) -> None:
    data, model = text_set(tmp_path), make_model()
    scores = evaluate({"texts": TextClassification(features=features, cs=[1.0])}, make_context(model, data))
    assert data.train is not None
    splits = [texts_and_labels(each) for each in (replace(data, shards=data.train), data)]
    rows = [pooled(model, texts) for texts, _ in splits]
    if features == "embedding":
        rows = [model.embed_pooled_texts(each) for each in rows]
    (train, test), (labels, expected) = (each.double().numpy() for each in rows), (labels for _, labels in splits)
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(train, labels)
    assert scores["eval-val/text_classification_acc1"] == pytest.approx(theirs.score(test, expected), abs=1e-6)
    assert set(scores["eval-val/text_classification_acc1"].intervals) == {"sample", "class"}
    assert scores["eval-val/text_classification_c"] == 1.0
    predicted = theirs.predict(test)
    recalls = [(predicted[np.array(expected) == each] == each).mean() for each in range(6)]
    assert scores["eval-val/text_classification_mean_per_class_recall"] == pytest.approx(np.mean(recalls))


def test_a_model_of_texts_alone_needs_no_images(tmp_path: Path) -> None:
    data, model = text_set(tmp_path), text_model()
    scores = evaluate({"texts": TextClassification()}, make_context(model, data))
    assert scores["eval-val/text_classification_acc1"] > 1.5 / 6  # random states tell words apart


def test_the_first_of_several_texts_counts(tmp_path: Path) -> None:
    data, model = text_set(tmp_path), make_model()
    evaluators = {"texts": TextClassification(cs=[1.0])}
    expected = evaluate(evaluators, make_context(model, data))
    assert evaluate(evaluators, make_context(model, replace(data, caption="json.texts"))) == pytest.approx(expected)


@torch.no_grad()
def test_text_features_are_the_states_before_the_projection(tmp_path: Path) -> None:
    data, model = make_set(tmp_path), make_model()
    found = embed(model, TOKENIZER, data, 4, 0)
    torch.testing.assert_close(found.text_features, pooled(model, found.captions), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.texts, model.project_text(found.text_features), rtol=1e-4, atol=1e-5)


def test_a_constant_model_is_at_chance(tmp_path: Path) -> None:
    data, model = text_set(tmp_path), make_model()
    assert model.text is not None
    for parameter in model.text.parameters():
        nn.init.zeros_(parameter)
    scores = evaluate({"texts": TextClassification()}, make_context(model, data))
    _, labels = texts_and_labels(data)
    assert scores["eval-val/text_classification_acc1"] <= np.bincount(labels).max() / len(labels)
    assert scores["eval-val/text_classification_mean_per_class_recall"] <= 1 / 6 + 1e-9


def test_five_classes_have_no_accuracy_at_five(tmp_path: Path) -> None:
    scores = evaluate({"texts": TextClassification(cs=[1.0])}, make_context(data=text_set(tmp_path, num_classes=5)))
    assert sorted(scores) == [f"eval-val/text_classification_{each}" for each in ("acc1", "c", "mean_per_class_recall")]


def test_it_applies_to_labelled_texts_with_a_training_split(tmp_path: Path) -> None:
    def chosen(data: EvalSet, **fields: Any) -> list[str]:
        context: Context = make_context(data=replace(data, **fields))
        return TextClassification().applicable_datasets(context)

    data, images = text_set(tmp_path), make_set(tmp_path, label="cls")
    assert chosen(data) == ["val"]
    for lacking in ("caption", "label", "train"):
        assert chosen(data, **{lacking: None}) == []
    assert chosen(images, train=images.shards) == []
    assert chosen(images, train=images.shards, preprocess=None) == ["val"]  # as for a model without image encoder
    assert LinearProbe().applicable_datasets(make_context(data=data)) == []


def test_a_model_of_images_alone_and_wrong_arguments_are_refused(tmp_path: Path) -> None:
    images = ImageTextModel(tiny.vit(), None)
    with pytest.raises(ValueError, match=r"eval.texts embeds texts, but model.text is null"):
        evaluate({"texts": TextClassification()}, make_context(images, text_set(tmp_path)))
    with pytest.raises(UsageError, match=r"cs is \[\]"):
        TextClassification(cs=[])
