"""Search of a set of images by a text or by an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmpretrain.data.decode import BadSample, decode_whole, to_rgb
from mmpretrain.data.tar_index import IMAGE_EXTENSIONS
from mmpretrain.evals.base import Context


@dataclass(frozen=True)
class Found:
    """One image that was found."""

    key: str
    """Key of its sample."""
    similarity: float
    """Cosine of the angle between its embedding and the query's."""
    image: np.ndarray
    """The image at its aspect ratio, uint8 [h, w, 3]."""


class ImageSearch:
    """The images of a data set, ordered by the similarity of their embeddings to a query's.

    Args:
        context: the model and its data sets.
        name: name of the data set to search.
        side: longer side of the images that are returned, at most, in pixels.
    """

    def __init__(self, context: Context, name: str, side: int = 384) -> None:
        self._context, self._data, self._side = context, context.sets[name], side
        self._embedded = context.embedded(name)

    @property
    def num_images(self) -> int:
        """Number of images that can be found."""
        return len(self._embedded.images)

    def by_text(self, text: str, count: int) -> list[Found]:
        """Return the `count` images most similar to a text, best first. Raises: ValueError if the text is blank."""
        if not text.strip():
            raise ValueError("the text is empty; describe the images to look for")
        with torch.no_grad():
            return self._nearest(self._context.embedded_texts([text.strip()])[0], count)

    def by_image(self, image: Tensor, count: int) -> list[Found]:
        """Return the `count` images most similar to an image, uint8 [c, h, w] as preprocessed, best first."""
        with self._context.autocast:
            query = self._context.model.embed_images(image[None])[0]
        return self._nearest(query.float(), count)

    def _nearest(self, query: Tensor, count: int) -> list[Found]:
        similarities = self._embedded.images @ query
        best = similarities.topk(min(count, len(similarities)))
        samples: Sequence[int] = self._embedded.samples[best.indices.cpu()].tolist()
        return [
            Found(self._data.shards.key(sample), similarity, self._image(sample))
            for sample, similarity in zip(samples, best.values.tolist(), strict=True)
        ]

    def _image(self, sample: int) -> np.ndarray:
        preprocess = self._data.preprocess
        assert preprocess is not None
        try:
            data = self._data.shards.read(sample, IMAGE_EXTENSIONS)
            image = to_rgb(decode_whole(data, max_bytes=preprocess.max_image_bytes))
        except (BadSample, OSError) as error:
            key = self._data.shards.key(sample)
            raise ValueError(f"{key} cannot be shown ({error}); it has changed: start the command again") from error
        image.thumbnail((self._side, self._side), Image.Resampling.BICUBIC)
        return np.asarray(image)
