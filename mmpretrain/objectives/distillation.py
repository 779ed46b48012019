"""Distillation to the initial weights, so that a run that goes on with other data forgets less."""

import copy

import torch
from torch import Tensor, nn

from mmpretrain.batch import Batch
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Encodings


class Distillation(nn.Module):
    """Keep the embeddings near those of the weights that the run began with, such as those of `init_from`.

    L = 1/B sum_i (|x_i - x*_i|^2 + |y_i - y*_i|^2)

    It is the feature distillation of CLIP-KD (Yang et al. 2024, arXiv:2307.12732, section 3.2), with the frozen initial
    model as teacher, as in learning without forgetting (Li and Hoiem 2017, arXiv:1606.09282). x_i and y_i are the image and
    text embeddings of pair i, of unit length, and x*_i and y*_i those of the teacher. The pairs need not match.

    Args:
        model: model with both encoders; the teacher is a copy of it.
        stream: data stream of the images and texts, such as old data or new ones.

    Raises: ValueError if the model lacks an encoder.
    """

    def __init__(
        self, model: ImageTextModel, stream: str = "pairs", config_path: str = "objective.distillation"
    ) -> None:
        super().__init__()
        if model.image is None or model.text is None:
            raise ValueError(f"{config_path} needs a model with an image and a text encoder; leave it out for this one")
        self.streams = (stream,)
        self.teacher = copy.deepcopy(model).requires_grad_(False)

    def after_init(self, model: ImageTextModel) -> None:
        """Copy the initial weights to the teacher."""
        self.teacher.load_state_dict(model.state_dict())

    def train(self, mode: bool = True) -> "Distillation":
        """Set the training mode, except for the teacher: its dropout stays off, and its statistics stay as they are."""
        super().train(mode)
        self.teacher.eval()
        return self

    def count(self, batch: Batch) -> Tensor:
        """Return the number of pairs of a micro-batch."""
        return torch.tensor(len(batch.streams[self.streams[0]]))

    def loss(self, encodings: Encodings) -> Tensor:
        """Return the sum of the squared distances of a micro-batch's embeddings to the teacher's."""
        (stream,) = self.streams
        packing = encodings.samples(stream).packing
        image = encodings.image_embedding(stream) - self.teacher.embed_images(encodings.batch.images(stream))
        text = encodings.text_embedding(stream) - self.teacher.embed_texts(*encodings.batch.texts(stream), packing)
        return image.square().sum() + text.square().sum()
