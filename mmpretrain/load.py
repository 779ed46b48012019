"""A trained model from a run's directory or one of its checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmpretrain import checkpoint, config
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.image_text import ImageTextModel

_TRUSTED = ("mmpretrain.models.", "mmpretrain.data.")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model with what stands around it."""

    model: ImageTextModel
    tokenizer: Tokenizer
    image_size: int
    logit_scale: float | None
    config: Mapping[str, Any]
    path: Path
    state: Mapping[str, Any]


def find(run_or_checkpoint: str | Path) -> tuple[Path, Path]:
    """(the run's directory, the checkpoint) of either. Raises: ValueError if there is none."""
    path = Path(run_or_checkpoint)
    if (path / "manifest.json").is_file():
        checkpoint.verify(path)
        return path.parent.parent, path
    newest = checkpoint.find_latest(path / "checkpoints")
    if newest is None:
        raise ValueError(
            f"{path} holds no checkpoint; expected a run's directory, or a step_* folder in its checkpoints"
        )
    return path, newest


def _check_trusted(node: Any, path: str) -> None:
    """A configuration that came with a checkpoint may name our own parts only. Raises: ValueError."""
    if isinstance(node, dict):
        target = str(node.get("_target_", _TRUSTED[0]))
        if not target.startswith(_TRUSTED):
            raise ValueError(
                f"{path}._target_ is {target!r}, which came with the checkpoint and is no part of mmpretrain; "
                "it would run code that you may not know: build that model yourself and load its model.safetensors"
            )
        for key, value in node.items():
            _check_trusted(value, f"{path}.{key}")


def load_checkpoint(run_or_checkpoint: str | Path, device: torch.device | str = "cpu") -> Loaded:
    """Build a checkpoint's model and fill in its weights; objectives and what only they use stay out.

    Raises: ValueError if there is no checkpoint or its configuration names parts that are not ours.
    """
    folder, path = find(run_or_checkpoint)
    saved = config.from_yaml((folder / "config.yaml").read_text())
    for part in (saved["model"], saved["data"]["tokenizer"]):
        _check_trusted(part, "config.yaml")
    model = config.instantiate(saved["model"], 0, "model")
    tensors = checkpoint.load_tensors(path, "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    scales = [value for name, value in tensors.items() if name.endswith(".logit_scale")]
    tokenizer = config.instantiate(saved["data"]["tokenizer"], 0, "data.tokenizer")
    return Loaded(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        image_size=model.image.image_size,
        logit_scale=float(scales[0].exp()) if scales else None,
        config=saved,
        path=path,
        state=checkpoint.load_state(path),
    )
