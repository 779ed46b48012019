"""Prototypical networks: the loss written out class by class, and copies of support samples."""

import math

import pytest
import torch
from torch import Tensor

from mmpretrain.objectives.prototypical import Prototypical, prototypical_loss
from mmpretrain.training.task import Encodings
from tests import tiny
from tests.objectives.test_classification import labelled


def by_hand(embeddings: Tensor, labels: list[int], seeds: list[int], shots: int, temperature: float) -> float:
    """Equations 1 and 2 in plain Python; the first `shots` of each class by seed are the support."""
    rows = embeddings.tolist()
    of_class = {k: sorted((i for i in range(len(rows)) if labels[i] == k), key=lambda i: seeds[i]) for k in set(labels)}
    means = {
        k: [sum(rows[i][j] for i in members[:shots]) / len(members[:shots]) for j in range(len(rows[0]))]
        for k, members in of_class.items()
    }
    losses = []
    for k, members in of_class.items():
        for i in members[shots:]:
            distances = {c: sum((a - b) ** 2 for a, b in zip(rows[i], mean)) for c, mean in means.items()}
            total = sum(math.exp(-each / temperature) for each in distances.values())
            losses.append(distances[k] / temperature + math.log(total))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_loss_is_that_of_the_paper(shots: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [0, 1, 2, 0, 1, 0, 2, 0, 1, 2, 3]  # class 3 has no query
    embeddings = torch.randn(len(labels), 4, dtype=torch.float64, generator=generator)
    seeds = torch.randperm(len(labels), generator=generator) - 5
    loss = prototypical_loss(embeddings, torch.tensor(labels), torch.arange(len(labels)), seeds, shots, temperature)
    assert loss.item() == pytest.approx(by_hand(embeddings, labels, seeds.tolist(), shots, temperature), rel=1e-12)


def test_a_copy_of_a_support_sample_is_no_query() -> None:
    embeddings = torch.eye(5, dtype=torch.float64)
    labels, seeds = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([1, 2, 3, 4, 5])
    plain = prototypical_loss(embeddings[:4], labels[:4], torch.arange(4), seeds[:4], 1, 1.0)
    copied = prototypical_loss(embeddings, labels, torch.tensor([0, 1, 2, 3, 0]), seeds, 1, 1.0)
    assert copied.item() == pytest.approx(plain.item(), rel=1e-12)


def test_a_batch_without_queries_is_finite() -> None:
    embeddings = torch.randn(3, 4, requires_grad=True)
    loss = prototypical_loss(embeddings, torch.tensor([0, 1, 2]), torch.arange(3), torch.arange(3), 1, 0.1)
    loss.backward()
    assert loss.item() == 0 and embeddings.grad is not None and not embeddings.grad.any()


@pytest.mark.parametrize("features", ["embedding", "pooled"])
def test_rows_are_the_models(features: str) -> None:
    model = tiny.image_text().double()
    ours = Prototypical(model, shots=1, features=features)  # type: ignore[arg-type]
    batch = labelled([0, 1, 0, 1])
    rows, shared = ours.embed(Encodings(model, batch))
    images = batch.images("pairs")
    expected = model.embed_images(images) if features == "embedding" else model.encode_image(images).pooled
    assert torch.allclose(rows["embeddings"], expected) and shared == {}
    samples = batch.streams["pairs"]
    assert torch.equal(rows["seeds"], samples.seeds) and torch.equal(rows["labels"], torch.tensor([0, 1, 0, 1]))
