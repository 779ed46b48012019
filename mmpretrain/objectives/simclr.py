"""SimCLR (Chen et al. 2020), which SLIP combines with CLIP (Mu et al. 2022)."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mmpretrain import row_parts
from mmpretrain.errors import check_number
from mmpretrain.losses import nt_xent
from mmpretrain.models.image_text import ImageTextModel
from mmpretrain.objectives.base import Encodings


class BatchStandardization(nn.Module):
    """BatchNorm (Ioffe and Szegedy 2015, algorithm 1) with the statistics of the current batch on all ranks.

    It keeps no running statistics, since the head is not used for evaluation. It also accepts a batch of one, which torch's
    BatchNorm rejects, and returns the bias for it.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise each column of this rank's rows x [b, d] over the rows of all ranks, then scale and shift it."""
        variance, mean = row_parts.moments(x)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class SimCLR(nn.Module):
    """SimCLR: identify the other augmented view of an image among all views of the batch.

    The two views (`data.train.<stream>.views`) are separate from the image that other objectives read. The projection head
    runs inside the loss, not in the forward pass of a micro-batch: each rank runs it for its part of the batch. Its BatchNorm
    therefore sees the whole batch, for any number of processes and micro-batches.

    Args:
        model: its image encoder is trained.
        temperature: tau, the temperature of the softmax.
        hidden_width, embed_dim: hidden and output width of the projection head, an MLP of three layers
            (SLIP: 4096-4096-256).
        norm: normalisation between the layers of the head: `batch` or `layer`.
        stream: data stream of the images.
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
            nn.Linear(model.image_encoder.width, hidden_width), layer(hidden_width), nn.ReLU(),
            nn.Linear(hidden_width, hidden_width), layer(hidden_width), nn.ReLU(),
            nn.Linear(hidden_width, embed_dim),
        )  # fmt: skip

    def embed(self, encodings: Encodings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute the inputs of the loss for a micro-batch.

        Returns: (rows: first and second [b, width], the pooled states of the views, and ids int64 [b]; shared: the
            parameters of the head, by name).
        """
        (stream,) = self.streams
        # Cast to the precision of the head: the output of autocast may be narrower.
        width = next(self.head.parameters()).dtype
        first, second = (encodings.view(stream, i).pooled.to(width) for i in range(2))
        rows = {"first": first, "second": second, "ids": encodings.samples(stream).ids}
        # Multiplying by 1 makes the parameters non-leaf graph nodes, as `shared` requires.
        return rows, {name: parameter * 1 for name, parameter in self.head.named_parameters()}

    def loss(self, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
        """Compute `losses.nt_xent` over the whole batch. The head is applied to each view separately."""
        head = {name: row_parts.weight(parameter) for name, parameter in shared.items()}
        first, second = (
            row_parts.gathered(F.normalize(functional_call(self.head, head, (row_parts.own(rows[view]),)), dim=-1))
            for view in ("first", "second")
        )
        return nt_xent(first, second, self.temperature, rows["ids"], split=True)
