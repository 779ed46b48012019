"""Image encoders: timm's models, giving tokens and a pooled embedding, on all patches or on the kept ones."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.layers import Format, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmpretrain.masking import PatchMask
from mmpretrain.models.attention import choose_kernel


@dataclass(frozen=True)
class ImageEncoding:
    """tokens [b, P + N, d], of which the first P are no patches (class and register tokens); pooled [b, width]."""

    tokens: Tensor
    pooled: Tensor


class TimmEncoder(nn.Module):
    """An image model of timm without its classifier.

    Args:
        name: timm's name of it.
        image_size: side of the images, in pixels.
        args: further arguments of timm's model (`embed_dim`, `depth`, `patch_size`, `global_pool`, ...).
        init: `timm` as the model comes; for a plain ViT also `clip`, open_clip's initialisation, or `mae`, that of MAE with
            its fixed positions.

    Raises: ValueError if timm does not know the name or an argument, or the model has no such initialisation.
    """

    trunk: Any  # timm's models share no type that knows their parts
    head: nn.Module | None  # a projection that the model brings along

    def __init__(
        self,
        name: str,
        image_size: int = 224,
        args: Mapping[str, Any] | None = None,
        init: Literal["timm", "clip", "mae"] = "timm",
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = ", ".join(difflib.get_close_matches(name, timm.list_models())) or "those of timm.list_models()"
            raise ValueError(f"model.image.name is {name!r}; expected a model of timm, such as {near}")
        try:
            self.trunk = self._create(name, image_size, args or {})
        except (TypeError, AssertionError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"timm refuses model.image.args {dict(args or {})} for {name!r}: {error}") from error
        self.head = None
        self._describe(image_size)
        if init != "timm":
            if not self.is_vit:
                raise ValueError(
                    f"model.image.init is {init!r} for {name!r}; expected a plain ViT (vit_*), or init=timm"
                )
            self._init_like_clip() if init == "clip" else self._init_like_mae()

    @classmethod
    def around(cls, trunk: nn.Module, image_size: int, head: nn.Module) -> "TimmEncoder":
        """The encoder of a model of timm that exists already, projected by its classifier, then by `head`."""
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder.trunk = trunk
        encoder.head = head
        encoder._describe(image_size)
        return encoder

    def _describe(self, image_size: int) -> None:
        self.image_size = image_size
        self.width: int = self.trunk.head_hidden_size
        # In a hybrid, whose patches go through convolutions, what a hidden patch shows would reach its neighbours.
        self.is_vit = isinstance(self.trunk, VisionTransformer) and isinstance(self.trunk.patch_embed, PatchEmbed)
        self.has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules())
        if self.is_vit:
            self.num_prefix_tokens: int = self.trunk.num_prefix_tokens
            self.grid_size: tuple[int, int] = self.trunk.patch_embed.grid_size
            self.patch_size: tuple[int, int] = self.trunk.patch_embed.patch_size
            # Images of another size than the table of positions was made for have it interpolated, by timm.
            self.trunk.dynamic_img_size = True
            self.trunk.patch_embed.strict_img_size = False
            self.trunk.patch_embed.flatten = False
            self.trunk.patch_embed.output_fmt = Format.NHWC
            if not self.num_patches:
                raise ValueError(
                    f"model.image.image_size is {image_size}; expected at least a patch of {self.patch_size[0]} pixels"
                )

    def _init_like_clip(self) -> None:
        """open_clip's image tower at its start: class token and positions of deviation width^-1/2, so that they count
        beside normalised patches at any width, Xavier attention, and PyTorch's own initialisation elsewhere."""
        for module in self.trunk.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
                module.reset_parameters()
        for block in self.trunk.blocks:
            nn.init.xavier_uniform_(block.attn.qkv.weight)
            for linear in (block.attn.qkv, block.attn.proj):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        for token in (self.trunk.cls_token, self.trunk.reg_token, self.trunk.pos_embed):
            if token is not None:
                nn.init.normal_(token, std=self.trunk.embed_dim**-0.5)

    def _init_like_mae(self) -> None:
        """MAE's encoder at its start (He et al. 2022, models_mae.py): Xavier weights, sine-cosine positions that stay."""
        for module in self.trunk.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.trunk.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(len(projection), -1))
        for token in (self.trunk.cls_token, self.trunk.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        positions = self.trunk.pos_embed
        with torch.no_grad():
            positions.zero_()
            positions[:, -self.num_patches :] = sincos_positions(self.grid_size, self.trunk.embed_dim)
        positions.requires_grad_(False)

    @staticmethod
    def _create(name: str, image_size: int, args: Mapping[str, Any]) -> nn.Module:
        """timm's model, built for one image size; convolutional ones know no such argument and take any."""
        try:
            return timm.create_model(name, num_classes=0, img_size=image_size, **args)
        except TypeError as error:
            if "unexpected keyword argument 'img_size'" not in str(error):
                raise
            return timm.create_model(name, num_classes=0, **args)

    @property
    def projects(self) -> bool:
        """Whether `project` leads to the shared space, so that the joint model needs no projection of its own."""
        return self.head is not None

    def project(self, pooled: Tensor) -> Tensor:
        """[b, width] -> [b, e], where the model brings a projection along."""
        assert self.head is not None
        return self.head(self.trunk.get_classifier()(pooled))

    @property
    def num_patches(self) -> int:
        """N, the number of patches of an image."""
        return self.grid_size[0] * self.grid_size[1]

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> ImageEncoding:
        """Encode images [b, 3, h, w]; with a mask only the kept patches are computed, filler is never attended to.

        Raises: ValueError if a mask is given and the model is no plain ViT.
        """
        if mask is not None and not self.is_vit:
            raise ValueError(f"{type(self.trunk).__name__} cannot drop patches; expected a plain ViT of timm (vit_*)")
        is_ragged = mask is not None and mask.num_keep is not None
        choose_kernel(getattr(self.trunk, "blocks", ()), images.device, is_masked=is_ragged)
        if mask is None:
            tokens = self.trunk.forward_features(images)
        else:
            tokens = self._encode_kept(images, mask)
        if not self.is_vit:
            pooled = self.trunk.forward_head(tokens, pre_logits=True)
            if tokens.ndim == 4 and getattr(self.trunk, "output_fmt", "NCHW") == "NHWC":
                tokens = tokens.flatten(1, 2)
            elif tokens.ndim == 4:
                tokens = tokens.flatten(2).transpose(1, 2)
            return ImageEncoding(tokens, pooled)
        if mask is None or mask.num_keep is None or self.trunk.global_pool == "token":
            return ImageEncoding(tokens, self.trunk.forward_head(tokens, pre_logits=True))
        if self.trunk.global_pool != "avg":
            raise ValueError(
                f"global_pool={self.trunk.global_pool!r} cannot pool a varying number of patches; "
                "use a constant mask_ratio, or global_pool token or avg"
            )
        patches = tokens[:, self.num_prefix_tokens :]
        is_kept = torch.arange(patches.shape[1], device=patches.device) < mask.num_keep[:, None]
        mean = (patches * is_kept[..., None]).sum(1) / mask.num_keep[:, None].to(patches.dtype)
        return ImageEncoding(tokens, self.trunk.head_drop(self.trunk.fc_norm(mean)))

    def _encode_kept(self, images: Tensor, mask: PatchMask) -> Tensor:
        """[b, 3, h, w] -> tokens [b, P + K, d]: positions are added before patches are dropped."""
        trunk = self.trunk
        x = trunk._pos_embed(trunk.patch_embed(images))
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        kept = patches.gather(1, mask.keep[..., None].expand(-1, -1, patches.shape[-1]))
        x = trunk.norm_pre(torch.cat([prefix, kept], dim=1))
        attn_mask = None
        if mask.num_keep is not None:
            columns = torch.arange(x.shape[1], device=x.device)
            attn_mask = (columns < self.num_prefix_tokens + mask.num_keep[:, None])[:, None, None, :]
        for block in trunk.blocks:
            x = block(x, attn_mask=attn_mask)
        return trunk.norm(x)


def sincos_positions(grid_size: tuple[int, int], width: int, steps: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """MAE's fixed positions [1, N, width]: sines and cosines of the column, then of the row, a quarter each.

    Args:
        grid_size: rows and columns.
        width: a multiple of 4.
        steps: from one row to the next, from one column to the next; the first stands half a step from the edge,
            as it does with steps of 1.
    """
    places = [
        (torch.arange(n, dtype=torch.float64) + 0.5) * step - 0.5 for n, step in zip(grid_size, steps, strict=True)
    ]
    rows, columns = torch.meshgrid(*places, indexing="ij")
    bands = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [place.flatten()[:, None] * bands for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None].float()
