"""SiglipModel: an image tower with attention pooling, and a bidirectional text tower that pools its last position."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from mmpretrain.checkpoints.hugging_face.names import TEXT, TIMM_BLOCKS, Table, renamed, within
from mmpretrain.checkpoints.hugging_face.shapes import activation_of, check_plain_vit, transformer_fields
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.open_clip import OpenClipText

_IMAGE: Table = (
    (r"pos_embed$", "embeddings.position_embedding.weight"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"attn_pool\.latent$", "head.probe"),
    (r"attn_pool\.(q|kv)\.", r"head.attention.\1."),  # joined by `_joined`
    (r"attn_pool\.proj\.", "head.attention.out_proj."),
    (r"attn_pool\.norm\.", "head.layernorm."),
    (r"attn_pool\.mlp\.", "head.mlp."),
    *TIMM_BLOCKS,
)
_TABLE: Table = (
    (r"text\.text\.text_projection\.", "text_model.head."),
    (r"text\.text\.text_projection$", "text_model.head.weight"),
    *within("image.trunk.", "vision_model.", _IMAGE),
    *within("text.text.", "text_model.", TEXT),
)
_ATTENTION = "vision_model.head.attention"


def pools_by_attention(model: ImageTextModel) -> bool:
    """Return True if the image tower is a ViT of timm with attention pooling, which SiglipModel has and CLIPModel has not."""
    return getattr(getattr(model.image, "trunk", None), "attn_pool", None) is not None


def siglip(
    model: ImageTextModel, tokenizer: Tokenizer, scalars: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a model to SiglipModel.

    Args:
        model: model of two towers.
        tokenizer: tokenizer with the padding token that the text tower attends to.
        scalars: `logit_scale`, not its logarithm, and `logit_bias` of the sigmoid loss.

    Returns: the content of config.json, and the tensors.
    Raises: ValueError that names the part which SiglipModel does not have.
    """
    try:
        vision = _vision(model)
    except ValueError as error:
        raise ValueError(f"model.image has no shape of SiglipModel: {error}") from error
    try:
        text = _text(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"model.text has no shape of SiglipModel: {error}") from error
    if missing := [name for name in ("logit_scale", "logit_bias") if name not in scalars]:
        raise ValueError(f"no objective has learnt a {missing[0]}, which SiglipModel has; expected objective=sigmoid")
    ours = model.state_dict()
    if (projection := ours.get("text.text.text_projection")) is not None:
        ours["text.text.text_projection"] = projection.T
    tensors = _joined(renamed(ours, _TABLE, "SiglipModel"))
    tensors.setdefault("text_model.head.bias", torch.zeros(model.embed_dim))
    name = "vision_model.embeddings.position_embedding.weight"
    tensors[name] = tensors[name][0]
    tensors["logit_scale"] = torch.tensor([math.log(scalars["logit_scale"])])
    tensors["logit_bias"] = torch.tensor([scalars["logit_bias"]])
    config = {
        "architectures": ["SiglipModel"], "model_type": "siglip",
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "text_config": {"model_type": "siglip_text_model", **text},
    }  # fmt: skip
    return config, tensors


def _joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the projections of the query, and of keys and values, of the pooling."""
    for kind in ("weight", "bias"):
        parts = [tensors.pop(f"{_ATTENTION}.{part}.{kind}") for part in ("q", "kv")]
        tensors[f"{_ATTENTION}.in_proj_{kind}"] = torch.cat(parts)
    return tensors


def _vision(model: ImageTextModel) -> dict[str, Any]:
    image: Any = model.image
    check_plain_vit(image, has_class_token=False)
    trunk = image.trunk
    has_own = image.head is not None and next(image.head.parameters(), None) is not None
    if model.image_projection is not None or has_own or trunk.num_classes:
        raise ValueError("it has a projection after the pooling; expected none, as open_clip's SigLIP models")
    if not isinstance(trunk.norm_pre, nn.Identity) or trunk.patch_embed.proj.bias is None:
        raise ValueError("expected no norm before the blocks, and patches with bias")
    fields = transformer_fields(image, trunk.blocks, image.width)
    pool = trunk.attn_pool
    if (
        type(pool) is not AttentionPoolLatent
        or (pool.pool, pool.latent_len, pool.num_heads) != ("token", 1, fields["num_attention_heads"])
        or not all(isinstance(part, nn.Linear) and part.bias is not None for part in (pool.q, pool.kv, pool.proj))
        or not isinstance(pool.norm, nn.LayerNorm)
        or pool.mlp is None
        or pool.mlp.fc1.out_features != fields["intermediate_size"]
        or activation_of(pool.mlp.act) != fields["hidden_act"]
    ):
        raise ValueError("its attention pooling differs from a block's heads and MLP, or has more than one query")
    size = {"image_size": image.image_size, "patch_size": image.patch_size[0], "num_channels": model.num_channels}
    return {**size, **fields}


def _text(model: ImageTextModel, tokenizer: Tokenizer) -> dict[str, Any]:
    text = model.text
    if not isinstance(text, OpenClipText):
        raise ValueError(f"{type(text).__name__} is not open_clip's text tower (model=open_clip)")
    if text.causal or text.text.pool_type != "last" or text.text.cls_emb is not None:
        given = f"causal={str(text.causal).lower()} and pool_type={text.text.pool_type}"
        raise ValueError(f"expected a bidirectional tower that pools the last position, got {given}")
    if text.text.text_projection is None:
        raise ValueError("it has no projection")
    if tokenizer.pad_id is None:
        raise ValueError("it attends to padding, and the tokenizer has no padding token")
    return {
        **transformer_fields(text, text.text.transformer.resblocks, text.width),
        "vocab_size": len(text.token_embeddings), "max_position_embeddings": text.context_length,
        "projection_size": model.embed_dim,
        "bos_token_id": None, "eos_token_id": tokenizer.end_id, "pad_token_id": text.pad_id,
    }  # fmt: skip
