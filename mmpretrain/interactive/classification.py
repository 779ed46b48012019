"""Zero-shot classification of single images by classes that are typed in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpretrain.data.classes import classes_named
from mmpretrain.evals.base import Context
from mmpretrain.evals.zero_shot import class_embeddings

_MAX_TEXTS = 20_000


def class_names(text: str) -> list[str]:
    """Return the distinct names in a text with a class a line. Raises: ValueError if there are fewer than two."""
    names = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(names) < 2:
        raise ValueError(f"the number of classes is {len(names)}; expected two or more, a class a line")
    return names


class Classifier:
    """Zero-shot classification; the embeddings of the last classes are kept for the next image.

    Args:
        context: the model. Without `logit_scale` the scores are cosines.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._last: tuple[object, Tensor] | None = None

    @property
    def has_probabilities(self) -> bool:
        """True if the scores are probabilities, False if they are cosines."""
        return self._context.logit_scale is not None

    @torch.no_grad()
    def __call__(self, image: Tensor, names: Sequence[str], templates: str | Sequence[str]) -> list[tuple[str, float]]:
        """Score each class for an image.

        Args:
            image: the image as preprocessed, uint8 [c, h, w].
            names: names of the classes.
            templates: templates of the classes' texts, as in `evals.zero_shot.read_classes`.

        Returns: (name, score), highest first: softmax(logit_scale x cosine), or the cosine if there is no logit_scale.
        Raises: ValueError for unknown templates, and for more than 20,000 texts.
        """
        classes = classes_named(names, templates)
        if (count := sum(map(len, classes.texts))) > _MAX_TEXTS:
            raise ValueError(
                f"{len(names)} classes make {count} texts; expected at most {_MAX_TEXTS}: use fewer templates"
            )
        if self._last is None or self._last[0] != classes.texts:
            self._last = classes.texts, class_embeddings(classes, self._context)
        with self._context.autocast:
            embedded = self._context.model.embed_images(image[None])[0]
        scores = self._last[1] @ embedded.float()
        if self._context.logit_scale is not None:
            scores = (self._context.logit_scale * scores).softmax(dim=0)
        return sorted(zip(names, scores.tolist(), strict=True), key=lambda each: -each[1])
