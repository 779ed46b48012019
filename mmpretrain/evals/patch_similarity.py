"""Localisation of a caption in its image by the similarity of each patch token to the text."""

from collections.abc import Sequence

import torch

from mmpretrain import distributed
from mmpretrain.evals.base import Context, evenly_spread
from mmpretrain.reporting import pictures


class PatchSimilarity:
    """Draw heat maps of <patch, text>. Patch tokens of the last layer go through the image projection like the class token.

    Args:
        data: names of `data.val` to use; None uses each data set with captions.
        num_images: number of images, spread evenly over the data set and the same in every evaluation.
    """

    def __init__(self, data: Sequence[str] | None = None, num_images: int = 6) -> None:
        self.data = data
        self.num_images = num_images

    def applicable_datasets(self, context: Context) -> list[str]:
        """Return the data sets with captions; none if the image encoder is not a ViT that pools one of its tokens."""
        image = context.model.image_encoder
        if not image.is_vit or image.num_prefix_tokens == 0 or not getattr(image, "pools_token", True):
            return []
        return context.pair_sets

    def __call__(self, name: str, context: Context) -> dict[str, float]:
        """Show the picture `patch_similarity`. There are no scores."""
        model, encoder, embedded = context.model, context.model.image_encoder, context.embedded(name)
        if not distributed.is_main():
            return {}
        rows = evenly_spread(self.num_images, len(embedded.images))
        texts = [embedded.first_texts[row] for row in rows]
        images = torch.stack([context.image(name, row) for row in rows])
        with context.autocast:
            tokens = model.encode_image(images.to(model.device)).tokens[:, encoder.num_prefix_tokens :]
            patches = model.project_image(tokens).float()
        maps = [
            (patch_rows @ embedded.texts[text]).reshape(encoder.grid_size).cpu().numpy()
            for patch_rows, text in zip(patches, texts, strict=True)
        ]
        captions = [embedded.captions[text] for text in texts]
        context.show(name, "patch_similarity", pictures.heat_maps(list(images), maps, captions))
        return {}
