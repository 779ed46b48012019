"""Image models of timm by name, with the preprocessing that timm evaluates them with."""

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import timm.data
from torch import nn

from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.vit import TimmEncoder


def timm_model(
    name: str, image_size: int | None = None, args: Mapping[str, Any] | None = None, embed_dim: int | None = None
) -> ImageTextModel:
    """Build an image model of timm without text encoder; `args={pretrained: true}` loads timm's weights.

    Mean, standard deviation, interpolation and crop are those of timm's evaluation of the model.

    Args:
        name: name of the model in timm, with or without the tag of its weights.
        image_size: side of the images in pixels; None: the model's own.
        args: further arguments of the model, as in `TimmEncoder`.
        embed_dim: see `ImageTextModel`; None: the encoder's width.

    Raises: ValueError if timm does not know the name or rejects an argument, or the model's images are not square or padded.
    """
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models())) or "those of timm.list_models()"
        raise ValueError(f"model.name is {name!r}; expected a model of timm, such as {near}")
    config = _evaluation_config(name)
    encoder = TimmEncoder(name, image_size or config["input_size"][-1], args)
    return ImageTextModel(
        image=encoder,
        text=None,
        embed_dim=embed_dim or encoder.width,
        image_mean=config["mean"],
        image_std=config["std"],
        squash=config["crop_mode"] == "squash",
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
        crop_pct=config["crop_pct"],
    )


def _evaluation_config(name: str) -> dict[str, Any]:
    """Return timm's preprocessing of a model, by its name alone. Raises: ValueError if it cannot be expressed here."""
    published = timm.get_pretrained_cfg(name)
    given = {"input_size": (3, 224, 224)} if published is None else published.to_dict()
    config: dict[str, Any] = timm.data.resolve_data_config(pretrained_cfg=given)
    if config["crop_mode"] == "border" or config["input_size"][-2] != config["input_size"][-1]:
        raise ValueError(
            f"model.name={name} has images of {list(config['input_size'])} and crop_mode {config['crop_mode']}; expected "
            "square images without a border: build it with model.image of mmpretrain.models.vit.TimmEncoder"
        )
    return config


def without_classifier(trunk: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a file of timm's weights without those of the classifier."""
    config: Mapping[str, Any] = getattr(trunk, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return {name: tensor for name, tensor in tensors.items() if not prefixes or not name.startswith(prefixes)}
