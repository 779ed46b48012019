"""Models of open_clip and timm as checkpoints, by a text that names the library, the model and its weights.

open_clip:ViT-B-32/laion2b_s34b_b79k    weights that open_clip publishes, by their tag
open_clip:ViT-B-32@weights.pt           a file
open_clip:local-dir:DIR                 a folder with open_clip_config.json and weights, as `export` writes it
timm:vit_base_patch16_224.augreg_in1k   weights that timm publishes
timm:resnet50@weights.safetensors       a file, such as one of MAE
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpretrain.checkpoints.loaded import Loaded, fit_tokenizer, preprocess_of
from mmpretrain.checkpoints.open_clip import from_open_clip
from mmpretrain.checkpoints.weights import published_weights, read_weights
from mmpretrain.data.tokenizer import ClipTokenizer, tokenizer_of
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.models.open_clip import open_clip_model
from mmpretrain.models.timm_model import timm_model, without_classifier

_LIBRARIES = ("open_clip", "timm")
_FOLDER = "local-dir:"
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")


def is_foreign(checkpoint: str | Path) -> bool:
    """Return True if a text names a model of another library."""
    return str(checkpoint).partition(":")[0] in _LIBRARIES


def load(checkpoint: str, device: torch.device | str = "cpu") -> Loaded:
    """Build a model of another library with its weights and its preprocessing.

    Args:
        checkpoint: `open_clip:` or `timm:` with the model and its weights, see above.
        device: device of the model.

    Raises: ValueError if the model or its weights do not exist, or do not fit each other.
    """
    library, _, text = checkpoint.partition(":")
    name, _, file = text.partition("@")
    if file and not Path(file).is_file():
        raise ValueError(f"checkpoint={checkpoint}: there is no file {file}; expected <model>@<file of weights>")
    try:
        loaded = _of_open_clip(name, file) if library == "open_clip" else _of_timm(name, file)
    except ValueError as error:
        raise ValueError(f"checkpoint={checkpoint}: {error}") from error
    model, scalars, node = loaded
    tokenizer = ClipTokenizer(77) if model.text is None else tokenizer_of(node["name"], None, model.text.context_length)
    if model.text is not None:
        fit_tokenizer(tokenizer, model.text)
    return Loaded(
        model=model.to(device).eval(),
        preprocess=preprocess_of(model),
        tokenizer=tokenizer,
        scalars=scalars,
        config={
            "model": node,
            "data": {"root": ".", "val": {}, "val_batch_size": 64, "tokenizer": {}},
            "trainer": {"precision": "fp32"},
        },
        folder=Path(checkpoint),
    )


_Parts = tuple[ImageTextModel, Mapping[str, float], dict[str, Any]]
"""A model, its `logit_scale` and `logit_bias`, and the node of its configuration."""


def _of_open_clip(name: str, file: str) -> _Parts:
    if not name.startswith(_FOLDER):
        name, _, tag = name.partition("/")
    node = {"_target_": "mmpretrain.models.open_clip.open_clip_model", "name": name}
    model = open_clip_model(name)
    if file:
        path = Path(file)
    elif name.startswith(_FOLDER):
        path = _weights_in(Path(name.removeprefix(_FOLDER)))
    elif tag:
        path = published_weights(f"{name}/{tag}")
    else:
        raise ValueError(f"no weights are named; expected open_clip:{name}@<file> or open_clip:{name}/<tag>")
    tensors = from_open_clip(model, read_weights(path))
    scalars = {key: tensors.pop(key) for key in ("logit_scale", "logit_bias") if key in tensors}
    _load(model, tensors, path)
    found = {str(key): float(value.exp() if key == "logit_scale" else value) for key, value in scalars.items()}
    return model, found, node


def _weights_in(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has no weights; expected one of {', '.join(_FILES)}")


def _of_timm(name: str, file: str) -> _Parts:
    node = {"_target_": "mmpretrain.models.timm_model.timm_model", "name": name}
    if not file:
        try:
            return timm_model(name, args={"pretrained": True}), {}, node
        except (OSError, RuntimeError) as error:  # the hub's client raises both
            raise ValueError(
                f"timm cannot fetch its weights ({str(error).splitlines()[0]}); give a file: timm:{name}@<file>"
            ) from error
    model = timm_model(name)
    trunk = model.image_encoder.trunk  # type: ignore[attr-defined]
    tensors = read_weights(Path(file))
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        tensors = convert(tensors, trunk)
    names = {f"image.trunk.{key}": tensor for key, tensor in without_classifier(trunk, tensors).items()}
    own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("image_projection.")}
    _load(model, {**names, **own}, Path(file))
    return model, {}, node


def _load(model: ImageTextModel, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load all weights of a model. Raises: ValueError if names or shapes differ."""
    own = model.state_dict()
    problems = {
        "are missing": [name for name in own if name not in tensors],
        "are left over": [name for name in tensors if name not in own],
        "have another shape": [name for name in own if name in tensors and tensors[name].shape != own[name].shape],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in problems.items() if names)
        raise ValueError(f"{path} does not fit the model: {listed}; expected the weights of the same model")
    model.load_state_dict(tensors)
