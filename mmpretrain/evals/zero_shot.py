"""Zero-shot classification: predict the class whose text embeddings are most similar to the image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.data.classes import Classes
from mmpretrain.errors import check_number
from mmpretrain.evals.base import Context
from mmpretrain.evals.class_scores import class_scores, right_class_ranks
from mmpretrain.reporting import pictures
from mmpretrain.scores import Score


def class_embeddings(classes: Classes, context: Context) -> Tensor:
    """Return the mean of each class's text embeddings at unit length, float32 [C, e]. A collective."""
    rows = context.embedded_texts([text for group in classes.texts for text in group])
    groups = rows.split([len(group) for group in classes.texts])
    return F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)


class ZeroShot:
    """Classify images by the mean of each class's text embeddings.

    Args:
        data: names of `data.val` to use; None uses each data set with `classes` and `label`.
        chunk_size: number of images classified at once; memory is proportional to chunk_size x number of classes. The
            ranks share the chunks.

    Raises: UsageError if `chunk_size` is below 1.
    """

    needs = "label and classes"

    def __init__(self, data: Sequence[str] | None = None, chunk_size: int = 256) -> None:
        check_number("chunk_size", chunk_size, at_least=1)
        self.data = data
        self.chunk_size = chunk_size

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with classes and labels."""
        return context.classified_sets

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return `acc1`, `acc5` of more than five classes, and `mean_per_class_recall`, and show the picture `confusion`."""
        classes = context.sets[name].classes
        assert classes is not None
        embedded = context.embedded(name)
        weights = class_embeddings(classes, context)
        predicted, ranks = self._classify(embedded.images, embedded.labels, weights)
        if distributed.is_main():
            counts, shown = _confusion(predicted, embedded.labels)
            picture = pictures.confusion(counts.cpu().numpy(), [classes.names[i] for i in shown], shown)
            context.show(name, "confusion", picture)
        return class_scores(ranks, embedded.labels, len(classes.names))

    def _classify(self, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted class of each image and the rank of its right class, int64 [n] each. A collective.

        A chunk has the same images on any number of ranks, so that its similarities are the same bit for bit.
        """
        starts = range(0, len(images), self.chunk_size)
        results = [torch.zeros(0, 2, dtype=torch.int64, device=images.device)]
        for start in starts[distributed.share(len(starts))]:
            similarities = images[start : start + self.chunk_size] @ weights.T
            ranks = right_class_ranks(similarities, labels[start : start + self.chunk_size])
            results.append(torch.stack([similarities.argmax(dim=1), ranks], dim=1))
        predicted, all_ranks = distributed.gather_ragged_rows(torch.cat(results)).unbind(1)
        return predicted, all_ranks


def _confusion(predicted: Tensor, labels: Tensor) -> tuple[Tensor, list[int]]:
    """Count the true classes (rows) and predictions (columns) of the K classes that occur as either.

    Args:
        predicted, labels: predicted and true classes, int64 [n].

    Returns: (counts int64 [K, K], numbers of the K classes in ascending order).
    """
    shown, places = torch.cat([labels, predicted]).unique(return_inverse=True)
    rows, columns = places.chunk(2)
    counts = torch.bincount(rows * len(shown) + columns, minlength=len(shown) ** 2)
    return counts.reshape(len(shown), len(shown)), shown.tolist()
