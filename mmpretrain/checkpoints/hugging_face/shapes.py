"""Shapes of our towers in the words of Hugging Face's configurations, and the reasons why a class has no such shape."""

from collections.abc import Iterable
from typing import Any

from open_clip.transformer import QuickGELU as OpenClipQuickGELU
from timm.layers import Attention, Mlp
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mmpretrain.models.vit import PickingBlock, TimmEncoder


def transformer_fields(tower: nn.Module, blocks: Iterable[Any], width: int) -> dict[str, Any]:
    """Return the fields of a configuration that describe a tower's blocks.

    Raises: ValueError if its activation or its LayerNorms cannot be expressed.
    """
    first, *others = blocks
    hidden = first.mlp.fc1 if hasattr(first.mlp, "fc1") else first.mlp.c_fc
    return {
        "hidden_size": width,
        "intermediate_size": hidden.out_features,
        "num_hidden_layers": 1 + len(others),
        "num_attention_heads": first.attn.num_heads,
        "hidden_act": activation_of(first.mlp.act if hasattr(first.mlp, "act") else first.mlp.gelu),
        "layer_norm_eps": _eps(tower),
    }


def activation_of(module: nn.Module) -> str:
    """Return Hugging Face's name of an activation. Raises: ValueError if there is none."""
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    known = {GELU: "gelu", GELUTanh: "gelu_pytorch_tanh", QuickGELU: "quick_gelu", OpenClipQuickGELU: "quick_gelu"}
    if type(module) not in known:
        raise ValueError(f"its activation is {type(module).__name__}; expected GELU or QuickGELU")
    return known[type(module)]


def _eps(tower: nn.Module) -> float:
    found = sorted({module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)})
    if len(found) != 1:
        raise ValueError(f"the eps of its LayerNorms are {found}; expected one for all of them")
    return found[0]


def check_plain_vit(image: Any, has_class_token: bool) -> None:
    """Raise ValueError unless an image tower is timm's plain ViT with square patches and positions for all tokens.

    Args:
        image: the image tower.
        has_class_token: expect one class token; False: none.
    """
    if not isinstance(image, TimmEncoder) or not image.is_vit or type(image.trunk) is not VisionTransformer:
        trunk = image.trunk if isinstance(image, TimmEncoder) else image
        raise ValueError(f"{type(trunk).__name__} is no plain ViT of timm")
    trunk = image.trunk
    blocks = {type(part).__name__ for block in trunk.blocks for part in (block, block.attn, block.mlp)}
    plain = {each.__name__ for each in (Block, PickingBlock, Attention, Mlp)}
    if blocks - plain:
        raise ValueError(f"its blocks have {', '.join(sorted(blocks - plain))}; expected {', '.join(sorted(plain))}")
    num_registers = image.num_prefix_tokens - (trunk.cls_token is not None)
    if num_registers or has_class_token != (trunk.cls_token is not None):
        given = f"{int(trunk.cls_token is not None)} class token and {num_registers} register tokens"
        raise ValueError(f"it has {given}; expected {int(has_class_token)} class token and no register tokens")
    if trunk.pos_embed is None or trunk.pos_embed.shape[1] != image.num_patches + image.num_prefix_tokens:
        raise ValueError("its positions are not a table of one row for each token")
    if image.patch_size[0] != image.patch_size[1]:
        raise ValueError(f"its patches are {list(image.patch_size)}; expected squares")
    if not isinstance(trunk.norm, nn.LayerNorm) or not isinstance(trunk.fc_norm, nn.Identity):
        raise ValueError("its final norm comes after the pooling; expected it before")
