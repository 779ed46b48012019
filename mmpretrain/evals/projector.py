"""Image embeddings for TensorBoard's embedding projector."""

from collections.abc import Sequence

import torch

from mmpretrain import distributed
from mmpretrain.evals.base import Context


class Projector:
    """Log embeddings of some images, each with a thumbnail and its caption or label.

    Args:
        data: names of `data.val` to use; None uses all.
        num_images: number of images, spread evenly over the data set.
    """

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
        count = min(self.num_images, len(embedded.images))
        rows = torch.linspace(0, len(embedded.images) - 1, count).round().long().tolist()
        first_text = dict(reversed(embedded.pairs.tolist()))
        classes = context.sets[name].classes
        labels = []
        for row in rows:
            label = int(embedded.labels[row])
            if row in first_text:
                labels.append(" ".join(embedded.captions[first_text[row]].split()))
            else:
                labels.append(classes.names[label] if classes is not None and label >= 0 else str(label))
        images = torch.stack([context.image(name, row) for row in rows])
        context.project(name, embedded.images[rows].cpu().numpy(), labels, images)
        return {}
