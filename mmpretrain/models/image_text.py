"""The pre-trained model: an image encoder, a text encoder, and a shared embedding space."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.batch import Packing
from mmpretrain.errors import check_number
from mmpretrain.models.encoders import ImageEncoder, TextEncoder, complete_image_encoder, complete_text_encoder
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.masking import PatchMask

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageTextModel(nn.Module):
    """Image and text towers with projections into a shared space of `embed_dim` dimensions (CLIP, Radford et al. 2021).

    Args:
        image: an `ImageEncoder`; None for a text-only model.
        text: a `TextEncoder`; None for an image-only model.
        embed_dim: e, the width of the shared space. For encoders with a projection of their own it must be that
            projection's output width.
        image_mean, image_std: mean and standard deviation per channel that normalise pixels in [0, 1]. Their number is that
            of the image encoder's input channels: 3 (colour), 1 (grey) or 4 (colour and alpha).
        squash: if True, evaluation resizes both sides of an image to the same length; if False, it keeps the aspect ratio.
        interpolation: interpolation of evaluation's resize, `bicubic` or `bilinear`.
        crop_pct: evaluation resizes the shorter side to image_size / crop_pct, rounded down, and crops the centre.

    Attributes that an encoder leaves out get their defaults (see `models.encoders`).

    Raises: ValueError if `image_mean` and `image_std` differ in length, or in number from the encoder's input channels, or
        an encoder lacks an attribute.
    """

    def __init__(
        self,
        image: Any,
        text: Any,
        embed_dim: int = 512,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        squash: bool = False,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        crop_pct: float = 1.0,
    ) -> None:
        super().__init__()
        check_number("model.embed_dim", embed_dim, at_least=1)
        check_number("model.crop_pct", crop_pct, above=0, at_most=1)
        if image is not None:
            complete_image_encoder(image)
        if text is not None:
            complete_text_encoder(text)
        self.image: ImageEncoder | None = image
        self.text: TextEncoder | None = text
        self.embed_dim = embed_dim
        self.squash = squash
        self.interpolation: Literal["bicubic", "bilinear"] = interpolation
        self.crop_pct = crop_pct
        self.image_projection = None if image is None or image.projects else _projection(image.width, embed_dim)
        self.text_projection = None if text is None or text.projects else _projection(text.width, embed_dim)
        # As buffers they are copied to the device once. Created in the forward pass, each copy would stall the host.
        if len(image_mean) != len(image_std):
            raise ValueError(
                f"model.image_mean has {len(image_mean)} values and model.image_std {len(image_std)}; "
                "expected one for each channel in both"
            )
        self.num_channels = len(image_mean)
        modules = () if image is None else image.modules()
        convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
        if convolutions and convolutions[0].in_channels != self.num_channels:
            raise ValueError(
                f"model.image takes {convolutions[0].in_channels} channels, and model.image_mean has {self.num_channels} "
                "values; expected as many: model.image.args={in_chans: N} with N values in image_mean and image_std"
            )
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(image_mean)[:, None, None] * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(image_std)[:, None, None] * 255, persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.pixel_mean.device

    @property
    def image_encoder(self) -> ImageEncoder:
        """The image encoder. Raises: ValueError if the model has none."""
        if self.image is None:
            raise ValueError(_missing("image"))
        return self.image

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder. Raises: ValueError if the model has none."""
        if self.text is None:
            raise ValueError(_missing("text"))
        return self.text

    @property
    def has_batch_norm(self) -> bool:
        """True if the image encoder has BatchNorm, whose mathematics depends on the micro-batch."""
        return self.image is not None and self.image.has_batch_norm

    @property
    def image_embed_dim(self) -> int:
        """Width of `embed_images`; 0 if the model has no image encoder."""
        return self._embed_dim(self.image, self.image_projection)

    @property
    def text_embed_dim(self) -> int:
        """Width of `embed_texts`; 0 if the model has no text encoder."""
        return self._embed_dim(self.text, self.text_projection)

    def _embed_dim(self, encoder: ImageEncoder | TextEncoder | None, projection: nn.Linear | None) -> int:
        if encoder is None:
            return 0
        return self.embed_dim if self._is_projected(projection) else encoder.width

    def _is_projected(self, projection: nn.Linear | None) -> bool:
        """Return False for the projection of a single encoder: no objective trains it. None is the encoder's own."""
        return projection is None or (self.image is not None and self.text is not None)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise uint8 images [b, c, h, w] with `image_mean` and `image_std`, in the parameters' dtype."""
        return (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std

    def denormalize(self, pixels: Tensor) -> Tensor:
        """Invert `normalize`: pixels [b, c, h, w] -> uint8 images of the same shape."""
        return (pixels * self.pixel_std + self.pixel_mean).round().clamp(0, 255).to(torch.uint8)

    def encode_image(self, images: Tensor, mask: PatchMask | None = None) -> Encoding:
        """Encode uint8 images [b, c, h, w] into tokens and pooled states.

        Raises: ValueError if the model has no image encoder.
        """
        return self.image_encoder(self.normalize(images), mask)

    def encode_text(self, ids: Tensor, lengths: Tensor, packing: Packing | None = None) -> Encoding:
        """Encode token ids int64 [b, L] of texts with `lengths` int64 [b] into tokens and pooled states.

        Raises: ValueError if the model has no text encoder.
        """
        return self.text_encoder(ids, lengths, packing)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Embed uint8 images [b, c, h, w] as unit vectors [b, e], without gradients.

        A model without text encoder has no shared space: its embeddings are the pooled states [b, width] at unit length,
        unless the encoder has a projection of its own.
        """
        return self.embed_pooled_images(self.encode_image(images.to(self.device)).pooled)

    @torch.no_grad()
    def embed_pooled_images(self, pooled: Tensor) -> Tensor:
        """Return the embeddings [b, e] of images with pooled states [b, width], as `embed_images` does."""
        return self.project_image(pooled) if self._is_projected(self.image_projection) else _unit(pooled)

    @torch.no_grad()
    def embed_texts(self, ids: Tensor, lengths: Tensor, packing: Packing | None = None) -> Tensor:
        """Embed token ids int64 [b, L] of texts with `lengths` int64 [b] as unit vectors [b, e], without gradients.

        Without image encoder they are the pooled states, as in `embed_images`.
        """
        return self.embed_pooled_texts(self.pool_texts(ids, lengths, packing))

    @torch.no_grad()
    def pool_texts(self, ids: Tensor, lengths: Tensor, packing: Packing | None = None) -> Tensor:
        """Return the pooled states [b, width] of texts, before the projection, without gradients."""
        packing = None if packing is None else packing.map(lambda tensor: tensor.to(self.device))
        return self.encode_text(ids.to(self.device), lengths.to(self.device), packing).pooled

    @torch.no_grad()
    def embed_pooled_texts(self, pooled: Tensor) -> Tensor:
        """Return the embeddings [b, e] of texts with pooled states [b, width], as `embed_texts` does."""
        return self.project_text(pooled) if self._is_projected(self.text_projection) else _unit(pooled)

    def project_image(self, pooled: Tensor) -> Tensor:
        """Project pooled image states [b, d] to unit vectors [b, e], float32 or wider.

        In bf16 similarities would be rounded to 1/256.
        """
        projection = self.image_encoder.project if self.image_projection is None else self.image_projection
        return _unit(projection(pooled))

    def project_text(self, pooled: Tensor) -> Tensor:
        """Project pooled text states [b, d] to unit vectors [b, e], float32 or wider."""
        projection = self.text_encoder.project if self.text_projection is None else self.text_projection
        return _unit(projection(pooled))


def _missing(tower: str) -> str:
    return f"the model has no {tower} encoder (model.{tower} is null); an objective or evaluator asks for one"


def _projection(width: int, embed_dim: int) -> nn.Linear:
    """Return a linear projection without bias, with CLIP's initialisation."""
    linear = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
