"""Models of open_clip by name, wrapped as encoders that return tokens and, if possible, accept patch masks.

Parameters keep open_clip's names, including projections, so that weights can be exchanged without renaming
(`checkpoints.open_clip`).
"""

import difflib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer, text_global_pool
from torch import Tensor, nn

from mmpretrain.batch import Packing
from mmpretrain.models.blocks import Block, of_picks
from mmpretrain.models.encoding import Encoding
from mmpretrain.models.huggingface import run_on_texts
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.layers import layers_above_blocks
from mmpretrain.models.masking import PatchMask
from mmpretrain.models.patch_projection import side_by_side
from mmpretrain.models.rows import Rows
from mmpretrain.models.vit import TimmEncoder


def open_clip_model(
    name: str,
    image_size: int | None = None,
    context_length: int | None = None,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    squash: bool | None = None,
    interpolation: Literal["bicubic", "bilinear"] | None = None,
) -> ImageTextModel:
    """Build a model of open_clip with random weights; `init_from` loads trained ones.

    Args:
        name: an entry of `open_clip.list_models()`, or `local-dir:<folder with open_clip_config.json>`.
        image_size: side of the images in pixels; None: the model's own.
        context_length: largest number of tokens of a text; None: the model's own.
        vision, text: overrides of the model's `vision_cfg` and `text_cfg`; `text.causal` sets `no_causal_mask` to its
            negation.
        image_mean, image_std, squash, interpolation: see `ImageTextModel`; None: the values of the model's published weights.

    Raises: ValueError if open_clip does not know the name or rejects an argument, or a tower cannot be wrapped.
    """
    config = model_config(name, image_size, context_length, vision, text)
    towers = {"vision_cfg": config["vision_cfg"], "text_cfg": config["text_cfg"]}
    root = logging.getLogger()
    root.addFilter(_is_not_of_weights)
    try:
        model = open_clip.create_model(
            name,
            load_weights=False,
            pretrained_text=False,
            force_custom_text=True,
            device=torch.get_default_device(),
            **towers,
        )
    except (TypeError, AssertionError, RuntimeError, OSError) as error:
        raise ValueError(f"open_clip refuses model.name={name} with {towers}: {error}") from error
    finally:
        root.removeFilter(_is_not_of_weights)
    if not isinstance(model, open_clip.CustomTextCLIP):
        raise ValueError(f"model.name={name} is a {type(model).__name__}; expected a model of two towers")
    preprocess = {**open_clip.get_model_preprocess_cfg(model), **_published_preprocess(name)}
    if preprocess["resize_mode"] == "longest" and squash is None:
        raise ValueError(f"model.name={name} pads its images (resize_mode longest); choose model.squash=true or false")
    image = _image_encoder(model.visual, name)
    text_encoder = OpenClipHFText(model.text) if isinstance(model.text, HFTextEncoder) else OpenClipText(model.text)
    if not config.get("custom_text") and isinstance(text_encoder, OpenClipText):
        text_encoder.prefix = ""
    with torch.no_grad():
        embed_dim = image.project(torch.zeros(1, image.width)).shape[-1]
    return ImageTextModel(
        image=image,
        text=text_encoder,
        embed_dim=embed_dim,
        image_mean=tuple(preprocess["mean"] if image_mean is None else image_mean),
        image_std=tuple(preprocess["std"] if image_std is None else image_std),
        squash=preprocess["resize_mode"] == "squash" if squash is None else squash,
        interpolation=interpolation or ("bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"),
    )


def _is_not_of_weights(record: logging.LogRecord) -> bool:
    """Return False for open_clip's warning of random weights: checkpoints and `init_from` load them afterwards."""
    return "No pretrained weights loaded" not in record.getMessage()


def _image_encoder(visual: Any, name: str) -> Any:
    if isinstance(visual, VisionTransformer):
        return OpenClipVision(visual)
    if isinstance(visual, TimmModel) and "pool" not in visual.head._modules:
        # If open_clip adds no projection of its own, timm's classifier is the projection.
        return TimmEncoder.around(visual.trunk, visual.image_size[0], head=visual.head)
    if isinstance(visual, ModifiedResNet):
        return OpenClipResNet(visual)
    reason = "its pooling is part of its projection" if isinstance(visual, TimmModel) else "it is not known"
    raise ValueError(f"model.name={name}: its image tower {type(visual).__name__} cannot be wrapped ({reason})")


