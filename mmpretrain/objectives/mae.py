"""Masked autoencoding of images: MAE (He et al. 2022)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmpretrain.batch import Batch
from mmpretrain.errors import check_number
from mmpretrain.models.attention import choose_kernel
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.masking import MaskSpec, PatchMask, num_hidden, num_kept
from mmpretrain.models.patches import masked_reconstruction, patch_statistics, patchify, unpatchify
from mmpretrain.models.vit import sincos_positions
from mmpretrain.objectives.base import Decode, Encodings, Example
from mmpretrain.schedules import Scheduled, ScheduledValue, TrainingProgress


class MAE(nn.Module):
    """Masked autoencoding: reconstruct the pixels of hidden patches from the encoding of the visible ones.

    Args:
        model: its image encoder must be a plain ViT.
        mask_ratio: fraction of the patches that is hidden, or a schedule of it, or [smallest, largest], between which each
            sample draws its own.
        decoder_width, decoder_depth, decoder_heads: shape of the decoder.
        norm_pix: normalise each target patch by its own mean and deviation.
        stream: data stream of the images.

    Raises: ValueError if the image encoder is not a plain ViT, the ratio is not inside (0, 1) or hides no patch, or
        `decoder_width` is not a multiple of 4 and of `decoder_heads`.
    """

    def __init__(
        self,
        model: ImageTextModel,
        mask_ratio: Scheduled | Sequence[float] = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pix: bool = True,
        stream: str = "pairs",
        config_path: str = "objective.mae",
    ) -> None:
        super().__init__()
        encoder = model.image_encoder
        if not encoder.is_vit:
            raise ValueError(
                f"{config_path} needs a plain ViT of timm (vit_*) as model.image; this one cannot drop patches"
            )
        ends = mask_ratio if isinstance(mask_ratio, Sequence) else (mask_ratio, mask_ratio)
        if len(ends) != 2:
            raise ValueError(
                f"{config_path}.mask_ratio is {mask_ratio}; expected a number, a schedule, or [smallest, largest]"
            )
        self._least, self._most = (ScheduledValue(end, f"{config_path}.mask_ratio", above=0, below=1) for end in ends)
        if min(self._least.values) > min(self._most.values):
            raise ValueError(f"{config_path}.mask_ratio is {mask_ratio}; expected [smallest, largest]")
        if num_kept(encoder.num_patches, min(self._least.values)) == encoder.num_patches:
            raise ValueError(
                f"{config_path}.mask_ratio is {mask_ratio}, which hides none of {encoder.num_patches} patches; "
                f"expected at least {1 / encoder.num_patches:.3g}"
            )
        check_number(f"{config_path}.decoder_width", decoder_width, at_least=1)
        check_number(f"{config_path}.decoder_heads", decoder_heads, at_least=1)
        check_number(f"{config_path}.decoder_depth", decoder_depth, at_least=0)
        if decoder_width % decoder_heads or decoder_width % 4:
            raise ValueError(
                f"{config_path}.decoder_width is {decoder_width}; "
                f"expected a multiple of 4 and of decoder_heads = {decoder_heads}"
            )
        self.streams = (stream,)
        self.norm_pix = norm_pix
        self.num_prefix_tokens = encoder.num_prefix_tokens
        self.patch_size = encoder.patch_size
        self.decoder_embed = nn.Linear(encoder.width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, qkv_bias=True, norm_layer=norm_layer) for _ in range(decoder_depth)
        )
        self.norm = norm_layer(decoder_width)
        self.predict = nn.Linear(decoder_width, self.patch_size[0] * self.patch_size[1] * model.num_channels)
        self.grid_size = encoder.grid_size
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(self.grid_size, decoder_width), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def count(self, batch: Batch) -> Tensor:
        """Return the number of hidden patches of a micro-batch."""
        (stream,) = self.streams
        num_patches = math.prod(batch.grid_size(stream, self.patch_size))
        return num_hidden(batch.streams[stream].seeds, num_patches, self.mask(batch.progress))

    def mask(self, progress: TrainingProgress) -> MaskSpec:
        """Return the parameters of the patch mask at `progress`."""
        return MaskSpec("mae", (self._least(progress), self._most(progress)))

    def _positions(self, grid_size: tuple[int, int]) -> Tensor:
        """Return the decoder's positions for a grid, [1, N, width].

        Positions of another grid size cover the same image area, like the interpolated positions of the encoder.
        """
        if grid_size == self.grid_size:
            return self.positions
        steps = [own / other for own, other in zip(self.grid_size, grid_size, strict=True)]
        return sincos_positions(grid_size, self.positions.shape[-1], (steps[0], steps[1])).to(self.positions)

    def reconstruct(self, encodings: Encodings) -> tuple[Tensor, PatchMask]:
        """Predict the pixels of all patches, including the visible ones.

        Returns: (prediction [b, N, p_h p_w c], mask).
        """
        (stream,) = self.streams
        spec = self.mask(encodings.batch.progress)
        mask = encodings.patch_mask(stream, spec)
        tokens = self.decoder_embed(encodings.image(stream, spec).tokens)
        prefix, kept = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        width = kept.shape[-1]
        # Scatter kept tokens to their positions. Hidden positions, including those of filler, get the mask token below.
        places = mask.keep[..., None].expand(-1, -1, width)
        patches = kept.new_zeros(*mask.hidden.shape, width).scatter(1, places, kept)
        positions = self._positions(encodings.batch.grid_size(stream, self.patch_size))
        patches = torch.where(mask.hidden[..., None], self.mask_token.to(patches.dtype), patches) + positions
        x = torch.cat([prefix.to(patches.dtype), patches], dim=1)
        choose_kernel(self.blocks, x.device)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x))[:, self.num_prefix_tokens :], mask

    def examples(self, encodings: Encodings, decode: Decode) -> list[Example]:
        """Return for each sample the image, its visible patches, and these with predictions for the hidden patches."""
        (stream,) = self.streams
        prediction, mask = self.reconstruct(encodings)
        patches = patchify(encodings.pixels(stream), self.patch_size)
        prediction = prediction.to(patches.dtype)
        if self.norm_pix:  # predictions are normalised patches
            mean, deviation = patch_statistics(patches)
            prediction = prediction * deviation + mean
        grid_size = encodings.batch.grid_size(stream, self.patch_size)
        hidden = mask.hidden[..., None]
        pages = [patches, torch.where(hidden, 0.0, patches), torch.where(hidden, prediction, patches)]
        columns = [encodings.to_images(unpatchify(page, grid_size, self.patch_size)).cpu() for page in pages]
        return [Example(images, "") for images in zip(*columns, strict=True)]

    def loss(self, encodings: Encodings) -> Tensor:
        """Return the sum of `patches.masked_reconstruction` over hidden patches."""
        prediction, mask = self.reconstruct(encodings)
        # The error is computed in float32 or wider: bf16 would round small errors away.
        target = patchify(encodings.pixels(self.streams[0]), self.patch_size)
        return masked_reconstruction(prediction.to(target.dtype), target, mask.hidden, self.norm_pix)
