"""Computation of a whole batch's rows in equal parts, each on one rank, for layers inside of a coupled loss.

Each rank computes the layers for its part of the rows, and gathers the results. The loss of the gathered rows is complete on
every rank, so its gradients are, too. The gradients of the part's inputs are complete for the rank's own rows, as those of
split losses are (`mmpretrain.losses`).
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpretrain import distributed


def own(rows: Tensor) -> Tensor:
    """Return this rank's part of the rows [B, ...] of all ranks, [B / world, ...]; B is a multiple of the ranks."""
    return rows.chunk(distributed.world_size())[distributed.rank()]


def gathered(rows: Tensor) -> Tensor:
    """Concatenate the parts [B / world, ...] of all ranks, with gradients that are complete on every rank. A collective."""
    return cast(Tensor, _Gathered.apply(rows)) if distributed.world_size() > 1 else rows


def weight(parameter: Tensor) -> Tensor:
    """Return a parameter for the layers of a part.

    Each rank has the gradient of its part alone. It is multiplied by the number of ranks, since the gradients of a coupled
    loss with respect to `shared` tensors are averaged over ranks.
    """
    return cast(Tensor, _Weight.apply(parameter)) if distributed.world_size() > 1 else parameter


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the variance (of n, not n - 1) and the mean of each column over the parts [B / world, d] of all ranks, [d].

    A collective, as is its backward pass.
    """
    if distributed.world_size() == 1:
        return torch.var_mean(rows, dim=0, unbiased=False)
    return cast(tuple[Tensor, Tensor], _Moments.apply(rows))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return distributed.gather_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> Tensor:
        return own(d_rows)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_parameter: Tensor) -> Tensor:
        return d_parameter * distributed.world_size()


class _Moments(torch.autograd.Function):
    """Moments of x over all ranks, and their gradient: d x = d mean / n + 2 (x - mean) d variance / n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        count = len(x) * distributed.world_size()
        mean = distributed.all_reduce_sum(x.sum(dim=0)) / count
        variance = distributed.all_reduce_sum((x - mean).square().sum(dim=0)) / count
        ctx.save_for_backward(x, mean)
        ctx.count = count
        return variance, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_variance: Tensor, d_mean: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        # Each rank has the gradients of its own rows' loss with respect to the moments, which all rows share.
        both = distributed.all_reduce_sum(torch.stack([d_mean, d_variance]))
        return (both[0] + 2 * (x - mean) * both[1]) / ctx.count