def _published_preprocess(name: str) -> dict[str, Any]:
    """Return the mean, std, resize mode and interpolation of a model's first published weights; empty if none are published.

    For three models of open_clip the values differ between published weights.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    config = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    return {key: config[key] for key in ("mean", "std", "resize_mode", "interpolation") if config.get(key) is not None}


def model_config(
    name: str,
    image_size: int | None = None,
    context_length: int | None = None,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return open_clip's configuration of a model with the given overrides, and with pretrained towers switched off.

    Raises: ValueError if open_clip does not know the name.
    """
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else _config_in_folder(name)
    if config is None:
        near = ", ".join(difflib.get_close_matches(name, open_clip.list_models())) or "one of open_clip.list_models()"
        raise ValueError(
            f"model.name is {name!r}; expected a model of open_clip, such as {near}, or "
            "local-dir:<folder with open_clip_config.json>"
        )
    text = dict(text or {})
    if "causal" in text:  # the name of our own text encoders, which the messages of objectives use
        text["no_causal_mask"] = not text.pop("causal")
    vision_cfg = {**config["vision_cfg"], **(vision or {}), "timm_model_pretrained": False}
    text_cfg = {**config["text_cfg"], **text, "hf_model_pretrained": False}
    if image_size is not None:
        vision_cfg["image_size"] = image_size
    if context_length is not None:
        text_cfg["context_length"] = context_length
    return {**config, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _config_in_folder(name: str) -> dict[str, Any] | None:
    """Return the `model_cfg` of `local-dir:<folder>`; None if the name has another form or the file is missing."""
    file = Path(name.removeprefix("local-dir:"), "open_clip_config.json")
    if not name.startswith("local-dir:") or not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
    return config


def _take_blocks(transformer: Any) -> bool:
    """Replace the blocks of an open_clip transformer by `Block`, with the same parameters under the same names.

    Returns: True if they were replaced. Custom blocks and blocks with layer scale are left unchanged.
    """
    blocks = list(transformer.resblocks)
    if not all(type(block) is ResidualAttentionBlock and isinstance(block.ls_1, nn.Identity) for block in blocks):
        return False
    for i, theirs in enumerate(blocks):
        ours = Block(theirs.attn.embed_dim, theirs.attn.num_heads, theirs.mlp.c_fc.out_features)
        ours.ln_1, ours.ln_2, ours.mlp = theirs.ln_1, theirs.ln_2, theirs.mlp
        ours.attn.load_state_dict(theirs.attn.state_dict())
        transformer.resblocks[i] = ours
    return True


class OpenClipVision(nn.Module):
    """Wrapper of open_clip's `VisionTransformer` that accepts patch masks. open_clip's own patch dropout is not used."""

    is_vit = True
    has_batch_norm = False
    projects = True
    num_prefix_tokens = 1

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual: Any = visual
        self.image_size: int = visual.image_size[0]
        self.grid_size: tuple[int, int] = visual.grid_size
        self.patch_size: tuple[int, int] = visual.patch_size
        self.width: int = visual.ln_post.normalized_shape[0]
        self.pools_token = visual.attn_pool is None and visual.pool_type == "tok"
        self._has_own_blocks = _take_blocks(visual.transformer)
        visual.conv1 = side_by_side(visual.conv1)

    @property
    def num_patches(self) -> int:
        """Number of patches of an image, N."""
        return self.grid_size[0] * self.grid_size[1]

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Encoding:
        """Encode images [b, 3, h, w]. With a mask only the kept patches are computed, and filler is never attended to.

        Raises: ValueError if the number of kept patches varies, and pooling reads more than the class token.
        """
        visual = self.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        positions = visual.positional_embedding.to(patches.dtype)
        prefix = (visual.class_embedding.to(patches.dtype) + positions[0]).expand(patches.shape[0], 1, -1)
        patches = patches + positions[1:]
        is_seen = None
        if mask is not None:
            patches = patches.gather(1, mask.keep[..., None].expand(-1, -1, patches.shape[-1]))
            if mask.num_keep is not None:
                if not self.pools_token:
                    raise ValueError(
                        f"pool_type={visual.pool_type!r} of open_clip's VisionTransformer cannot pool a varying number "
                        "of patches; use a constant mask_ratio, or pool_type tok"
                    )
                is_seen = torch.arange(patches.shape[1] + 1, device=images.device) <= mask.num_keep[:, None]
        x = visual.ln_pre(torch.cat([prefix, patches], dim=1))
        if not self._has_own_blocks:
            x = visual.transformer(x, attn_mask=None if is_seen is None else self._added(is_seen, x.dtype))
            return Encoding(
                lambda: x if visual.attn_pool is not None else visual.ln_post(x), lambda _: visual._pool(x)[0]
            )
        attn_mask = None if is_seen is None else is_seen[:, None, None]
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            x = block(x, attn_mask)
        first = torch.zeros(images.shape[0], 1, dtype=torch.int64, device=images.device)
        ends = Encoding(lambda: last(x, attn_mask), lambda _: last(x, attn_mask, token_indices=first)[:, 0])
        return Encoding(
            lambda: ends.tokens if visual.attn_pool is not None else visual.ln_post(ends.tokens),
            lambda _: visual.ln_post(ends.pooled) if self.pools_token else visual._pool(ends.tokens)[0],
        )

    def _added(self, is_seen: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert a mask bool [b, l] to the additive form of `nn.MultiheadAttention`, [b * heads, l, l]."""
        heads, length = self.visual.transformer.resblocks[0].attn.num_heads, is_seen.shape[1]
        added = torch.zeros_like(is_seen, dtype=dtype).masked_fill_(~is_seen, -torch.inf)
        return added[:, None, None, :].expand(-1, heads, length, -1).flatten(0, 1)

    def layers_above(self) -> dict[str, int]:
        """Return the number of layers above each parameter (see `layers.layers_above`)."""
        return layers_above_blocks(
            self,
            stem=r"visual\.(?:class_embedding|positional_embedding|conv1|ln_pre)",
            blocks=r"visual\.transformer\.resblocks\.(\d+)",
            norm=r"visual\.ln_post",
        )

    def project(self, pooled: Tensor) -> Tensor:
        """Project pooled states [b, width] to the shared space [b, e]."""
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


class OpenClipResNet(nn.Module):
    """Wrapper of OpenAI's `ModifiedResNet`. Its attention pooling includes the projection: `pooled` is the embedding."""

    projects = True

    def __init__(self, visual: ModifiedResNet) -> None:
        super().__init__()
        self.visual: Any = visual
        self.image_size: int = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        self.width: int = visual.output_dim

    def forward(self, images: Tensor, mask: PatchMask | None = None) -> Encoding:
        """Encode images [b, 3, h, w].

        Raises: ValueError if a mask is given.
        """
        if mask is not None:
            raise ValueError("open_clip's ModifiedResNet cannot drop patches; expected a ViT")
        visual = self.visual
        x = visual.stem(images)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
        return Encoding(lambda: x.flatten(2).transpose(1, 2), lambda _: visual.attnpool(x))

    def layers_above(self) -> dict[str, int]:
        """Return the number of layers above each parameter (see `layers.layers_above`)."""
        return layers_above_blocks(self, stem=r"visual\.(?:conv|bn)\d", blocks=r"visual\.layer(\d+)\.(\d+)")

    def project(self, pooled: Tensor) -> Tensor:
        """Return `pooled` [b, e] unchanged."""
        return pooled


class OpenClipText(nn.Module):
    """Wrapper of open_clip's `TextTransformer`, which omits padding if padding does not affect the output."""

    projects = True
    prefix = "text."
    """Prefix of its parameters in open_clip's checkpoints; empty for models without a separate text module."""

    def __init__(self, text: TextTransformer) -> None:
        super().__init__()
        self.text: Any = text
        self.vocab_size: int = text.vocab_size
        self.context_length: int = text.context_length
        self.width: int = text.width
        self.causal = text.attn_mask is not None
        # Under a causal mask tokens after the end token have no effect. SigLIP's text towers attend to padding, so that
        # their texts must be padded to the full context length.
        self._ignores_padding = self.causal and text.cls_emb is None and text.pool_type in ("argmax", "eos", "first")
        self.pad_id: int | None = None if self._ignores_padding else text.pad_id
        self.adopts_padding = not self._ignores_padding and text.cls_emb is None
        self.end_id: int | None = text.eos_id if text.pool_type == "eos" else None
        self._has_own_blocks = self._ignores_padding and _take_blocks(text.transformer)

    @property
    def token_embeddings(self) -> Tensor:
        """Token embedding matrix, [vocabulary, d]."""
        return cast(Tensor, self.text.token_embedding.weight)

    def forward(self, ids: Tensor, lengths: Tensor, packing: Packing | None = None) -> Encoding:
        """Encode token ids int64 [b, L] of texts with `lengths` int64 [b].

        `packing` is ignored if open_clip's blocks were kept (see `_take_blocks`).
        """
        text = self.text
        if self._ignores_padding:
            pooled_place = torch.zeros_like(lengths) if text.pool_type == "first" else lengths - 1
            rows = Rows(lengths, ids.shape[1], packing if self._has_own_blocks else None)
            x = text.token_embedding(rows.pack(ids))
            x = x + F.embedding(rows.positions, text.positional_embedding).to(x.dtype)
            if not self._has_own_blocks:
                x = text.transformer(x, attn_mask=text.attn_mask[: x.shape[1], : x.shape[1]])
                x = text.ln_final(x)
                return Encoding(lambda: x, lambda _: of_picks(x, pooled_place[:, None])[:, 0])
            mask = rows.mask(is_causal=True)
            is_causal = mask is None
            *blocks, last = text.transformer.resblocks
            for block in blocks:
                x = block(x, mask, is_causal)
            return Encoding(
                lambda: rows.unpack(text.ln_final(last(x, mask, is_causal))),
                lambda _: text.ln_final(rows.unpack_tokens(last(x, mask, is_causal, rows.token_indices(pooled_place)))),
            )
        is_padding = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
        assert self.pad_id is not None
        ids = ids.masked_fill(is_padding, self.pad_id)
        ids = F.pad(ids, (0, self.context_length - ids.shape[1]), value=self.pad_id)
        x, attn_mask = text._embeds(ids)
        x = text.transformer(x, attn_mask=attn_mask)
        if text.cls_emb is not None:
            return Encoding(lambda: x[:, :-1], lambda _: text.ln_final(x[:, -1]))
        x = text.ln_final(x)
        return Encoding(lambda: x, lambda _: text_global_pool(x, ids, text.pool_type, text.eos_id))

    def layers_above(self) -> dict[str, int]:
        """Return the number of layers above each parameter (see `layers.layers_above`)."""
        return layers_above_blocks(
            self,
            stem=r"text\.(?:token_embedding|positional_embedding|cls_emb)",
            blocks=r"text\.transformer\.resblocks\.(\d+)",
            norm=r"text\.ln_final",
        )

    def project(self, pooled: Tensor) -> Tensor:
        """Project pooled states [b, width] to the shared space [b, e]."""
        projection = self.text.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection


class OpenClipHFText(nn.Module):
    """Wrapper of open_clip's adapter for text models of Hugging Face."""

    projects = True
    prefix = "text."
    causal = False

    def __init__(self, text: HFTextEncoder) -> None:
        super().__init__()
        self.text: Any = text
        self.vocab_size: int = text.vocab_size
        self.context_length: int = text.context_length
        self.width: int = text.config.hidden_size

    @property
    def token_embeddings(self) -> Tensor:
        """Token embedding matrix, [vocabulary, d]."""
        return cast(Tensor, self.text.transformer.get_input_embeddings().weight)

    def forward(self, ids: Tensor, lengths: Tensor, packing: Packing | None = None) -> Encoding:
        """Encode token ids int64 [b, L] of texts with `lengths` int64 [b].

        Padding, the positions from `lengths` on, is never attended to. `packing` is ignored.
        """
        out, is_token = run_on_texts(self.text.transformer, ids, lengths)
        return Encoding(lambda: out.last_hidden_state, lambda _: self.text.pooler(out, is_token.long()))

    def layers_above(self) -> dict[str, int]:
        """Return the number of layers above each parameter (see `layers.layers_above`)."""
        return layers_above_blocks(
            self,
            stem=r"text\.transformer\.(?:embeddings|shared|embed_tokens)",
            blocks=r"text\.transformer\.(?:\w+\.)*?(\d+)\.",
            norm=r"text\.transformer\.(?!pooler)",
        )

    def project(self, pooled: Tensor) -> Tensor:
        """Project pooled states [b, width] to the shared space [b, e]."""
        return self.text.proj(pooled)
