"""Pictures of retrieval: queries with their top answers."""

from collections.abc import Sequence

import torch

from mmpretrain import distributed
from mmpretrain.evals.base import Context, evenly_spread
from mmpretrain.reporting import pictures


class Gallery:
    """Draw some queries with their top answers, for text-to-image and image-to-text retrieval.

    Args:
        data: names of `data.val` to use; None uses each data set with captions.
        num_queries: number of queries, spread evenly over the data set and the same in every evaluation.
        num_answers: number of answers per query.
    """

    needs = "caption"

    def __init__(self, data: Sequence[str] | None = None, num_queries: int = 8, num_answers: int = 5) -> None:
        self.data = data
        self.num_queries = num_queries
        self.num_answers = num_answers

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with captions."""
        return context.pair_sets

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        """Show the pictures `text_to_image` and `image_to_text`. There are no scores."""
        embedded = context.embedded(name)
        if not distributed.is_main():
            return {}
        belongs = {tuple(pair) for pair in embedded.pairs.tolist()}
        count = min(self.num_queries, len(embedded.images), len(embedded.texts))
        by_text, by_image = [], []
        for text in evenly_spread(count, len(embedded.texts)):
            found = self._best(embedded.texts[text] @ embedded.images.T)
            images = [context.image(name, image) for image in found]
            right = [(image, text) in belongs for image in found]
            by_text.append(pictures.Answers(embedded.captions[text], None, images, (), right))
        for image in evenly_spread(count, len(embedded.images)):
            found = self._best(embedded.images[image] @ embedded.texts.T)
            texts = [embedded.captions[text] for text in found]
            right = [(image, text) in belongs for text in found]
            by_image.append(pictures.Answers("", context.image(name, image), (), texts, right))
        context.show(name, "text_to_image", pictures.gallery(by_text))
        context.show(name, "image_to_text", pictures.gallery(by_image))
        return {}

    def _best(self, similarities: torch.Tensor) -> list[int]:
        return similarities.topk(min(self.num_answers, len(similarities))).indices.tolist()
