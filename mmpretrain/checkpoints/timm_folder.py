"""Export of the image tower to a folder of timm: timm.create_model("local-dir:DIR", pretrained=True)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from mmpretrain import files
from mmpretrain.checkpoints import tensor_files
from mmpretrain.checkpoints.exported import Exported
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.vit import TimmEncoder

_OF_WEIGHTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def export(loaded: Loaded, folder: Path) -> Exported:
    """Write config.json and model.safetensors of the image tower, without projection.

    Raises: ValueError if there is no image tower, it is no model of timm, or timm does not build it from its name and
        arguments.
    """
    model, image = loaded.model, loaded.model.image
    if not isinstance(image, TimmEncoder):
        tower = "null" if image is None else f"a {type(image).__name__}"
        raise ValueError(f"model.image is {tower}; expected a model of timm (mmpretrain.models.vit.TimmEncoder)")
    trunk = image.trunk
    name = trunk.pretrained_cfg["architecture"]
    args = _arguments(name, image)
    config = {
        "architecture": name,
        "num_classes": trunk.num_classes,
        "num_features": image.width,
        **({"global_pool": trunk.global_pool} if hasattr(trunk, "global_pool") else {}),
        "model_args": args,
        "pretrained_cfg": _pretrained_config(model, trunk),
    }
    files.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    tensor_files.save(trunk.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    left_out = ", of this model also its text tower and the projections to the shared space" if model.text else ""
    value = "its projection of the pooled states" if trunk.num_classes else "the pooled states"
    return Exported(
        "timm",
        f"""\
```python
import timm
model = timm.create_model("local-dir:DIR", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image)[None])    # {value}, [1, {trunk.num_classes or image.width}]
```
Left out are objectives' heads{left_out}.""",
    )


def _arguments(name: str, image: TimmEncoder) -> dict[str, Any]:
    """Return the arguments from which timm builds the same model. Raises: ValueError if there are none."""
    args = {key: value for key, value in image.args.items() if key not in _OF_WEIGHTS}
    expected = _shapes(image.trunk)
    for candidate in ({**args, "img_size": image.image_size}, args):
        try:
            with torch.device("meta"):
                built = timm.create_model(name, num_classes=image.trunk.num_classes, **candidate)
        except TypeError:  # models without an argument img_size
            continue
        if _shapes(built) == expected:
            return candidate
    raise ValueError(
        f"model.image cannot be built by timm from its name {name} and {args}; expected the same parameters"
    )


def _shapes(trunk: nn.Module) -> tuple[Any, Mapping[str, torch.Size]]:
    pooling = getattr(trunk, "global_pool", None)
    return pooling, {name: tensor.shape for name, tensor in trunk.state_dict().items()}


def _pretrained_config(model: ImageTextModel, trunk: Any) -> dict[str, Any]:
    mean, std = (tensor.flatten().div(255).tolist() for tensor in (model.pixel_mean, model.pixel_std))
    size = model.image_encoder.image_size
    of_layers = {key: trunk.pretrained_cfg.get(key) for key in ("first_conv", "classifier")}
    return {
        "num_classes": trunk.num_classes,
        "input_size": [model.num_channels, size, size],
        "interpolation": model.interpolation,
        "crop_pct": model.crop_pct,
        "crop_mode": "squash" if model.squash else "center",
        "mean": mean,
        "std": std,
        **{key: value for key, value in of_layers.items() if value is not None},
    }
