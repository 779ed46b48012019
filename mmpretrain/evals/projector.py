"""Image embeddings for TensorBoard's embedding projector."""

from collections.abc import Sequence

import torch

from mmpretrain import distributed
from mmpretrain.evals.base import Context, evenly_spread


class Projector:
    """Log embeddings of some images, each with a thumbnail and its caption or label.

    Args:
        data: names of `data.val` to use; None uses all.
        num_images: number of images, spread evenly over the data set.
    """

    needs = "images"
    towers = ("image",)

    def __init__(self, data: Sequence[str] | None = None, num_images: int = 500) -> None:
        self.data = data
        self.num_images = num_images

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return all data sets."""
        return list(context.sets)

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        """Add the embeddings to the projector. There are no scores."""
        embedded = context.embedded(name)
        if not distributed.is_main():
            return {}
        rows = evenly_spread(self.num_images, len(embedded.images))
        classes = context.sets[name].classes
        labels = []
        for row in rows:
            label, text = int(embedded.labels[row]), embedded.first_texts[row]
            if text >= 0:
                labels.append(" ".join(embedded.captions[text].split()))
            else:
                labels.append(classes.names[label] if classes is not None and label >= 0 else str(label))
        images = torch.stack([context.image(name, row) for row in rows])
        context.project(name, embedded.images[rows].cpu().numpy(), labels, images)
        return {}
