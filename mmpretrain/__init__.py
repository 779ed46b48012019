"""mmpretrain: multimodal pre-training, exact over ranks, workers and micro-batches."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Before torch loads OpenMP. Its threads wait for each other by spinning; with decoding workers or another program on
# the same cores that costs training a factor of ten, and sleeping instead costs an idle machine nothing measurable.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    import torch

    from mmpretrain.data.preprocess import Preprocess
    from mmpretrain.data.tokenizer import Tokenizer
    from mmpretrain.models.image_text import ImageTextModel


def load(
    run_or_checkpoint: "str | Path", device: "torch.device | str" = "cpu", ema: bool = False, trust: Sequence[str] = ()
) -> "tuple[ImageTextModel, Preprocess, Tokenizer]":
    """A trained model with what makes its inputs: `model, preprocess, tokenizer = mmpretrain.load(run)`.

        images = torch.stack([preprocess(file) for file in files])      # uint8 [b, c, h, w]
        x = model.embed_images(images)                                  # [b, e] of unit length
        y = model.embed_texts(*tokenizer(["a cat", "a dog"]))

    Args:
        run_or_checkpoint: a run's directory, or one of its checkpoints.
        device: where the model goes.
        ema: whether to take the weights' moving average.
        trust: what the run's configuration may name beside our own: modules, which are imported; folders; names of a hub.

    Raises: ValueError if there is no checkpoint, or its configuration names parts that are neither ours nor trusted.
    """
    from mmpretrain.checkpoints.load import load_checkpoint  # torch and all else only when it is needed

    loaded = load_checkpoint(run_or_checkpoint, device, trust, ema)
    return loaded.model, loaded.preprocess, loaded.tokenizer
