"""SimCLR (Chen et al. 2020) beside CLIP, as SLIP has it (Mu et al. 2022)."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mmpretrain.errors import check_number
from mmpretrain.losses import nt_xent
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Encodings


class BatchStandardization(nn.Module):
    """BatchNorm (Ioffe and Szegedy 2015, algorithm 1) of the batch at hand: the head is never used for evaluation, so
    that no running means are kept, and a batch of one, which torch refuses, gives the shift."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[b, d] -> [b, d]."""
        variance, mean = torch.var_mean(x, dim=0, unbiased=False)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class SimCLR(nn.Module):
    """Two augmented views of an image find each other among all views of the batch.

    The views are the stream's own (`data.train.<stream>.views`), beside the image that other objectives see. The
    projection head is a part of the loss, not of the model's pass: its BatchNorm then sees the whole batch, on any
    number of processes and micro-batches.

    Args:
        model: its image encoder is trained.
        temperature: tau.
        hidden_width, embed_dim: of the projection head, an MLP of three layers (SLIP: 4096-4096-256).
        norm: between its layers.
        stream: where the images come from.
    """

    num_views = 2

    def __init__(
        self,
        model: ImageTextModel,
        temperature: float = 0.1,
        hidden_width: int = 4096,
        embed_dim: int = 256,
        norm: Literal["batch", "layer"] = "batch",
        stream: str = "pairs",
        config_path: str = "objective.simclr",
    ) -> None:
        super().__init__()
        check_number(f"{config_path}.temperature", temperature, above=0)
        check_number(f"{config_path}.hidden_width", hidden_width, at_least=1)
        check_number(f"{config_path}.embed_dim", embed_dim, at_least=1)
        self.streams = (stream,)
        self.temperature = temperature

        layer = BatchStandardization if norm == "batch" else nn.LayerNorm
        self.head = nn.Sequential(
            nn.Linear(model.image.width, hidden_width), layer(hidden_width), nn.ReLU(),
            nn.Linear(hidden_width, hidden_width), layer(hidden_width), nn.ReLU(),
            nn.Linear(hidden_width, embed_dim),
        )  # fmt: skip

    def embed(self, encodings: Encodings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows: first and second [b, width], the views' pooled states, and ids int64 [b]; shared: the head's weights."""
        (stream,) = self.streams
        # In the head's precision: what comes out of autocast is narrower.
        width = next(self.head.parameters()).dtype
        first, second = (encodings.view(stream, i).pooled.to(width) for i in range(2))
        rows = {"first": first, "second": second, "ids": encodings.samples(stream).ids}
        # A product with one makes them nodes of the graph, as what is shared has to be.
        return rows, {name: parameter * 1 for name, parameter in self.head.named_parameters()}

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """`losses.nt_xent` over the whole batch, of both views through the head, one after the other."""
        first, second = (
            F.normalize(functional_call(self.head, dict(shared), (rows[view],)), dim=-1) for view in ("first", "second")
        )
        return nt_xent(first, second, self.temperature, rows["ids"])
