"""ViTModel: one image tower that pools its class token."""

from typing import Any

from torch import Tensor, nn

from mmpretrain.checkpoints.hugging_face.names import Table, renamed, within
from mmpretrain.checkpoints.hugging_face.shapes import check_plain_vit, transformer_fields
from mmpretrain.models.image_text import ImageTextModel

_LAYER = r"encoder.layer.\1."
_TRUNK: Table = (
    (r"cls_token$", "embeddings.cls_token"),
    (r"pos_embed$", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"norm\.", "layernorm."),
    (r"blocks\.(\d+)\.norm1\.", rf"{_LAYER}layernorm_before."),
    (r"blocks\.(\d+)\.norm2\.", rf"{_LAYER}layernorm_after."),
    (r"blocks\.(\d+)\.attn\.qkv\.", rf"{_LAYER}attention.attention.<query|key|value>."),
    (r"blocks\.(\d+)\.attn\.proj\.", rf"{_LAYER}attention.output.dense."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", rf"{_LAYER}intermediate.dense."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", rf"{_LAYER}output.dense."),
)
_TABLE = within("image.trunk.", "", _TRUNK)


def vit(model: ImageTextModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a model of one image tower to ViTModel without its pooler.

    MAE's fixed sine-cosine positions become weights.

    Returns: the content of config.json, and the tensors.
    Raises: ValueError that names the part which ViTModel does not have.
    """
    image: Any = model.image
    try:
        check_plain_vit(image, has_class_token=True)
        trunk = image.trunk
        if trunk.global_pool != "token" or image.projects:
            raise ValueError(f"it pools by {trunk.global_pool}; expected global_pool token, the class token's state")
        if not isinstance(trunk.norm_pre, nn.Identity) or trunk.patch_embed.proj.bias is None:
            raise ValueError("it has a norm before the blocks or patches without bias, as vit_*_clip_* have them")
        fields = transformer_fields(image, trunk.blocks, image.width)
    except ValueError as error:
        raise ValueError(f"model.image has no shape of ViTModel: {error}") from error
    tensors = renamed(trunk.state_dict(prefix="image.trunk."), _TABLE, "ViTModel", without_bias=r"\.attn\.qkv\.")
    has_bias = trunk.blocks[0].attn.qkv.bias is not None
    config = {
        "architectures": ["ViTModel"], "model_type": "vit", **fields, "qkv_bias": has_bias,
        "image_size": image.image_size, "patch_size": image.patch_size[0], "num_channels": model.num_channels,
        "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    return config, tensors
