"""mmpretrain: multimodal pre-training that is exact over ranks, workers and micro-batches."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Must be set before torch loads OpenMP. By default its threads spin while they wait for each other. With decoding workers
# or another program on the same cores this slows training down tenfold. Sleeping has no measurable cost on an idle machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    import torch

    from mmpretrain.data.preprocess import Preprocess
    from mmpretrain.data.tokenizer import Tokenizer
    from mmpretrain.models.image_text import ImageTextModel


def load(
    run_or_checkpoint: "str | Path", device: "torch.device | str" = "cpu", ema: bool = False, trust: Sequence[str] = ()
) -> "tuple[ImageTextModel, Preprocess | None, Tokenizer]":
    """Load a trained model with its image preprocessing and tokenizer.

        model, preprocess, tokenizer = mmpretrain.load(run)
        images = torch.stack([preprocess(file) for file in files])      # uint8 [b, c, h, w]
        x = model.embed_images(images)                                  # [b, e] of unit length
        y = model.embed_texts(*tokenizer(["a cat", "a dog"]))

    Args:
        run_or_checkpoint: directory of a run, or one of its checkpoints.
        device: device of the model.
        ema: load the moving average of the weights.
        trust: names that the run's configuration may contain besides those of mmpretrain: modules, which are imported;
            folders; names on a hub.

    Returns: (model, preprocessing, tokenizer). The preprocessing is None if the model has no image encoder.
    Raises: ValueError if there is no checkpoint, or its configuration names parts that are neither mmpretrain's nor trusted.
    """
    from mmpretrain.checkpoints.load import load_checkpoint  # imports torch, and is therefore deferred

    loaded = load_checkpoint(run_or_checkpoint, device, trust, ema)
    return loaded.model, loaded.preprocess, loaded.tokenizer
