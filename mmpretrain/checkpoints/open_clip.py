"""Conversion to and from open_clip's parameter names and shapes, for export and `init_from`."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpretrain import files
from mmpretrain.checkpoints import tensor_files
from mmpretrain.checkpoints.exported import INITIAL_SCALE, Exported, logit_scale_of
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.data.tokenizer import ClipTokenizer, Tokenizer
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.lora import has_adapters, plain_name
from mmpretrain.models.open_clip import OpenClipHFText, OpenClipResNet, OpenClipText, OpenClipVision, model_config
from mmpretrain.models.text import TextTransformer
from mmpretrain.models.vit import TimmEncoder

log = logging.getLogger(__name__)

_TIMM_TO_OPEN_CLIP = (
    (r"^image\.trunk\.cls_token$", "visual.class_embedding"),
    (r"^image\.trunk\.pos_embed$", "visual.positional_embedding"),
    (r"^image\.trunk\.patch_embed\.proj\.", "visual.conv1."),
    (r"^image\.trunk\.norm_pre\.", "visual.ln_pre."),
    (r"^image\.trunk\.norm\.", "visual.ln_post."),
    (r"^image\.trunk\.blocks\.(\d+)\.norm(\d)\.", r"visual.transformer.resblocks.\1.ln_\2."),
    (r"^image\.trunk\.blocks\.(\d+)\.attn\.qkv\.", r"visual.transformer.resblocks.\1.attn.in_proj_"),
    (r"^image\.trunk\.blocks\.(\d+)\.attn\.proj\.", r"visual.transformer.resblocks.\1.attn.out_proj."),
    (r"^image\.trunk\.blocks\.(\d+)\.mlp\.fc1\.", r"visual.transformer.resblocks.\1.mlp.c_fc."),
    (r"^image\.trunk\.blocks\.(\d+)\.mlp\.fc2\.", r"visual.transformer.resblocks.\1.mlp.c_proj."),
)
_TRANSPOSED = {"image_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def open_clip_names(model: ImageTextModel) -> dict[str, str]:
    """Return open_clip's name of each parameter and buffer, by our name.

    Raises: ValueError if open_clip has no such architecture.
    """
    image_kinds = TimmEncoder | OpenClipVision | OpenClipResNet
    text_kinds = TextTransformer | OpenClipText | OpenClipHFText
    for key, encoder, kinds in (("image", model.image, image_kinds), ("text", model.text, text_kinds)):
        if encoder is not None and not isinstance(encoder, kinds):
            raise ValueError(f"model.{key} has no open_clip shape: {type(encoder).__name__} is none of its towers")
    if isinstance(model.image, TimmEncoder) and not model.image.projects and (lack := _image_lack(model.image)):
        raise ValueError(f"model.image has no open_clip shape: {lack}")
    if isinstance(model.text, TextTransformer) and (lack := _text_lack(model.text)):
        raise ValueError(f"model.text has no open_clip shape: {lack}")
    return {name: _open_clip_name(plain_name(name), model) for name in model.state_dict() if not has_adapters([name])}


def _image_lack(image: TimmEncoder) -> str | None:
    """Return the reason why open_clip has no such image encoder, or None if it has."""
    trunk = image.trunk
    if not image.is_vit:
        return f"{type(trunk).__name__} of timm is none of its own image towers"
    if trunk.global_pool != "token" or image.num_prefix_tokens != 1:
        return f"expected global_pool token and one class token, got {trunk.global_pool} and {image.num_prefix_tokens}"
    if not isinstance(trunk.norm_pre, nn.LayerNorm) or trunk.patch_embed.proj.bias is not None:
        return "expected a norm before the blocks and patches without bias, as timm's vit_*_clip_* have them"
    if not isinstance(trunk.blocks[0].mlp.act, nn.GELU):
        return f"expected GELU, got {type(trunk.blocks[0].mlp.act).__name__}"
    if not isinstance(trunk.blocks[0].ls1, nn.Identity) or not isinstance(trunk.blocks[0].attn.q_norm, nn.Identity):
        return "expected blocks without layer scale and without norms of queries and keys"
    return None


def _text_lack(text: TextTransformer) -> str | None:
    """Return the reason why open_clip has no such text encoder, or None if it has."""
    if text.causal and text.pool == "last":
        return None
    return f"expected causal and pool=last, got causal={str(text.causal).lower()} and pool={text.pool}"


def _open_clip_name(name: str, model: ImageTextModel) -> str:
    if name in _TRANSPOSED:
        return _TRANSPOSED[name]
    if name.startswith("text."):
        name = name.removeprefix("text.")
        if isinstance(model.text, OpenClipText | OpenClipHFText):
            return model.text.prefix + name.removeprefix("text.")
        return name
    if isinstance(model.image, TimmEncoder) and not model.image.projects:
        for ours, theirs in _TIMM_TO_OPEN_CLIP:
            if re.match(ours, name):
                return re.sub(ours, theirs, name)
    return "visual." + name.removeprefix("image.").removeprefix("visual.")


def to_open_clip(
    model: ImageTextModel, logit_scale: float | None = None, logit_bias: float | None = None
) -> dict[str, Tensor]:
    """Convert the model's weights to open_clip's names and shapes.

    Args:
        model: model with towers that open_clip supports.
        logit_scale: scale s = 1 / temperature, not its logarithm; None writes open_clip's initial value 1 / 0.07.
        logit_bias: bias b of the sigmoid loss; None if the model has none.

    Raises: ValueError if open_clip has no such architecture.
    """
    tensors = {}
    for name, theirs in open_clip_names(model).items():
        tensor = model.state_dict()[name].detach()
        if name in _TRANSPOSED:
            tensor = tensor.T
        elif theirs == "visual.class_embedding":
            tensor = tensor.flatten()
        elif theirs == "visual.positional_embedding" and tensor.ndim == 3:
            tensor = tensor[0]
        tensors[theirs] = tensor.contiguous()
    tensors["logit_scale"] = torch.tensor(INITIAL_SCALE if logit_scale is None else logit_scale).log()
    if logit_bias is not None:
        tensors["logit_bias"] = torch.tensor(logit_bias)
    return tensors


def from_open_clip(model: ImageTextModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert open_clip's tensors to our names and dimensions. Tensors without a counterpart keep their names.

    Raises: ValueError if open_clip has no such architecture.
    """
    own = model.state_dict()
    # open_clip writes the text encoder's names with or without the prefix `text.`: ignore it on both sides.
    ours = {theirs.removeprefix("text."): name for name, theirs in open_clip_names(model).items()}
    found = {}
    for theirs, tensor in tensors.items():
        name = ours.get(theirs.removeprefix("text."), theirs)
        if name in _TRANSPOSED:
            tensor = tensor.T
        elif name in own and own[name].ndim == tensor.ndim + 2:  # the class token
            tensor = tensor[None, None]
        elif name in own and own[name].ndim == tensor.ndim + 1:  # the position embedding
            tensor = tensor[None]
        found[name] = tensor
    return found


