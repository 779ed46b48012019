"""Scores of classifiers of images, with ties against the model."""

from torch import Tensor

from mmpretrain.scores import Score, class_mean_score, mean_score


def right_class_ranks(similarities: Tensor, labels: Tensor) -> Tensor:
    """Return the number of wrong classes ranked before each image's right class. Ties count against the model.

    Args:
        similarities: similarities of images and classes [n, C]. NaN also counts against the model.
        labels: true classes, int64 [n].

    Returns: int64 [n]; 0 is a hit at rank one.
    """
    others = ~(similarities < similarities.gather(1, labels[:, None]))
    return others.sum(1) - others.gather(1, labels[:, None])[:, 0].long()


def class_scores(ranks: Tensor, labels: Tensor, prefix: str = "") -> dict[str, Score]:
    """Return `acc1`, `acc5` and `mean_per_class_recall`.

    Args:
        ranks: result of `right_class_ranks`, int64 [n].
        labels: true classes, int64 [n].
        prefix: beginning of the metrics' names.
    """
    return {
        f"{prefix}acc1": mean_score(ranks < 1, labels),
        f"{prefix}acc5": mean_score(ranks < 5, labels),
        f"{prefix}mean_per_class_recall": class_mean_score(ranks < 1, labels),
    }
