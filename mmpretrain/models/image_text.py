"""The model that is pre-trained: an image encoder, a text encoder, and a space that they share."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.batch import Packing
from mmpretrain.errors import check_number
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.masking import PatchMask

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder(Protocol):
    """What an image encoder has; the shape of its grid is a plain ViT's alone."""

    image_size: int
    width: int
    is_vit: bool
    has_batch_norm: bool
    projects: bool
    num_prefix_tokens: int
    num_patches: int
    grid_size: tuple[int, int]
    patch_size: tuple[int, int]

    def __call__(self, images: Tensor, mask: PatchMask | None = None) -> Encoding: ...

    def project(self, pooled: Tensor) -> Tensor:
        """[b, width] -> [b, e]; only where `projects` says that the encoder brings its projection along."""
        ...


class TextEncoder(Protocol):
    """What a text encoder has."""

    vocab_size: int
    context_length: int
    width: int
    causal: bool
    projects: bool
    pad_id: int | None
    """The padding that it looks at; None where padding cannot matter."""
    token_embeddings: Tensor
    """[vocabulary, d], the matrix that tokens are looked up in."""
    adopts_padding: bool
    """Whether `pad_id` is the tokenizer's to say, since nothing in the encoder is made for one id."""
    end_id: int | None
    """The token whose state it pools, by its id; None where the last token is pooled, whatever it is."""

    def __call__(self, ids: Tensor, lengths: Tensor, packing: Packing | None = None) -> Encoding: ...

    def project(self, pooled: Tensor) -> Tensor:
        """[b, width] -> [b, e]; only where `projects` says that the encoder brings its projection along."""
        ...


class NoImages(nn.Module):
    """Stands for the image encoder of a model of texts alone."""

    image_size = 1  # which no image will have
    width = 0
    is_vit = has_batch_norm = False
    projects = True
    num_prefix_tokens = num_patches = 0
    grid_size = patch_size = (0, 0)

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Encoding:
        """Raises: ValueError."""
        raise ValueError("the model has no image encoder (model.image is null); an objective or evaluator asks for one")

    def project(self, pooled: Tensor) -> Tensor:
        """Never called: nothing is encoded."""
        raise AssertionError


class ImageTextModel(nn.Module):
    """Two towers and their projections into a space of `embed_dim` dimensions (CLIP, Radford et al. 2021).

    Args:
        image: an `ImageEncoder`; None for an experiment on texts alone.
        text: a `TextEncoder`; None for an experiment on images alone.
        embed_dim: e, the width of the shared space; encoders that bring projections along have it already.
        image_mean, image_std: what pixels in [0, 1] are normalised with, per channel: 3 of them, or 1 (grey images) or 4
            (with transparency), as many as the image encoder takes.
        squash: whether evaluation resizes the whole image to a square; else it takes the largest centred square.
    """

    def __init__(
        self,
        image: Any,
        text: Any,
        embed_dim: int = 512,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        squash: bool = False,
    ) -> None:
        super().__init__()
        check_number("model.embed_dim", embed_dim, at_least=1)
        image = NoImages() if image is None else image
        self.image: ImageEncoder = image
        self.text: TextEncoder | None = text
        self.embed_dim = embed_dim
        self.squash = squash
        self.image_projection = None if image.projects else _projection(image.width, embed_dim)
        self.text_projection = None if text is None or text.projects else _projection(text.width, embed_dim)
        # On the device once: made in every forward pass, they would be copied there and the host would wait.
        if len(image_mean) != len(image_std):
            raise ValueError(
                f"model.image_mean has {len(image_mean)} values and model.image_std {len(image_std)}; "
                "expected one for each channel in both"
            )
        self.num_channels = len(image_mean)
        convolutions = [module for module in image.modules() if isinstance(module, nn.Conv2d)]
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
        """Where the parameters are."""
        return self.pixel_mean.device

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, h, w] -> the parameters' dtype, zero mean and unit deviation over the training pixels."""
        return (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std

    def denormalize(self, pixels: Tensor) -> Tensor:
        """What `normalize` made [b, 3, h, w] -> uint8 images."""
        return (pixels * self.pixel_std + self.pixel_mean).round().clamp(0, 255).to(torch.uint8)

    def encode_image(self, images: Tensor, mask: PatchMask | None = None) -> Encoding:
        """uint8 [b, 3, h, w] -> tokens and the pooled state of the image encoder."""
        return self.image(self.normalize(images), mask)

    def encode_text(self, ids: Tensor, lengths: Tensor, packing: Packing | None = None) -> Encoding:
        """Token ids int64 [b, L] of texts of `lengths` [b] -> tokens and the pooled state of the text encoder.

        Raises: ValueError if the model has no text encoder.
        """
        if self.text is None:
            raise ValueError(
                "the model has no text encoder (model.text is null); an objective or evaluator asks for one"
            )
        return self.text(ids, lengths, packing)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """uint8 [b, c, h, w] -> [b, e] of unit length, without gradients."""
        return self.project_image(self.encode_image(images.to(self.device)).pooled)

    @torch.no_grad()
    def embed_texts(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Token ids int64 [b, L] and lengths int64 [b] -> [b, e] of unit length, without gradients."""
        pooled = self.encode_text(ids.to(self.device), lengths.to(self.device)).pooled
        return self.project_text(pooled)

    def project_image(self, pooled: Tensor) -> Tensor:
        """[b, d] -> [b, e] of unit length, float32 or wider: bf16 would round similarities to 1/256."""
        projection = self.image.project if self.image_projection is None else self.image_projection
        return _unit(projection(pooled))

    def project_text(self, pooled: Tensor) -> Tensor:
        """[b, d] -> [b, e] of unit length, float32 or wider."""
        assert self.text is not None
        projection = self.text.project if self.text_projection is None else self.text_projection
        return _unit(projection(pooled))


def _projection(width: int, embed_dim: int) -> nn.Linear:
    """CLIP's projection at its start."""
    linear = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(linear.weight, std=width**-0.5)
    return linear


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
