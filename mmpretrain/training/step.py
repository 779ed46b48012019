"""Gradients of one global batch, independent of the number of ranks and micro-batches.

A coupled loss needs every row of the batch. The rows are gathered without gradients, and every rank computes the loss
and its gradient with respect to all rows. The wrapped forward then returns <rows, d rows>, whose gradient with respect
to the parameters equals that of the loss (gradient caching, Gao et al. 2021). With one micro-batch this happens inside
its forward pass; with several, a first pass without gradients collects the rows. Masks and dropout are functions of the
samples' seeds (`randomness.py`), so that both passes compute the same values.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mmpretrain import distributed
from mmpretrain.batch import Batch
from mmpretrain.objectives.base import check_loss
from mmpretrain.seeds import hash64
from mmpretrain.training.task import Task

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class StepLosses:
    """Losses of a step on the device: coupled ones over the whole batch, independent ones as sums over this rank's part."""

    coupled: Tensors
    """Loss of each coupled objective, a scalar that is the same on every rank."""
    sums: dict[str, Tensors]
    """This rank's sums for each independent objective: `loss` and the objective's further values."""
    counts: Tensors
    """Number of terms in the whole batch, by independent objective."""
    shared: dict[str, Tensors]
    """Shared tensors of each coupled objective, such as its logit_scale."""

    def reduced(self) -> dict[str, Tensors]:
        """Return each objective's `loss` and further means over the whole batch. A collective, for logged steps only."""
        means = {
            name: {key: distributed.all_reduce_sum(total.double()) / self.counts[name] for key, total in sums.items()}
            for name, sums in self.sums.items()
        }
        return {**{name: {"loss": loss} for name, loss in self.coupled.items()}, **means}


