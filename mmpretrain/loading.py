"""A trained model from a run's directory or one of its checkpoints."""

import importlib
import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmpretrain import checkpoint, config, targets
from mmpretrain.data.decode import MAX_IMAGE_BYTES
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.image_text import ImageTextModel, TextEncoder

_TRUSTED = ("mmpretrain.models", "mmpretrain.data")
TOKENIZER_FOLDER = "tokenizer"  # in a run's directory: the files of a local tokenizer
"""Where a run keeps the local tokenizer that it was trained with."""
_TIMM_WEIGHTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model with what stands around it."""

    model: ImageTextModel
    preprocess: Preprocess
    tokenizer: Tokenizer
    scalars: Mapping[str, float]
    """`logit_scale` and `logit_bias` as the loss sees them, of the first objective that learns them."""
    config: Mapping[str, Any]
    path: Path
    state: Mapping[str, Any]


def find(run_or_checkpoint: str | Path) -> tuple[Path, Path]:
    """(the run's directory, the checkpoint) of either. Raises: ValueError if there is none."""
    path = Path(run_or_checkpoint)
    if path.is_file() and path.name in ("best", "latest"):
        path = path.with_name(path.read_text().strip())
    if (path / "manifest.json").is_file():
        checkpoint.verify(path)
        return path.absolute().parent.parent, path
    newest = checkpoint.find_latest(path / "checkpoints")
    if newest is None:
        raise ValueError(
            f"{path} holds no checkpoint; expected a run's directory, or a step_* folder in its checkpoints"
        )
    return path, newest


def _is_trusted(target: str, trust: Sequence[str]) -> bool:
    """Whether a dotted name makes a part of ours: a class of a trusted module, or a function that says it returns one.

    What such a module merely imports (`os.system`) does not, nor does any other function of it.
    """
    module, _, name = target.rpartition(".")
    if not any(module == known or module.startswith(f"{known}.") for known in (*_TRUSTED, *trust)):
        return False
    try:
        part = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    if getattr(part, "__module__", None) != module:
        return False
    made = typing.get_type_hints(part).get("return") if inspect.isfunction(part) else part
    return made in (ImageTextModel, Tokenizer) or (made is part and isinstance(part, type))


def _without_weights(node: Any) -> Any:
    """A model's node without what would make timm fetch weights: they are in the checkpoint."""
    if not isinstance(node, dict):
        return node
    return {key: _without_weights(value) for key, value in node.items() if key not in _TIMM_WEIGHTS}


def _check_trusted(node: Any, path: str, trust: Sequence[str]) -> None:
    """A configuration that came with a checkpoint may name our own parts and trusted ones only. Raises: ValueError."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and not _is_trusted(str(target), trust):
            raise ValueError(
                f"{path}._target_ is {target!r}, which came with the checkpoint and is no part of mmpretrain; "
                f"if you know that code, name its module: trust=[{str(target).rpartition('.')[0]}]"
            )
        for key, value in node.items():
            _check_trusted(value, f"{path}.{key}", trust)


def _with_own_files(tokenizer: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A tokenizer's node that reads the files that the run has kept, not those it was made from."""
    kept = folder / TOKENIZER_FOLDER
    return {**tokenizer, "path": str(kept)} if tokenizer.get("path") and kept.is_dir() else dict(tokenizer)


def preprocess_of(model: ImageTextModel, max_image_bytes: int = MAX_IMAGE_BYTES) -> Preprocess:
    """What evaluation does to a model's images."""
    return Preprocess(model.image.image_size, model.num_channels, model.squash, max_image_bytes)


def fit_tokenizer(tokenizer: Tokenizer, text: TextEncoder) -> None:
    """Check that a text encoder can take a tokenizer's ids, and let it know which of them is padding.

    Raises: ValueError if it cannot.
    """
    if text.adopts_padding and tokenizer.pad_id is not None:
        text.pad_id = tokenizer.pad_id
    if tokenizer.context_length > text.context_length:
        raise ValueError(
            f"data.tokenizer.context_length is {tokenizer.context_length}; expected at most model.text.context_length = "
            f"{text.context_length}: leave it out, or make the encoder's larger"
        )
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"model.text.vocab_size is {text.vocab_size}; expected at least the tokenizer's {tokenizer.vocab_size}: set it so"
        )
    for key, wanted, given in (
        ("pad_id", text.pad_id, tokenizer.pad_id),
        ("eos_id", text.end_id, tokenizer.end_id),
    ):
        if key == "pad_id" and given is None and text.adopts_padding:
            continue  # a tokenizer without padding leaves it to the encoder
        if wanted is not None and given != wanted:
            raise ValueError(
                f"the text encoder's {key} is {wanted}, and the tokenizer's is {given}; expected the same: "
                f"model.text.{key}={given}, or another data.tokenizer"
            )


def load_checkpoint(
    run_or_checkpoint: str | Path,
    device: torch.device | str = "cpu",
    trust: Sequence[str] = (),
    ema: bool = False,
) -> Loaded:
    """Build a checkpoint's model and fill in its weights; objectives and what only they use stay out.

    Args:
        run_or_checkpoint: a run's directory, or one of its checkpoints.
        device: where the model goes.
        trust: modules beside our own whose classes the checkpoint's configuration may name; they are imported.
        ema: whether to take the weights' moving average.

    Raises: ValueError if there is no checkpoint, it has no average, or its configuration names other parts.
    """
    folder, path = find(run_or_checkpoint)
    source = folder / "config.yaml"
    saved = config.from_yaml(source.read_text(), str(source))
    if lacking := sorted({"model", "objective", "data"} - saved.keys()):
        raise ValueError(f"{source} has no {lacking[0]!r}; expected the file as the run wrote it")
    for part in (saved["model"], saved["data"]["tokenizer"]):
        _check_trusted(part, "config.yaml", trust)
    model = targets.instantiate(_without_weights(saved["model"]), 0, "model")
    if ema and not (path / "ema.safetensors").is_file():
        raise ValueError(f"{path} has no averaged weights; expected a run with trainer.ema_decay, or leave out ema")
    tensors = checkpoint.load_tensors(path, "ema.safetensors" if ema else "model.safetensors")
    try:
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of the model in {source}: {error}") from error
    # Of several, the first objective's, as in training.
    scalars = {
        scalar: float(tensors[name].exp() if scalar == "logit_scale" else tensors[name])
        for scalar in ("logit_scale", "logit_bias")
        for name in [f"objectives.{objective}.{scalar}" for objective in reversed(saved["objective"])]
        if name in tensors
    }
    tokenizer = targets.instantiate(_with_own_files(saved["data"]["tokenizer"], folder), 0, "data.tokenizer")
    if model.text is not None:
        fit_tokenizer(tokenizer, model.text)
    return Loaded(
        model=model.to(device).eval(),
        preprocess=preprocess_of(model),
        tokenizer=tokenizer,
        scalars=scalars,
        config=saved,
        path=path,
        state=checkpoint.load_state(path),
    )
