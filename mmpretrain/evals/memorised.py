"""Memorised training pairs: what a model recalls of its training split, beyond what it does of held-out pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.errors import check_number
from mmpretrain.evals.base import Context, evenly_spread
from mmpretrain.evals.embeddings import Embedded
from mmpretrain.scores import Score, mean_score


class Memorised:
    """Compare the recall of training pairs with that of held-out pairs, among equally many captions.

    Of both splits the same number n of images is taken, with one caption each (its first), which differ from each other. A
    model that has learned, but not memorised, recalls the captions of both equally well; the gap is that of membership
    inference by retrieval (as in Jayaraman et al. 2024, who subtract a reference model where captions are not equally hard).
    The splits should therefore be drawn from the same data. Captions count as equal if their texts are.

    Args:
        data: names of `data.val` to use; None uses each data set with captions and a training split.
        max_samples: largest number of images of each split, spread evenly over it; the cost of comparisons grows with its
            square. As many training pairs are embedded as there are held-out images, at most.
        chunk_size: number of images compared at once; memory is proportional to chunk_size x 2 max_samples.

    Raises: UsageError if a number is below 1.
    """

    needs = "caption and train.shards"

    def __init__(self, data: Sequence[str] | None = None, max_samples: int = 10_000, chunk_size: int = 1024) -> None:
        check_number("max_samples", max_samples, at_least=1)
        check_number("chunk_size", chunk_size, at_least=1)
        self.data = data
        self.max_samples = max_samples
        self.chunk_size = chunk_size

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with captions and a training split."""
        return [name for name in context.pair_sets if context.sets[name].train is not None]

    def __call__(self, name: str, context: Context) -> dict[str, Score]:
        """Return the metrics below; lower is better for `memorised_gap` and `memorised_caption_rate`.

        - `memorised_train_recall@1`: fraction of the training images whose caption is the nearest of the n training ones.
        - `memorised_val_recall@1`: the same of held-out images and captions.
        - `memorised_gap`: their difference. A model without any recall has none: read it beside the two.
        - `memorised_caption_rate`: fraction of the held-out images to which one of the n training captions is at least as
          near as their own.
        """
        val = context.embedded(name)
        train = context.embedded_train_pairs(name, min(self.max_samples, len(val.images)))
        of_train, of_val = _distinct_pairs(train), _distinct_pairs(val)
        count = min(len(of_train), len(of_val), self.max_samples)
        of_train, of_val = ([pairs[i] for i in evenly_spread(count, len(pairs))] for pairs in (of_train, of_val))
        (train_images, train_texts, train_labels), (val_images, val_texts, val_labels) = (
            (embedded.images[images], embedded.texts[[text for _, text in pairs]], embedded.labels[images])
            for embedded, pairs in ((train, of_train), (val, of_val))
            for images in ([image for image, _ in pairs],)
        )
        everyone = torch.arange(count)
        trained = {train.captions[text]: i for i, (_, text) in enumerate(of_train)}
        same = torch.tensor([trained.get(val.captions[text], -1) for _, text in of_val], dtype=torch.int64)
        train_hits = ~self._is_outdone(train_images, train_texts, train_texts, everyone)
        val_hits = ~self._is_outdone(val_images, val_texts, val_texts, everyone)
        return {
            "memorised_train_recall@1": mean_score(train_hits, train_labels),
            "memorised_val_recall@1": mean_score(val_hits, val_labels),
            "memorised_gap": mean_score(train_hits.double() - val_hits.double()),
            "memorised_caption_rate": mean_score(
                self._is_outdone(val_images, val_texts, train_texts, same), val_labels
            ),
        }

    def _is_outdone(self, images: Tensor, own: Tensor, others: Tensor, same: Tensor) -> Tensor:
        """Return whether another text is at least as similar to each image as its own one, bool [n]. A collective.

        Args:
            images: embeddings of the images [n, e].
            own: embedding of each image's text [n, e].
            others: embeddings of the other texts [m, e].
            same: index in `others` of each image's own text, which is left out, int64 [n]; -1 if it is not there.
        """
        same = same.to(images.device)
        starts = range(0, len(images), self.chunk_size)  # a chunk has the same images on any number of ranks
        found = [torch.zeros(0, dtype=torch.bool, device=images.device)]
        for start in starts[distributed.share(len(starts))]:
            chunk = slice(start, start + self.chunk_size)
            # All similarities come from one product: equal embeddings must have equal ones.
            similarities = images[chunk] @ torch.cat([others, own[chunk]]).T
            of_others, of_own = similarities[:, : len(others)], similarities[:, len(others) :].diagonal()
            is_near = ~(of_others < of_own[:, None])  # NaN also counts against the model
            is_near &= torch.arange(len(others), device=images.device) != same[chunk, None]
            found.append(is_near.any(1))
        return distributed.gather_ragged_rows(torch.cat(found))


def _distinct_pairs(embedded: Embedded) -> list[tuple[int, int]]:
    """Return (image, first caption) of the images whose first caption no earlier image has."""
    images = {text: image for image, text in reversed(list(enumerate(embedded.first_texts))) if text >= 0}
    return sorted((image, text) for text, image in images.items())
