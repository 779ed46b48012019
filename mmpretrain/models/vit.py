"""Image encoders: models of timm that return tokens and a pooled state, for all patches or only the kept ones."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, Format, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mmpretrain.models.attention import attention, choose_kernel
from mmpretrain.models.encoders import has_batch_norm
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.layers import count_layers_above
from mmpretrain.models.masking import PatchMask
from mmpretrain.models.patch_projection import side_by_side


class TimmEncoder(nn.Module):
    """Image model of timm without its classifier.

    Args:
        name: name of the model in timm.
        image_size: side of the images, in pixels.
        args: further arguments of the model (`embed_dim`, `depth`, `patch_size`, `global_pool`, ...).
        init: initialisation. `timm` is the model's own. Plain ViTs also accept `clip`, that of open_clip, and `mae`, that
            of MAE with fixed sine-cosine positions.

    Raises: ValueError if timm does not know the name or rejects an argument, or the model does not support `init`.
    """

    trunk: Any  # timm's models share no base type with these attributes
    head: nn.Module | None  # projection that comes with the model
    args: dict[str, Any]  # arguments that the model was created with

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
        self.args = dict(args or {})
        self._describe(image_size)
        if init != "timm":
            if not self.is_vit:
                raise ValueError(
                    f"model.image.init is {init!r} for {name!r}; expected a plain ViT (vit_*), or init=timm"
                )
            self._init_like_clip() if init == "clip" else self._init_like_mae()

    @classmethod
    def around(cls, trunk: nn.Module, image_size: int, head: nn.Module) -> "TimmEncoder":
        """Wrap an existing model of timm. Its classifier, followed by `head`, is the projection."""
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder.trunk = trunk
        encoder.head = head
        encoder.args = {"global_pool": trunk.global_pool} if hasattr(trunk, "global_pool") else {}
        encoder._describe(image_size)
        return encoder

    def _describe(self, image_size: int) -> None:
        self.image_size = image_size
        self.width: int = self.trunk.head_hidden_size
        # Hybrids are excluded: their convolutions would leak the content of hidden patches into neighbouring ones.
        self.is_vit = isinstance(self.trunk, VisionTransformer) and isinstance(self.trunk.patch_embed, PatchEmbed)
        self.has_batch_norm = has_batch_norm(self)
        if self.is_vit:
            self.num_prefix_tokens: int = self.trunk.num_prefix_tokens
            self.grid_size: tuple[int, int] = self.trunk.patch_embed.grid_size
            self.patch_size: tuple[int, int] = self.trunk.patch_embed.patch_size
            # timm interpolates the position embeddings for images of another size.
            self.trunk.dynamic_img_size = True
            self.trunk.patch_embed.strict_img_size = False
            self.trunk.patch_embed.flatten = False
            self.trunk.patch_embed.output_fmt = Format.NHWC
            self.trunk.patch_embed.proj = side_by_side(self.trunk.patch_embed.proj)
            if self._can_pick():
                self.trunk.blocks[-1] = PickingBlock.around(self.trunk.blocks[-1])
            if not self.num_patches:
                raise ValueError(
                    f"model.image.image_size is {image_size}; expected at least a patch of {self.patch_size[0]} pixels"
                )
            if any(image_size % side for side in self.patch_size) and not self.trunk.patch_embed.dynamic_img_pad:
                raise ValueError(
                    f"model.image.image_size is {image_size}; expected a multiple of a patch's {self.patch_size[0]} pixels"
                )

    def _init_like_clip(self) -> None:
        """Apply the initialisation of open_clip's image tower.

        The class token and positions have standard deviation width^-1/2, which keeps their scale relative to normalised
        patches at any width. Attention has Xavier weights. The other layers have PyTorch's own initialisation.
        """
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
        """Apply MAE's initialisation (He et al. 2022, models_mae.py): Xavier weights and fixed sine-cosine positions."""
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
        """Create the model for one image size. Models without an `img_size` argument (convolutional ones) take any size."""
        try:
            return timm.create_model(name, num_classes=0, img_size=image_size, **args)
        except TypeError as error:
            if "unexpected keyword argument 'img_size'" not in str(error):
                raise
            return timm.create_model(name, num_classes=0, **args)

    @property
    def projects(self) -> bool:
        """True if `project` maps to the shared space, so that `ImageTextModel` adds no projection."""
        return self.head is not None

    def project(self, pooled: Tensor) -> Tensor:
        """Project pooled states [b, width] to [b, e]; only for models that come with a projection."""
        assert self.head is not None
        return self.head(self.trunk.get_classifier()(pooled))

    def layers_above(self) -> dict[str, int]:
        """Return the number of layers above each parameter, by timm's own grouping (see `layers.layers_above`).

        Raises: ValueError if the model of timm has no grouping.
        """
        if not hasattr(self.trunk, "group_matcher"):
            raise ValueError(
                f"{type(self.trunk).__name__} of timm has no group_matcher, which layer_decay and muon need"
            )
        above = count_layers_above(self.trunk, self.trunk.group_matcher(coarse=False))
        return {name: above.get(name.removeprefix("trunk."), 0) for name, _ in self.named_parameters()}

    @property
    def num_patches(self) -> int:
        """Number of patches of an image, N."""
        return self.grid_size[0] * self.grid_size[1]

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Encoding:
        """Encode images [b, 3, h, w]. With a mask only the kept patches are computed, and filler is never attended to.

        Raises: ValueError if a mask is given and the model is not a plain ViT, or the number of kept patches varies and
            `global_pool` is neither `token` nor `avg`.
        """
        if self.is_vit:
            return self._encode(images, mask)
        if mask is not None:
            raise ValueError(f"{type(self.trunk).__name__} cannot drop patches; expected a plain ViT of timm (vit_*)")
        choose_kernel(getattr(self.trunk, "blocks", ()), images.device)
        features = self.trunk.forward_features(images)
        tokens = features
        if tokens.ndim == 4 and getattr(self.trunk, "output_fmt", "NCHW") == "NHWC":
            tokens = tokens.flatten(1, 2)
        elif tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        return Encoding(lambda: tokens, lambda _: self.trunk.forward_head(features, pre_logits=True))

    def _encode(self, images: Tensor, mask: PatchMask | None) -> Encoding:
        trunk = self.trunk
        x = trunk._pos_embed(trunk.patch_embed(images))
        if mask is None:
            x = trunk.patch_drop(x)
        else:  # patches are dropped after positions are added
            prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
            x = torch.cat([prefix, patches.gather(1, mask.keep[..., None].expand(-1, -1, patches.shape[-1]))], dim=1)
        num_keep = None if mask is None else mask.num_keep
        attn_mask = None
        if num_keep is not None:
            if trunk.global_pool not in ("token", "avg"):
                raise ValueError(
                    f"global_pool={trunk.global_pool!r} cannot pool a varying number of patches; "
                    "use a constant mask_ratio, or global_pool token or avg"
                )
            columns = torch.arange(x.shape[1], device=x.device)
            attn_mask = (columns < self.num_prefix_tokens + num_keep[:, None])[:, None, None, :]
        x = trunk.norm_pre(x)
        *blocks, last = trunk.blocks
        choose_kernel(trunk.blocks, x.device, is_masked=attn_mask is not None)
        for block in blocks:
            x = block(x, attn_mask=attn_mask)

        def tokens() -> Tensor:
            choose_kernel([last], x.device, is_masked=attn_mask is not None)
            return trunk.norm(last(x, attn_mask=attn_mask))

        def pooled(encoding: Encoding) -> Tensor:
            if isinstance(last, PickingBlock) and last.can_pick and not self._draws():
                return trunk.forward_head(trunk.norm(last(x, attn_mask, first_alone=True)), pre_logits=True)
            if num_keep is None or trunk.global_pool == "token":
                return trunk.forward_head(encoding.tokens, pre_logits=True)
            patches = encoding.tokens[:, self.num_prefix_tokens :]
            is_kept = torch.arange(patches.shape[1], device=patches.device) < num_keep[:, None]
            mean = (patches * is_kept[..., None]).sum(1) / num_keep[:, None].to(patches.dtype)
            return trunk.head_drop(trunk.fc_norm(mean))

        return Encoding(tokens, pooled)

    def _can_pick(self) -> bool:
        """Return True if pooling reads only the class token, and `PickingBlock` reproduces the last block."""
        block, is_plain = self.trunk.blocks[-1], type(self.trunk) is VisionTransformer
        if (
            not is_plain
            or self.trunk.global_pool != "token"
            or type(block) is not Block
            or type(block.attn) is not Attention
        ):
            return False
        is_gated = getattr(block.attn, "gate", None) is not None  # exists in later releases of timm
        return not is_gated and isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity)

    def _draws(self) -> bool:
        """Return True if the last block has active dropout; its random draws depend on the number of computed tokens."""
        modules = self.trunk.blocks[-1].modules()
        return self.training and any(getattr(module, name, 0) for module in modules for name in ("p", "drop_prob"))


