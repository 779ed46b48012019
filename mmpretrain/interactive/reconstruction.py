"""Reconstruction of single images by a masked autoencoder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpretrain.batch import Batch, Samples
from mmpretrain.evals.base import Context
from mmpretrain.objectives.mae import MAE
from mmpretrain.training.task import Encodings


@torch.no_grad()
def reconstructions(image: Tensor, seeds: Sequence[int], objective: MAE, context: Context) -> list[Sequence[Tensor]]:
    """Reconstruct an image from random subsets of its patches.

    Args:
        image: the image as preprocessed, uint8 [c, h, w].
        seeds: seed of each subset.
        objective: the objective with its decoder. Its mask ratio is that of the start of training if it is a schedule.
        context: the model.

    Returns: for each seed the image, its visible patches, and these with the predicted ones, uint8 [c, h, w] each.
    """
    (stream,) = objective.streams
    numbers = torch.arange(len(seeds))
    samples = Samples(
        positions=numbers, ids=numbers, seeds=torch.tensor(seeds), images=image.expand(len(seeds), *image.shape)
    )
    batch = Batch({stream: samples}).to(context.model.device)
    with context.autocast:
        examples = objective.examples(Encodings(context.model, batch), lambda ids: "")
    return [example.images for example in examples]
