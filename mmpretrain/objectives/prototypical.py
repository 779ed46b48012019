"""Prototypical networks (Snell et al. 2017): classify each query by the nearest mean of a class's few support samples."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mmpretrain.data.classes import Classes
from mmpretrain.errors import check_number
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Encodings


def prototypical_loss(
    embeddings: Tensor, labels: Tensor, ids: Tensor, seeds: Tensor, shots: int, temperature: float
) -> Tensor:
    """Return the mean of -log p(y | q) over the queries q of an episode, a scalar.

    p(k | q) is the softmax over the classes of -|q - c_k|^2 / temperature, where c_k is the mean of the support of class k
    (equations 1 and 2). The support is the `shots` samples of each class with the smallest seeds; all others are queries,
    except copies of a sample in the support. A class without queries is one of the classes to choose from.

    Args:
        embeddings: floating point [B, d].
        labels: classes, int64 [B].
        ids: ids of the samples, int64 [B]; copies of a sample share theirs.
        seeds: random bits of the samples, int64 [B].
        shots: number of support samples of each class.
        temperature: scale of the squared distances.
    """
    is_same = labels[:, None] == labels
    places = torch.arange(len(labels), device=labels.device)
    is_before = (seeds[:, None] > seeds) | ((seeds[:, None] == seeds) & (places[:, None] > places))
    ranks = (is_same & is_before).sum(1)
    is_support = ranks < shots
    is_copy = ((ids[:, None] == ids) & is_support).any(1)
    is_query = ~is_support & ~is_copy
    shares = (is_same & is_support).to(embeddings.dtype)
    # A prototype stands in each row of its class; the class's first row represents it among the classes.
    prototypes = shares / shares.sum(1, keepdim=True) @ embeddings
    distances = embeddings.square().sum(1, keepdim=True) + prototypes.square().sum(1) - 2 * embeddings @ prototypes.T
    logits = -distances / temperature
    all_classes = logits.masked_fill(ranks != 0, -torch.inf).logsumexp(1)
    losses = all_classes - logits.diagonal()
    return (losses * is_query).sum() / is_query.sum().clamp(min=1)


class Prototypical(nn.Module):
    """Prototypical loss of labelled images, over the batch as one episode.

    With `data.train.<stream>.episodes` each batch holds the same number of samples of each of a few classes. A batch in any
    other order works as well: classes with more than `shots` samples in it have queries.

    Args:
        model: the model.
        classes: classes of the stream, from `data.train.<stream>.classes`, if it has any.
        shots: number of support samples of each class.
        features: `embedding`, of unit length, or `pooled` states, as in the paper.
        temperature: scale of the squared distances; 1 in the paper.
        stream: data stream of the labelled images.

    Raises: UsageError if a number is out of range.
    """

    def __init__(
        self,
        model: ImageTextModel,
        classes: Classes | None = None,
        shots: int = 5,
        features: Literal["embedding", "pooled"] = "embedding",
        temperature: float = 0.1,
        stream: str = "pairs",
        config_path: str = "objective.prototypical",
    ) -> None:
        super().__init__()
        check_number(f"{config_path}.shots", shots, at_least=1)
        check_number(f"{config_path}.temperature", temperature, above=0)
        self.streams = (stream,)
        self.class_names = None if classes is None else classes.names
        self.shots, self.features, self.temperature = shots, features, temperature

    def embed(self, encodings: Encodings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the inputs of the loss for a micro-batch.

        Returns: (rows: embeddings [b, d], labels, ids and seeds int64 [b]; shared: empty).

        Raises: ValueError if the stream has no labels.
        """
        (stream,) = self.streams
        samples = encodings.samples(stream)
        if self.features == "pooled":
            pooled = encodings.image(stream).pooled
            embeddings = pooled if pooled.dtype == torch.float64 else pooled.float()
        else:
            embeddings = encodings.image_embedding(stream)
        labels = encodings.batch.labels(stream)
        return {"embeddings": embeddings, "labels": labels, "ids": samples.ids, "seeds": samples.seeds}, {}

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """Compute `prototypical_loss` over the whole batch."""
        return prototypical_loss(
            rows["embeddings"], rows["labels"], rows["ids"], rows["seeds"], self.shots, self.temperature
        )
