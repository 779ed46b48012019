"""The model that is pre-trained: an image encoder, a text encoder, and a space that they share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.masking import PatchMask
from mmpretrain.models.text import TextEncoding, TextTransformer
from mmpretrain.models.vit import ImageEncoding, TimmEncoder
from mmpretrain.usage import check_number

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageTextModel(nn.Module):
    """Two towers and their projections into a space of `embed_dim` dimensions (CLIP, Radford et al. 2021).

    Args:
        image: the image encoder.
        text: the text encoder; None for an experiment on images alone.
        embed_dim: e, the width of the shared space.
        image_mean, image_std: what pixels in [0, 1] are normalised with, per channel.
    """

    def __init__(
        self,
        image: TimmEncoder,
        text: TextTransformer | None,
        embed_dim: int = 512,
        image_mean: tuple[float, float, float] = CLIP_MEAN,
        image_std: tuple[float, float, float] = CLIP_STD,
    ) -> None:
        super().__init__()
        check_number("model.embed_dim", embed_dim, at_least=1)
        self.image = image
        self.text = text
        self.image_projection = nn.Linear(image.width, embed_dim, bias=False)
        nn.init.normal_(self.image_projection.weight, std=image.width**-0.5)
        if text is not None:
            self.text_projection = nn.Linear(text.width, embed_dim, bias=False)
            nn.init.normal_(self.text_projection.weight, std=text.width**-0.5)
        # On the device once: made in every forward pass, they would be copied there and the host would wait.
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(image_mean)[:, None, None] * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(image_std)[:, None, None] * 255, persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, h, w] -> the parameters' dtype, zero mean and unit deviation over the training pixels."""
        return (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std

    def encode_image(self, images: Tensor, mask: PatchMask | None = None) -> ImageEncoding:
        """uint8 [b, 3, h, w] -> tokens and the pooled state of the image encoder."""
        return self.image(self.normalize(images), mask)

    def encode_text(self, ids: Tensor, lengths: Tensor, cuts: Sequence[int]) -> TextEncoding:
        """Token ids int64 [b, L] -> tokens and the pooled state of the text encoder.

        Raises: ValueError if the model has no text encoder.
        """
        if self.text is None:
            raise ValueError(
                "the model has no text encoder (model.text is null); an objective or evaluator asks for one"
            )
        return self.text(ids, lengths, cuts)

    def project_image(self, pooled: Tensor) -> Tensor:
        """[b, d] -> [b, e] of unit length, float32 or wider: bf16 would round similarities to 1/256."""
        return _unit(self.image_projection(pooled))

    def project_text(self, pooled: Tensor) -> Tensor:
        """[b, d] -> [b, e] of unit length, float32 or wider."""
        return _unit(self.text_projection(pooled))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
