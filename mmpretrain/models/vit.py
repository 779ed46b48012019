"""Image encoders: timm's models, giving tokens and a pooled embedding, on all patches or on the kept ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmpretrain.masking import PatchMask


@dataclass(frozen=True)
class ImageEncoding:
    """tokens [b, P + N, d], of which the first P are no patches (class and register tokens); pooled [b, d]."""

    tokens: Tensor
    pooled: Tensor


class TimmEncoder(nn.Module):
    """An image model of timm without its classifier.

    Args:
        name: timm's name of it.
        image_size: side of the images, in pixels.
        args: further arguments of timm's model (`embed_dim`, `depth`, `patch_size`, `global_pool`, ...).

    Raises: ValueError if timm does not know the name or an argument.
    """

    trunk: Any  # timm's models share no type that knows their parts

    def __init__(self, name: str, image_size: int = 224, args: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "see timm.list_models()"
            raise ValueError(f"model.image.name is {name!r}; expected a model of timm, such as {near}")
        arguments: dict[str, Any] = dict(args or {})
        if self._takes_image_size(name):
            arguments["img_size"] = image_size
        try:
            self.trunk = timm.create_model(name, num_classes=0, **arguments)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"timm refuses model.image.args {dict(args or {})} for {name!r}: {error}") from error
        self.image_size = image_size
        self.width: int = self.trunk.num_features
        self.is_vit = isinstance(self.trunk, VisionTransformer)
        self.has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules())
        if self.is_vit:
            self.num_prefix_tokens: int = self.trunk.num_prefix_tokens
            self.grid_size: tuple[int, int] = self.trunk.patch_embed.grid_size
            self.patch_size: tuple[int, int] = self.trunk.patch_embed.patch_size

    @staticmethod
    def _takes_image_size(name: str) -> bool:
        """Whether timm's model is built for one image size; convolutional ones take any."""
        return any(part in name for part in ("vit", "deit", "beit", "eva", "swin"))

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
        if mask is None:
            tokens = self.trunk.forward_features(images)
        else:
            tokens = self._encode_kept(images, mask)
        if not self.is_vit:
            pooled = self.trunk.forward_head(tokens, pre_logits=True)
            return ImageEncoding(tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens, pooled)
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
