"""A trained model with what is needed to use it, whichever library trained it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmpretrain.checkpoints import untrusted
from mmpretrain.config import instantiate
from mmpretrain.data.decode import MAX_IMAGE_BYTES
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.encoders import TextEncoder
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Objective


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model, preprocessing, tokenizer, configuration and state."""

    model: ImageTextModel
    preprocess: Preprocess | None
    """Preprocessing of images; None if the model has no image encoder."""
    tokenizer: Tokenizer
    scalars: Mapping[str, float]
    """`logit_scale` (not its logarithm) and `logit_bias` of the first objective that learns them."""
    config: Mapping[str, Any]
    """Unresolved content of the run's config.yaml; use `setting` to read a checked value."""
    folder: Path
    """The run's directory; for weights of another library, the text that named them."""
    num_samples: int = 0
    """Number of samples seen in training; 0 if unknown."""
    checkpoint: Path | None = None
    """The checkpoint's folder; None for weights of another library."""
    manifest: str = ""
    """SHA-256 of the checkpoint's manifest.json, which has those of all of its files."""
    build_objectives: Callable[[], Mapping[str, Objective]] = dict
    """Function that builds `objectives`; the default is that of a model of another library, which has none."""

    @cached_property
    def objectives(self) -> Mapping[str, Objective]:
        """Objectives of the run with their weights, by name, in evaluation mode on the model's device. Built on first use.

        Raises: ValueError if the configuration names other parts than mmpretrain's and trusted ones, or an objective does not
            fit its weights.
        """
        return self.build_objectives()

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the pixels' mean and standard deviation, and the model's configuration, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(self.config["model"], sort_keys=True, default=str).encode())
        for name, tensor in (self.model.state_dict() | dict(self.model.named_buffers())).items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def setting(self, key: str, annotation: Any) -> Any:
        """Return a value of the run's configuration by its full name. Raises: ValueError if it does not have that type."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return checked(value, key, annotation)


def checked(value: Any, key: str, annotation: Any) -> Any:
    """Return a value of a run's configuration. Raises: ValueError if it has another type or an interpolation."""
    for path, leaf in untrusted.leaves(value, key):
        untrusted.check_text(leaf, f"config.yaml: {path}")
    if not instantiate.accepts(value, annotation):
        raise ValueError(
            f"config.yaml: {key} is {value!r}; expected {instantiate.expected_type(annotation)}, as the run wrote it"
        )
    return value


def preprocess_of(model: ImageTextModel, max_image_bytes: int = MAX_IMAGE_BYTES) -> Preprocess | None:
    """Return the preprocessing of a model's images in evaluation; None if it has no image encoder."""
    if model.image is None:
        return None
    return Preprocess(
        model.image.image_size, model.num_channels, model.squash, max_image_bytes, model.interpolation, model.crop_pct
    )


def fit_tokenizer(tokenizer: Tokenizer, text: TextEncoder) -> None:
    """Check that a text encoder accepts a tokenizer's ids, and set its padding id if it adopts the tokenizer's.

    Raises: ValueError if context length, vocabulary size or special ids do not fit.
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
            continue  # a tokenizer without padding: the encoder uses its own
        if wanted is not None and given != wanted:
            raise ValueError(
                f"the text encoder's {key} is {wanted}, and the tokenizer's is {given}; expected the same: "
                f"model.text.{key}={given}, or another data.tokenizer"
            )
