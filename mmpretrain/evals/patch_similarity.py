"""Localisation of a caption in its image by the similarity of each patch token to the text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.evals.base import Context, evenly_spread
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.reporting import pictures


def embeds_patches(model: ImageTextModel) -> bool:
    """Return True if the image encoder is a ViT that pools one of its tokens, so that patch tokens can be projected."""
    image = model.image
    return image is not None and image.is_vit and image.num_prefix_tokens > 0 and getattr(image, "pools_token", True)


def patch_embeddings(model: ImageTextModel, images: Tensor) -> Tensor:
    """Project the patch tokens of uint8 images [b, c, h, w] like the class token.

    Returns: float32 [b, rows, columns, e] of unit length.
    """
    encoder = model.image_encoder
    tokens = model.encode_image(images.to(model.device)).tokens[:, encoder.num_prefix_tokens :]
    return model.project_image(tokens).float().unflatten(1, encoder.grid_size)


class PatchSimilarity:
    """Draw heat maps of <patch, text>. Patch tokens of the last layer go through the image projection like the class token.

    Args:
        data: names of `data.val` to use; None uses each data set with captions.
        num_images: number of images, spread evenly over the data set and the same in every evaluation.
    """

    needs = "caption, and a model that embeds patches"

    def __init__(self, data: Sequence[str] | None = None, num_images: int = 6) -> None:
        self.data = data
        self.num_images = num_images

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with captions; none if the image encoder is not a ViT that pools one of its tokens."""
        return context.pair_sets if embeds_patches(context.model) else []

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        """Show the picture `patch_similarity`. There are no scores."""
        embedded = context.embedded(name)
        if not distributed.is_main():
            return {}
        rows = evenly_spread(self.num_images, len(embedded.images))
        texts = [embedded.first_texts[row] for row in rows]
        images = torch.stack([context.image(name, row) for row in rows])
        with context.autocast:
            patches = patch_embeddings(context.model, images)
        maps = [(grid @ embedded.texts[text]).cpu().numpy() for grid, text in zip(patches, texts, strict=True)]
        captions = [embedded.captions[text] for text in texts]
        context.show(name, "patch_similarity", pictures.heat_maps(list(images), maps, captions))
        return {}
