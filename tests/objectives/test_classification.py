"""Classification: the loss with smoothing and mixing, the zero-shot classifier, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from mmpretrain.batch import Batch
from mmpretrain.data.classes import Classes
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import hooks_of
from mmpretrain.objectives.classification import Classification
from mmpretrain.training.task import Encodings
from tests import tiny

CLASSES = Classes(["fox", "elk", "owl"], [["a fox", "one red fox"], ["an elk"], ["an owl"]])


def labelled(labels: list[int], mixed: list[tuple[int, float]] | None = None) -> Batch:
    batch = tiny.batch([5] * len(labels))
    samples = replace(batch.streams["pairs"], labels=torch.tensor(labels))
    if mixed is not None:
        others, shares = zip(*mixed, strict=True)
        samples = replace(samples, mixed_labels=torch.tensor(others), mixed_shares=torch.tensor(shares))
    return replace(batch, streams={"pairs": samples})


def objective(model: ImageTextModel, **arguments: Any) -> Classification:
    return tiny.randomize(Classification(model, **{"classes": CLASSES, **arguments})).double()


def loss_of(task: Classification, model: ImageTextModel, batch: Batch) -> tuple[Tensor, Tensor]:
    loss, others = task.loss(Encodings(model, batch))
    return loss, others["accuracy"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_loss_is_the_cross_entropy_of_a_linear_layer(tower: Any) -> None:
    model = tiny.image_text().double()
    ours = objective(model, tower=tower)
    batch = labelled([2, 0, 1, 1])
    encodings = Encodings(model, batch)
    pooled = (encodings.image("pairs") if tower == "image" else encodings.text("pairs")).pooled
    logits = pooled @ ours.head.weight.T + ours.head.bias
    expected = -(logits - logits.logsumexp(1, keepdim=True))[torch.arange(4), torch.tensor([2, 0, 1, 1])].sum()
    loss, hits = loss_of(ours, model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert hits.item() == (logits.argmax(1) == torch.tensor([2, 0, 1, 1])).sum().item()
    assert ours.count(batch).item() == 4


@pytest.mark.parametrize("batch", [labelled([0, 3]), labelled([0, 1], [(1, 0.5), (3, 0.5)])])
def test_labels_that_are_no_class_are_told(batch: Batch) -> None:
    ours = objective(tiny.image_text(), classes=None, num_classes=3)
    with pytest.raises(
        ValueError, match=r"^data\.train\.pairs has label 3, but objective\.classification\.num_classes is 3"
    ):
        ours.count(batch)


def test_smoothed_and_mixed_targets_are_timms() -> None:
    model = tiny.image_text().double()
    ours = objective(model, label_smoothing=0.1)
    labels, mixed = [2, 0, 1, 1], [(0, 0.3), (0, 0.0), (2, 1.0), (0, 0.55)]
    batch = labelled(labels, mixed)
    logits = ours.logits(Encodings(model, batch).image("pairs").pooled)
    expected = 0.0
    for i, (other, share) in enumerate(mixed):
        # timm pairs a batch with its reverse: the first row of two is the one asked for.
        target = mixup_target(torch.tensor([labels[i], other]), 3, 1 - share, 0.1)[:1].double()
        expected += SoftTargetCrossEntropy()(logits[i : i + 1], target).item()
    assert loss_of(ours, model, batch)[0].item() == pytest.approx(expected, rel=1e-6)


def test_zero_shot_begins_with_the_texts_embeddings() -> None:
    model = tiny.image_text(vocab_size=49408).double()
    tokenizer = ClipTokenizer(context_length=tiny.CONTEXT_LENGTH)
    ours = Classification(model, CLASSES, features="embedding", head="zero_shot", init_logit_scale=20.0).double()
    hooks = hooks_of(ours)
    hooks.set_tokenizer(tokenizer)
    hooks.after_init(model)
    rows = [
        torch.stack([model.embed_texts(*tokenizer([text]))[0] for text in texts]).mean(0) for texts in CLASSES.texts
    ]
    weights = F.normalize(torch.stack(rows), dim=-1)
    batch = labelled([0, 1, 2, 0])
    images = model.embed_images(batch.images("pairs"))
    logits = ours.logits(images)
    assert torch.allclose(logits, 20 * images @ weights.T, rtol=1e-6)
    assert loss_of(ours, model, batch)[0].item() == pytest.approx(
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]), reduction="sum").item(), rel=1e-12
    )


def test_a_random_head_is_left_alone_by_the_hooks() -> None:
    model = tiny.image_text().double()
    ours = objective(model)
    before = ours.head.weight.clone()
    hooks_of(ours).after_init(model)
    assert torch.equal(ours.head.weight, before)


def test_examples_name_the_class_and_the_guesses() -> None:
    model = tiny.image_text().double()
    ours = objective(model)
    batch = labelled([2, 0])
    examples = ours.examples(Encodings(model, batch), lambda ids: "")
    logits = ours.logits(Encodings(model, batch).image("pairs").pooled)
    first = CLASSES.names[int(logits[0].argmax())]
    assert examples[0].text.startswith(f"owl; predicted: {first} (") and len(examples) == 2
    assert torch.equal(examples[1].images[0], batch.images("pairs")[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": None}, r"the number of classes is not known; set data\.train\.pairs\.classes"),
        ({"num_classes": 4}, r"num_classes is 4, but data\.train\.pairs\.classes has 3; expected the same"),
        ({"classes": None, "num_classes": 1}, r"num_classes is 1; expected a number at least 2"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0"),
        ({"head": "zero_shot"}, r"head is 'zero_shot', which needs objective\.classification\.features=embedding"),
    ],
)
def test_what_cannot_be_built_is_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(tiny.image_text(), **arguments)


def test_a_stream_without_labels_is_told() -> None:
    model = tiny.image_text().double()
    with pytest.raises(
        ValueError, match=r"data\.train\.pairs\.label is null, but an objective reads the stream's labels"
    ):
        objective(model).count(tiny.batch([5, 5]))
