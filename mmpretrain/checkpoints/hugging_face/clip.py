"""CLIPModel: an image tower that pools a class token, and a causal text tower that pools the end token."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmpretrain.checkpoints.exported import logit_scale_of
from mmpretrain.checkpoints.hugging_face.names import OPEN_CLIP_BLOCKS, TEXT, TIMM_BLOCKS, Table, renamed, within
from mmpretrain.checkpoints.hugging_face.shapes import check_plain_vit, transformer_fields
from mmpretrain.data.tokenizer import ClipTokenizer, Tokenizer
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.open_clip import OpenClipText, OpenClipVision
from mmpretrain.models.text import TextTransformer

_TIMM: Table = (
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding.weight"),
    (r"patch_embed\.proj\.weight$", "embeddings.patch_embedding.weight"),
    (r"norm_pre\.", "pre_layrnorm."),
    (r"norm\.", "post_layernorm."),
    *TIMM_BLOCKS,
)
_OPEN_CLIP: Table = (
    (r"class_embedding$", "embeddings.class_embedding"),
    (r"positional_embedding$", "embeddings.position_embedding.weight"),
    (r"conv1\.weight$", "embeddings.patch_embedding.weight"),
    (r"ln_pre\.", "pre_layrnorm."),
    (r"ln_post\.", "post_layernorm."),
    *OPEN_CLIP_BLOCKS,
)
_TABLE: Table = (
    ("image_projection.weight$", "visual_projection.weight"),
    (r"image\.visual\.proj$", "visual_projection.weight"),
    (r"text_projection\.weight$", "text_projection.weight"),
    (r"text\.text\.text_projection(\.weight)?$", "text_projection.weight"),
    *within("image.trunk.", "vision_model.", _TIMM),
    *within("image.visual.", "vision_model.", _OPEN_CLIP),
    *within("text.text.", "text_model.", TEXT),
    *within("text.", "text_model.", TEXT),
)
# open_clip multiplies by these parameters from the right.
_TRANSPOSED = ("image.visual.proj", "text.text.text_projection")
_LEGACY_END_ID = 2


def clip(
    model: ImageTextModel, tokenizer: Tokenizer, scalars: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a model to CLIPModel.

    Args:
        model: model of two towers.
        tokenizer: tokenizer whose end token the text tower pools.
        scalars: `logit_scale`, not its logarithm; if it is absent, see `logit_scale_of`.

    Returns: the content of config.json, and the tensors.
    Raises: ValueError that names the part which CLIPModel does not have.
    """
    try:
        vision = _vision(model)
    except ValueError as error:
        raise ValueError(f"model.image has no shape of CLIPModel: {error}") from error
    try:
        text = _text(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"model.text has no shape of CLIPModel: {error}") from error
    ours = {name: tensor.T if name in _TRANSPOSED else tensor for name, tensor in model.state_dict().items()}
    tensors = renamed(ours, _TABLE, "CLIPModel")
    for tower in ("vision_model", "text_model"):
        name = f"{tower}.embeddings.position_embedding.weight"
        tensors[name] = tensors[name].reshape(-1, tensors[name].shape[-1])
    tensors["vision_model.embeddings.class_embedding"] = tensors["vision_model.embeddings.class_embedding"].flatten()
    scale = math.log(logit_scale_of(scalars))
    tensors["logit_scale"] = torch.tensor(scale)
    dim = {"projection_dim": model.embed_dim}
    config = {
        "architectures": ["CLIPModel"], "model_type": "clip", **dim, "logit_scale_init_value": scale,
        "vision_config": {"model_type": "clip_vision_model", **vision, **dim},
        "text_config": {"model_type": "clip_text_model", **text, **dim},
    }  # fmt: skip
    return config, tensors


def _vision(model: ImageTextModel) -> dict[str, Any]:
    image: Any = model.image
    if isinstance(image, OpenClipVision):
        visual = image.visual
        if not image.pools_token or visual.proj is None or not isinstance(visual.ln_pre, nn.LayerNorm):
            raise ValueError("expected a class token that is pooled, a norm before the blocks and a projection")
        blocks, size = visual.transformer.resblocks, image.patch_size
        if size[0] != size[1]:
            raise ValueError(f"its patches are {list(size)}; expected squares")
    else:
        check_plain_vit(image, has_class_token=True)
        trunk = image.trunk
        if image.projects or trunk.global_pool != "token":
            raise ValueError(f"it pools by {trunk.global_pool}; expected global_pool token and a linear projection")
        if not isinstance(trunk.norm_pre, nn.LayerNorm) or trunk.patch_embed.proj.bias is not None:
            raise ValueError("expected a norm before the blocks and patches without bias, as vit_*_clip_* have them")
        blocks = trunk.blocks
    shape = {"image_size": image.image_size, "patch_size": image.patch_size[0], "num_channels": model.num_channels}
    return {**shape, **transformer_fields(image, blocks, image.width)}


def _text(model: ImageTextModel, tokenizer: Tokenizer) -> dict[str, Any]:
    text = model.text
    if isinstance(text, TextTransformer):
        blocks, pool = text.blocks, text.pool
        pools_end = pool == "last"
    elif isinstance(text, OpenClipText):
        blocks, pool = text.text.transformer.resblocks, text.text.pool_type
        pools_end = pool in ("argmax", "eos") and text.text.cls_emb is None
        if text.text.text_projection is None:
            raise ValueError("it has no projection")
    else:
        raise ValueError(f"{type(text).__name__} is none of its text towers")
    if not text.causal or not pools_end:
        given = f"causal={str(text.causal).lower()} and pool={pool}"
        raise ValueError(f"expected a causal tower that pools the end token, got {given}")
    if tokenizer.end_id == _LEGACY_END_ID:
        raise ValueError(
            f"the end token's id is {_LEGACY_END_ID}, for which CLIPModel pools the token of the largest id"
        )
    start_id = int(tokenizer([""])[0][0, 0]) if isinstance(tokenizer, ClipTokenizer) else None
    return {
        **transformer_fields(text, blocks, text.width),
        "vocab_size": len(text.token_embeddings), "max_position_embeddings": text.context_length,
        "bos_token_id": start_id, "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.end_id if tokenizer.pad_id is None else tokenizer.pad_id,
    }  # fmt: skip