class _Coupling:
    """Coupled losses of one step: collect the rows, compute each loss once and return gradients by micro-batch."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task = task
        self._seed = seed
        self.rows: dict[str, list[Tensors]] = defaultdict(list)
        self.losses: Tensors = {}
        self.shared: dict[str, Tensors] = {}
        self._gradients: dict[str, tuple[list[Tensors], Tensors]] = {}
        self._given: dict[str, int] = defaultdict(int)

    def collect(self, name: str, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
        """Store a micro-batch's rows in the first pass, and return zero gradients."""
        self.rows[name].append({key: row.detach() for key, row in rows.items()})
        self.shared[name] = {key: value.detach() for key, value in shared.items()}
        return _zeros(rows), _zeros(shared)

    def differentiate(self) -> None:
        """Compute every coupled loss and its gradients after the first pass, when no activations are stored."""
        for name in list(self.rows):
            self._gradients[name] = self._differentiate(name)

    def couple(self, name: str, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
        """Return d loss / d rows of this micro-batch in the pass with gradients, and d loss / d shared on the last one."""
        if name not in self._gradients:  # one micro-batch: it has all rows of this rank
            self.collect(name, rows, shared)
            self._gradients[name] = self._differentiate(name)
        d_rows, d_shared = self._gradients[name]
        self._given[name] += 1
        is_last = self._given[name] == len(d_rows)
        return d_rows[self._given[name] - 1], d_shared if is_last else _zeros(shared)

    def _differentiate(self, name: str) -> tuple[list[Tensors], Tensors]:
        micro_batches = self.rows.pop(name)
        sizes = [len(next(iter(rows.values()))) for rows in micro_batches]
        local = {key: torch.cat([rows[key] for rows in micro_batches]) for key in micro_batches[0]}
        leaves = {key: distributed.gather_rows(rows) for key, rows in local.items()}
        scalars = {key: value.clone().requires_grad_() for key, value in self.shared[name].items()}
        differentiable = [key for key, rows in leaves.items() if rows.is_floating_point()]
        device_type = next(iter(local.values())).device.type
        with torch.enable_grad(), torch.autocast(device_type, enabled=False):
            for key in differentiable:
                leaves[key].requires_grad_()
            torch.manual_seed(self._seed)  # each rank computes the loss of the whole batch with the same random numbers
            loss = self._task.coupled(name).loss(leaves, scalars)
            check_loss(loss, f"objective.{name}")
            inputs = [leaves[key] for key in differentiable] + list(scalars.values())
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        self.losses[name] = loss.detach()
        world, mine = distributed.world_size(), distributed.rank()
        d_local = [gradient.chunk(world)[mine].split(sizes) for gradient in gradients[: len(differentiable)]]
        d_rows = [dict(zip(differentiable, part, strict=True)) for part in zip(*d_local, strict=True)]
        # Every rank has the full d loss / d shared. Divide it, since gradients are summed over ranks.
        d_shared = {
            key: gradient / world for key, gradient in zip(scalars, gradients[len(differentiable) :], strict=True)
        }
        return d_rows, d_shared


@contextmanager
def _no_sync(wrapped: nn.Module) -> Iterator[None]:
    """Let DDP or FSDP2 keep gradients instead of reducing them, which happens on the last micro-batch only."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)
        return
    with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext():
        yield


def _count(name: str, micro_batches: Sequence[Batch], task: Task) -> Tensor:
    """Return the number of an independent objective's terms in the whole batch, at least 1, as a float64 scalar."""
    own = sum(batch.counts[name] for batch in micro_batches)
    # `full` fills on the device, which avoids a synchronising copy.
    return distributed.all_reduce_sum(torch.full((), own, dtype=torch.float64, device=task.model.device)).clamp(min=1)


Transferring = Callable[[Batch], Callable[[], Batch]]
"""Function that starts to copy a micro-batch to the device, and returns one that returns it there; `Transfer.start`."""


def _ahead(batches: Sequence[Batch], start: Transferring | None) -> Iterator[Batch]:
    """Yield each micro-batch on the device, after the copy of the next one has begun. Further ones stay on the host."""
    if start is None:
        yield from batches
        return
    upcoming = start(batches[0])
    for batch in batches[1:]:
        current, upcoming = upcoming, start(batch)
        yield current()
        del current
    yield upcoming()


def _zeros(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}


def forward_backward(
    wrapped: nn.Module,
    task: Task,
    micro_batches: Sequence[Batch],
    weights: Mapping[str, float],
    autocast: AbstractContextManager[object] | None = None,
    loss_scale: Tensor | None = None,
    transfer: Transferring | None = None,
) -> StepLosses:
    """Add the gradients of one global batch's weighted loss to the parameters.

    Args:
        wrapped: `task`, or its DDP wrapper. DDP and FSDP2 average gradients over ranks, once a step.
        task: the model and its objectives.
        micro_batches: this rank's part of the batch; the same number on every rank.
        weights: weight of each objective's loss; those of weight 0 are not computed.
        autocast: autocast context of the forward passes, entered for each pass.
        loss_scale: scalar factor of the gradients; None for no scaling.
        transfer: `Transfer.start`, called one micro-batch ahead; None: the micro-batches are on the device.
    """
    autocast = autocast or nullcontext()
    micro_batches = [task.counted(batch, weights) for batch in micro_batches]
    counts = {name: _count(name, micro_batches, task) for name in task.independent if weights[name]}
    coupling = _Coupling(task, hash64("coupled", micro_batches[0].progress.samples) >> 1)
    coupled_weights = {name: 0.0 if name in counts else weight for name, weight in weights.items()}
    if len(micro_batches) > 1 and any(coupled_weights.values()):
        with torch.no_grad():
            for batch in _ahead(micro_batches, transfer):
                with autocast:
                    wrapped(batch, coupled_weights, counts, coupling.collect)
        coupling.differentiate()
    sums: dict[str, Tensors] = defaultdict(dict)
    world = distributed.world_size()
    for i, batch in enumerate(_ahead(micro_batches, transfer)):
        is_last = i == len(micro_batches) - 1
        with nullcontext() if is_last else _no_sync(wrapped):
            with autocast:
                total, part = wrapped(batch, weights, counts, coupling.couple)
            # DDP averages gradients over ranks, but the loss is a sum over ranks.
            total = total * world
            (total if loss_scale is None else total * loss_scale).backward()
        for name, values in part.items():
            for key, value in values.items():
                sums[name][key] = sums[name].get(key, 0) + value
    return StepLosses(coupling.losses, sums, counts, coupling.shared)