def open_clip_config(model: ImageTextModel, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of open_clip_config.json, from which `open_clip.create_model("local-dir:DIR")` builds the model.

    Args:
        model: model with towers that open_clip supports.
        node: configuration that the model was built from.
    """
    of_images = ("image_mean", "image_std", "squash", "interpolation")
    arguments = {key: value for key, value in node.items() if key not in ("_target_", *of_images)}
    own = isinstance(model.text, OpenClipText | OpenClipHFText)
    if model.crop_pct != 1:
        log.warning(
            "model.crop_pct is %s, which open_clip has no setting for; its transform crops less", model.crop_pct
        )
    mean, std = (tensor.flatten().div(255).tolist() for tensor in (model.pixel_mean, model.pixel_std))
    return {
        "model_cfg": model_config(**arguments) if own else _config_of_shapes(model),
        "preprocess_cfg": {
            "mean": mean, "std": std, "interpolation": model.interpolation,
            "resize_mode": "squash" if model.squash else "shortest",
        },
    }  # fmt: skip


def _config_of_shapes(model: ImageTextModel) -> dict[str, Any]:
    """Return open_clip's model_cfg for a ViT of timm and a `TextTransformer`."""
    image, text = model.image, model.text
    if not (isinstance(image, TimmEncoder) and isinstance(text, TextTransformer)):
        kinds = f"{type(image).__name__} and {type(text).__name__}"
        raise ValueError(
            f"the model has the towers {kinds}; expected an image and a text encoder, as open_clip's models have"
        )
    blocks = image.trunk.blocks
    return {
        "embed_dim": model.embed_dim,
        "vision_cfg": {
            "image_size": image.image_size,
            "patch_size": image.patch_size[0],
            "width": image.width,
            "layers": len(blocks),
            "head_width": image.width // blocks[0].attn.num_heads,
            "mlp_ratio": blocks[0].mlp.fc1.out_features / image.width,
            "norm_kwargs": {"eps": image.trunk.norm.eps},
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.num_heads,
            "layers": text.depth,
            "mlp_ratio": text.mlp_ratio,
        },
    }


def export(loaded: Loaded, folder: Path) -> Exported:
    """Write open_clip_model.safetensors and open_clip_config.json for `open_clip.create_model("local-dir:FOLDER")`.

    Raises: ValueError if open_clip has no such architecture.
    """
    model, scalars, tokenizer = loaded.model, loaded.scalars, loaded.tokenizer
    if model.num_channels != 3:
        raise ValueError(f"the model takes images of {model.num_channels} channels; open_clip's models take 3")
    tensors = to_open_clip(model, logit_scale_of(scalars), scalars.get("logit_bias"))
    settings = open_clip_config(model, loaded.config["model"])
    # By default open_clip pools the token with the largest id as the end token: set its id if it is another.
    text = model.text
    pools_end = isinstance(text, TextTransformer) or (
        isinstance(text, OpenClipText) and text.text.pool_type == "argmax"
    )
    if pools_end and tokenizer.end_id != tokenizer.vocab_size - 1:
        settings["model_cfg"]["text_cfg"] |= {"pool_type": "eos", "eos_id": tokenizer.end_id}
    if "logit_bias" in scalars:
        settings["model_cfg"] |= {"init_logit_bias": scalars["logit_bias"]}
    tensor_files.save(tensors, folder / "open_clip_model.safetensors")
    files.write_text(folder / "open_clip_config.json", json.dumps(settings, indent=2) + "\n")
    return Exported("open_clip", _usage(model, tokenizer))


def _usage(model: ImageTextModel, tokenizer: Tokenizer) -> str:
    is_clips = isinstance(tokenizer, ClipTokenizer)
    load = '\ntokenizer = open_clip.get_tokenizer("local-dir:DIR")' if is_clips else ""
    ids = 'tokenizer(["a photo"])' if is_clips else "ids"
    notes = (
        [] if is_clips else [f"The tokenizer is not among the files: it is a {type(tokenizer).__name__} of the run."]
    )
    if model.crop_pct != 1:
        notes.append(f"In our evaluation images have a crop_pct of {model.crop_pct}; here it is 1.")
    return f"""\
```python
import open_clip
model, transform = open_clip.create_model_from_pretrained("local-dir:DIR"){load}
image = model.eval().encode_image(transform(image)[None], normalize=True)
text = model.encode_text({ids}, normalize=True)
```
{" ".join(notes)}""".rstrip()
