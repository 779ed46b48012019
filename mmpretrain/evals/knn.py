"""Weighted nearest-neighbour classification of frozen features (Wu et al. 2018; DINO, Caron et al. 2021)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.errors import check_number
from mmpretrain.evals.base import Context
from mmpretrain.evals.class_scores import class_scores, right_class_ranks
from mmpretrain.evals.labelled import Features, LabelledSplits
from mmpretrain.scores import Score


class KNN:
    """Classify each image by its most similar images of the training split.

    The k neighbours of highest cosine similarity s vote for their classes with weight exp(s / temperature).

    Args:
        data: names of `data.val` to use; None uses each data set with labels and a training split.
        features: `pooled`, the encoder's states before the projection, or `embedding`, of unit length in the shared space.
        k: number of neighbours; at most the size of the training split is used.
        temperature: temperature of the weights.
        chunk_size: number of images classified at once; memory is proportional to chunk_size x size of the training split.

    Raises: UsageError if a value is out of range.
    """

    needs = "label and train.shards"
    towers = ("image",)

    def __init__(
        self,
        data: Sequence[str] | None = None,
        features: Features = "pooled",
        k: int = 20,
        temperature: float = 0.07,
        chunk_size: int = 256,
    ) -> None:
        check_number("k", k, at_least=1)
        check_number("temperature", temperature, above=0)
        check_number("chunk_size", chunk_size, at_least=1)
        self.data = data
        self.features = features
        self.k = k
        self.temperature = temperature
        self.chunk_size = chunk_size

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with labels and a training split."""
        return context.trainable_sets

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `knn_acc1`, `_acc5` of more than five classes, and `_mean_per_class_recall`."""
        splits = LabelledSplits.of(name, context, self.features)
        train, test = F.normalize(splits.train, dim=-1), F.normalize(splits.test, dim=-1)
        starts = range(0, len(test), self.chunk_size)  # a chunk has the same images on any number of ranks
        ranks = [splits.test_labels[:0]]
        for start in starts[distributed.share(len(starts))]:
            votes = self._votes(test[start : start + self.chunk_size], train, splits.train_labels, splits.num_classes)
            ranks.append(right_class_ranks(votes, splits.test_labels[start : start + self.chunk_size]))
        all_ranks = distributed.gather_ragged_rows(torch.cat(ranks))
        return class_scores(all_ranks, splits.test_labels, splits.num_classes, "knn_")

    def _votes(self, test: Tensor, train: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        """Return the votes [n, num_classes] of the training images' labels, int64 [m]."""
        similarities, neighbours = (test @ train.T).topk(min(self.k, len(train)), dim=1)
        weights = (
            (similarities - similarities[:, :1]) / self.temperature
        ).exp()  # relative to the nearest: no overflow
        return weights.new_zeros(len(test), num_classes).scatter_add(1, labels[neighbours], weights)