class PickingBlock(Block):
    """Block of timm with an additional forward pass for the first token alone."""

    @classmethod
    def around(cls, block: Block) -> "PickingBlock":
        """Return a block with the modules of `block`, whose parameters keep their names."""
        picking = cls.__new__(cls)
        nn.Module.__init__(picking)  # Block's own would draw new weights
        for name, module in block.named_children():
            picking.add_module(name, module)
        return picking

    @property
    def can_pick(self) -> bool:
        """True if the parts of the projection may be computed apart, from its weight: not with an adapter around it."""
        return type(self.attn.qkv) is nn.Linear

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, first_alone: bool = False) -> Tensor:
        """Compute the states of all tokens, [b, N, d] -> [b, N, d], or with `first_alone` of the first one, [b, 1, d].

        With `first_alone` the query, output projection and MLP are computed for the first token only.
        """
        if not first_alone:
            return super().forward(x, attn_mask=attn_mask)
        attn: Any = self.attn
        y = self.norm1(x)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        width = len(weight) // 3
        q = F.linear(y[:, :1], weight[:width], None if bias is None else bias[:width])
        kv = F.linear(y, weight[width:], None if bias is None else bias[width:])
        q = q.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attention(attn.q_norm(q), attn.k_norm(k), v, attn_mask)
        x = x[:, :1] + self.ls1(attn.proj(attended.transpose(1, 2).flatten(2)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def sincos_positions(grid_size: tuple[int, int], width: int, steps: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Return MAE's fixed position embeddings, float32 [1, N, width].

    Their four quarters are the sine and cosine of the column, and the sine and cosine of the row.

    Args:
        grid_size: rows and columns of patches.
        width: number of channels, a multiple of 4.
        steps: distance between adjacent rows and between adjacent columns. The first row and column are half a step from
            the edge of the image, which is at -0.5: with steps of 1 the coordinates are 0, 1, 2, ...
    """
    places = [
        (torch.arange(n, dtype=torch.float64) + 0.5) * step - 0.5 for n, step in zip(grid_size, steps, strict=True)
    ]
    rows, columns = torch.meshgrid(*places, indexing="ij")
    bands = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [place.flatten()[:, None] * bands for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None].float()
