"""Towers as programs of torch.export, which need none of this package's code, and the description of what they take."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmpretrain import files
from mmpretrain.checkpoints.hugging_face.inputs import preprocessor_config, write_tokenizer
from mmpretrain.checkpoints.loaded import Loaded
from mmpretrain.models.image_text import ImageTextModel

INPUTS = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}
"""Names of the inputs of each tower."""


class _Images(nn.Module):
    """Embed normalised images float32 [b, c, h, w] as unit vectors [b, e]."""

    def __init__(self, model: ImageTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.embed_pooled_images(self.model.image_encoder(pixel_values).pooled)


class _Texts(nn.Module):
    """Embed texts padded on the right, int64 [b, L] with a mask of their tokens, as unit vectors [b, e]."""

    def __init__(self, model: ImageTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.embed_texts(input_ids, attention_mask.sum(dim=1))


def programs_of(model: ImageTextModel) -> dict[str, ExportedProgram]:
    """Return a program for each tower, `image` and `text`, for any batch size, on the CPU.

    Raises: ValueError if torch.export cannot trace a tower.
    """
    towers: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}
    # A batch of one would be fixed.
    if model.image is not None:
        size = model.image.image_size
        towers["image"] = _Images(model), {"pixel_values": torch.zeros(2, model.num_channels, size, size)}
    if model.text is not None:
        ids = torch.zeros(2, model.text.context_length, dtype=torch.int64)
        towers["text"] = _Texts(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: _traced(name, *tower) for name, tower in towers.items()}


def _traced(name: str, tower: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    batch = Dim("batch")
    try:
        with torch.no_grad():
            return torch.export.export(
                tower.eval(), (), dict(inputs), dynamic_shapes={key: {0: batch} for key in inputs}
            )
    except Exception as error:  # errors of any kind in a module's code
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"torch.export cannot trace model.{name}: {reason}") from error


def describe(loaded: Loaded, folder: Path, suffix: str) -> str:
    """Write export.json and, where `transformers` can read them, preprocessor_config.json and the tokenizer's files.

    Args:
        loaded: model whose towers lie in the folder.
        folder: folder of the files.
        suffix: suffix of the towers' files.

    Returns: what the towers take and return, in Markdown.
    """
    model = loaded.model
    towers: dict[str, Any] = {}
    lines = []
    if model.image is not None:
        size = model.image.image_size
        mean, std = (tensor.flatten().div(255).tolist() for tensor in (model.pixel_mean, model.pixel_std))
        shape = ["b", model.num_channels, size, size]
        towers["image"] = {
            "file": f"image.{suffix}", "inputs": {"pixel_values": {"dtype": "float32", "shape": shape}},
            "embed_dim": model.image_embed_dim, "mean": mean, "std": std, "squash": model.squash,
            "interpolation": model.interpolation, "resize": int(size / model.crop_pct), "crop": size,
        }  # fmt: skip
        lines.append(
            f"- `image.{suffix}` takes `pixel_values`, float32 [b, {model.num_channels}, {size}, {size}]: pixels in [0, 1] "
            "minus the mean, divided by the standard deviation, as the transforms of open_clip, timm and transformers "
            "return them."
        )
        with suppress(ValueError):  # grey images, for which transformers has no processor
            settings = preprocessor_config(model)
            files.write_text(folder / "preprocessor_config.json", json.dumps(settings, indent=2) + "\n")
    if model.text is not None:
        length = model.text.context_length
        shape = ["b", length]
        towers["text"] = {
            "file": f"text.{suffix}",
            "inputs": {key: {"dtype": "int64", "shape": shape} for key in INPUTS["text"]},
            "embed_dim": model.text_embed_dim, "pad_id": loaded.tokenizer.pad_id or 0,
        }  # fmt: skip
        lines.append(
            f"- `text.{suffix}` takes `input_ids` and `attention_mask`, int64 [b, {length}]: token ids padded on the right, "
            "and 1 for each token, 0 for padding."
        )
        try:
            cleaning = write_tokenizer(loaded.tokenizer, folder)
            lines.append(cleaning and f"- The tokenizer lies beside it. {cleaning}")
        except ValueError:
            lines.append(
                f"- The tokenizer is not among the files: it is a {type(loaded.tokenizer).__name__} of the run."
            )
    lines.append(
        "- Both return embeddings of unit length, float32 [b, e]; their products times the scale are the logits, plus the "
        "bias if there is one (export.json)."
        if model.image is not None and model.text is not None
        else "- It returns embeddings of unit length, float32 [b, e]."
    )
    described = {"towers": towers, **loaded.scalars}
    files.write_text(folder / "export.json", json.dumps(described, indent=2) + "\n")
    return "\n".join(line for line in lines if line)
