"""The classifier that a run has trained, on held-out data; and as its checkpoint gives it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmpretrain.data.classes import Classes
from mmpretrain.errors import UsageError
from mmpretrain.evals.base import evaluate
from mmpretrain.evals.classifier import Classifier
from mmpretrain.evals.held_out_loss import HeldOutLoss
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.classification import Classification
from tests import tiny
from tests.evals.held_out import BROKEN, LABELS, NUM_SAMPLES, make_context, make_model, make_set, pixels

CLASSES = Classes(LABELS, [[label] for label in LABELS])
READABLE = [number for number in range(NUM_SAMPLES) if number != BROKEN]


def objective(model: ImageTextModel, **arguments: Any) -> Classification:
    torch.manual_seed(1)
    return tiny.randomize(Classification(model, **{"classes": CLASSES, **arguments}))


@pytest.mark.parametrize("features", ["pooled", "embedding"])
@pytest.mark.parametrize("chunk_size", [2, 100])
def test_accuracy_is_that_of_the_objectives_logits(tmp_path: Path, features: str, chunk_size: int) -> None:
    model = make_model()
    ours = objective(model, features=features)
    data = make_set(tmp_path, caption=None, label="json.label", classes=CLASSES)
    context = make_context(model, data, build_objectives=lambda: {"own": ours})
    scores = evaluate({"classifier": Classifier(chunk_size=chunk_size)}, context)
    images = torch.stack([torch.from_numpy(pixels(number)).permute(2, 0, 1) for number in READABLE])
    with torch.no_grad():
        pooled = model.encode_image(images).pooled
        logits = ours.logits(pooled if features == "pooled" else model.embed_pooled_images(pooled))
    hits = logits.argmax(1) == torch.tensor([number % 3 for number in READABLE])
    assert set(scores) == {"eval-val/own_acc1", "eval-val/own_mean_per_class_recall"}
    assert scores["eval-val/own_acc1"] == pytest.approx(hits.double().mean().item())
    assert scores["eval-val/own_acc1"].intervals


def test_texts_are_classified_by_the_text_encoder(tmp_path: Path) -> None:
    model = make_model()
    ours = objective(model, tower="text")
    data = replace(make_set(tmp_path, label="json.label", classes=CLASSES), preprocess=None)
    context = make_context(model, data, build_objectives=lambda: {"own": ours})
    scores = evaluate({"classifier": Classifier()}, context)
    embedded = context.embedded("val")
    rows = embedded.text_features[embedded.first_texts]
    hits = ours.logits(rows).argmax(1) == embedded.labels
    assert scores["eval-val/own_acc1"] == pytest.approx(hits.double().mean().item())


def test_nothing_is_dropped(tmp_path: Path) -> None:
    model = make_model()
    ours = objective(model, dropout=0.9).train()
    data = make_set(tmp_path, caption=None, label="json.label", classes=CLASSES)
    scores = [
        evaluate(
            {"classifier": Classifier()}, make_context(model, data, build_objectives=lambda each=each: {"own": each})
        )
        for each in (ours, objective(model))
    ]
    first, second = ({name: float(score) for name, score in of_one.items()} for of_one in scores)
    assert first == second
    assert ours.training and ours.dropout.training, "the run goes on with it"


def test_a_constant_classifier_has_no_hit(tmp_path: Path) -> None:
    model = make_model()
    ours = objective(model)
    torch.nn.init.zeros_(ours.head.weight)
    torch.nn.init.zeros_(ours.head.bias)
    data = make_set(tmp_path, caption=None, label="json.label", classes=CLASSES)
    context = make_context(model, data, build_objectives=lambda: {"own": ours})
    assert evaluate({"classifier": Classifier()}, context)["eval-val/own_acc1"] == 0


def test_a_set_without_labels_or_a_run_without_a_classifier_is_left_out(tmp_path: Path) -> None:
    model = make_model()
    data = make_set(tmp_path, caption=None, label="json.label")
    assert Classifier().applicable_datasets(make_context(model, data)) == []
    ours = objective(model)
    unlabelled = make_context(model, make_set(tmp_path), build_objectives=lambda: {"own": ours})
    assert Classifier().applicable_datasets(unlabelled) == []


def test_other_classes_are_told(tmp_path: Path) -> None:
    model = make_model()
    other = Classes(["cat", "elk", "ant"], [["cat"], ["elk"], ["ant"]])
    ours = objective(model)
    data = make_set(tmp_path, caption=None, label="cls", classes=other)
    context = make_context(model, data, build_objectives=lambda: {"own": ours})
    with pytest.raises(UsageError, match=r"classes has 3 classes with .elk. as number 1, but objective\.own was"):
        Classifier().applicable_datasets(context)  # before a run begins
    assert Classifier(data=["other"]).applicable_datasets(context) == ["val"]
    few = objective(model, classes=None, num_classes=2)
    context = make_context(model, make_set(tmp_path, caption=None, label="cls"), build_objectives=lambda: {"own": few})
    with pytest.raises(UsageError, match=r"data\.val\.val has label 2, but objective\.own predicts 2 classes"):
        evaluate({"classifier": Classifier()}, context)


def test_the_held_out_loss_is_the_objectives(tmp_path: Path) -> None:
    model = make_model()
    ours = objective(model, label_smoothing=0.1)
    data = make_set(tmp_path, caption=None, label="json.label", classes=CLASSES)
    context = make_context(model, data, build_objectives=lambda: {"own": ours})
    scores = evaluate({"held_out_loss": HeldOutLoss(block_size=4)}, context)
    images = torch.stack([torch.from_numpy(pixels(number)).permute(2, 0, 1) for number in READABLE])
    labels = torch.tensor([number % 3 for number in READABLE])
    with torch.no_grad():
        logits = ours.logits(model.encode_image(images).pooled)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert scores["eval-val/own_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert scores["eval-val/own_accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    other = replace(data, classes=Classes(["a", "b", "c"], [["a"], ["b"], ["c"]]))
    context = make_context(model, other, build_objectives=lambda: {"own": ours})
    assert HeldOutLoss().applicable_datasets(context) == []
