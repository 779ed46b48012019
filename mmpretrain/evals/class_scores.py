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


def class_scores(ranks: Tensor, labels: Tensor, num_classes: int, prefix: str = "") -> dict[str, Score]:
    """Return `acc1`, `acc5` and `mean_per_class_recall`; of five classes or fewer no `acc5`, which would be 1.

    Args:
        ranks: result of `right_class_ranks`, int64 [n].
        labels: true classes, int64 [n].
        num_classes: number of classes.
        prefix: beginning of the metrics' names.
    """
    accuracies = {f"{prefix}acc{k}": mean_score(ranks < k, labels) for k in (1, 5) if k == 1 or k < num_classes}
    return {**accuracies, f"{prefix}mean_per_class_recall": class_mean_score(ranks < 1, labels)}
