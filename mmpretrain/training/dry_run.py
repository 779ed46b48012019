"""Estimate a run's parameters, operations, memory and time without training."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmpretrain import distributed, optim
from mmpretrain.batch import Batch
from mmpretrain.config.schema import ActivationCheckpointing, Precision, Strategy
from mmpretrain.reporting.profiling import synchronize
from mmpretrain.schedules import TrainingProgress
from mmpretrain.training import parallel, traffic
from mmpretrain.training.precision import autocast
from mmpretrain.training.setup import Setup
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task

_TIMED_STEPS = 2


@dataclass(frozen=True)
class Estimate:
    """Costs of a run."""

    parameters: Mapping[str, int]
    """Number of trained parameters by tower; `frozen` is the number of those that are not trained."""
    flops_per_pair: float
    """Operations of forward and backward as executed; padding that is skipped is not counted."""
    memory_bytes: int
    """Peak memory of one device: weights, gradients, optimiser state and tensors saved for the backward pass."""
    seconds_per_micro_batch: float


def estimate(
    task: Task,
    micro_batch: Batch,
    weights: Mapping[str, float],
    make_optimizer: Callable[[Task], torch.optim.Optimizer],
    precision: Precision,
    num_pairs: int,
    num_micro_batches: int = 1,
    has_average: bool = False,
    num_shards: int = 1,
) -> Estimate:
    """Measure the forward and backward passes of one micro-batch. No weights change.

    The operations are counted in one execution, and the time is the minimum of the two after it. If a step has several
    micro-batches, two are measured and divided by two, since coupled objectives then need two forward passes.

    Args:
        task: model and its objectives, on the device.
        micro_batch: micro-batch on the device, of the run's size.
        weights: weights of the objectives.
        make_optimizer: function that returns the optimiser whose state is counted.
        precision: arithmetic of the passes.
        num_pairs: number of samples of the micro-batch that count as pairs.
        num_micro_batches: number of micro-batches of a step on one device.
        has_average: True if a moving average of the weights is kept.
        num_shards: number of devices that weights, gradients, averages and optimiser state are sharded over.
    """
    device = task.model.device
    context = autocast(device, precision)

    repeated = [micro_batch] * min(num_micro_batches, 2)

    def once() -> None:
        forward_backward(task, task, repeated, weights, context)

    saved = _Saved(task)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
        forward_backward(task, task, [micro_batch], weights, context)
    task.zero_grad()
    with FlopCounterMode(display=False) as counter:
        once()
    seconds = []
    for _ in range(_TIMED_STEPS):
        task.zero_grad()
        synchronize(device)
        started = time.perf_counter()
        once()
        synchronize(device)
        seconds.append((time.perf_counter() - started) / len(repeated))
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    state_bytes = _optimizer_bytes(task, make_optimizer)
    task.zero_grad()
    counts = dict.fromkeys((*optim.TOWERS, "frozen"), 0)
    for name, parameter in task.named_parameters():
        counts[optim.tower_of(name) if parameter.requires_grad else "frozen"] += parameter.numel()
    weights_bytes = sum(tensor.nbytes for tensor in task.state_dict().values()) * (2 if has_average else 1)
    gradient_bytes = sum(parameter.nbytes for parameter in trained)
    gradient_shards = num_shards if num_micro_batches == 1 else 1  # reduced, and sharded, after the last micro-batch
    return Estimate(
        parameters=counts,
        flops_per_pair=counter.get_total_flops() / len(repeated) / num_pairs,
        memory_bytes=(weights_bytes + state_bytes) // num_shards + gradient_bytes // gradient_shards + saved.num_bytes,
        seconds_per_micro_batch=min(seconds),
    )


class _Saved:
    """Count the bytes that autograd saves for the backward pass: each storage once, without the weights."""

    def __init__(self, task: Task) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in task.state_dict().values()}
        self._kept: list[Tensor] = []  # keeps storages alive, so that no address is reused
        self.num_bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor


def _optimizer_bytes(task: Task, make_optimizer: Callable[[Task], torch.optim.Optimizer]) -> int:
    """Return the bytes of the optimiser's state after a step, scaled up from a step on one small parameter per group."""
    total, size = 0, (64, 64)
    for small, members in optim.twins(make_optimizer(task), lambda: [torch.nn.Parameter(torch.zeros(size))]):
        ((probe,),) = [group["params"] for group in small.param_groups]
        probe.grad = torch.zeros_like(probe)
        small.step()
        state = sum(value.nbytes for value in small.state[probe].values() if isinstance(value, Tensor))
        total += state * sum(parameter.numel() for parameter in members)
    return total // math.prod(size)


def dry_run(setup: Setup) -> Mapping[str, float]:
    """Print the estimated costs of a run without writing files.

    Returns: `flops_per_pair`, `memory_bytes`, and `sent_bytes`, which a process sends in a step to others.
    """
    cfg, task, weights = setup.cfg, setup.task, setup.weights(0)
    setup.freeze.apply(TrainingProgress(0, setup.clock), weights)
    batch = next(setup.micro_batches()).to(setup.device)
    precision = cfg.trainer.precision
    # Unsharded and not compiled, so that operations can be counted; activation checkpointing is as in the run.
    parallel.prepare(
        task, setup.device, precision, replace(cfg.parallel, strategy=Strategy.ddp, shard_degree=None, compile=False)
    )
    costs = estimate(
        task, batch, weights, lambda task: setup.optimizer(), precision, len(next(iter(batch.streams.values()))),
        setup.num_micro_batches, has_average=cfg.trainer.ema_decay is not None,
        num_shards=parallel.num_shards(cfg.parallel),
    )  # fmt: skip
    sent = _sent_bytes(setup, batch, weights) if distributed.world_size() > 1 else {}
    if distributed.is_main():
        show(costs, setup.num_steps, setup.num_micro_batches, str(setup.device), sent)
    return {
        "flops_per_pair": costs.flops_per_pair,
        "memory_bytes": costs.memory_bytes,
        "sent_bytes": sum(sent.values()),
    }


def _sent_bytes(setup: Setup, batch: Batch, weights: Mapping[str, float]) -> dict[str, float]:
    """Return the bytes that a process sends in a step, by kind of collective. A collective, which shards the task."""
    cfg, task = setup.cfg, setup.task
    options = replace(cfg.parallel, activation_checkpointing=ActivationCheckpointing.none, compile=False)
    parallel.prepare(task, setup.device, cfg.trainer.precision, options)
    wrapped = parallel.wrap(task, setup.device)

    def step(num_micro_batches: int) -> None:
        passes = autocast(setup.device, cfg.trainer.precision)
        forward_backward(wrapped, task, [batch] * num_micro_batches, weights, passes)
        task.zero_grad()

    return traffic.of_step(step, setup.num_micro_batches)


def show(costs: Estimate, num_steps: int, num_micro_batches: int, device: str, sent: Mapping[str, float]) -> None:
    """Print the table of costs. `sent` are the bytes that a process sends in a step, by kind of collective."""
    table = Table(title="dry run: nothing was trained", title_justify="left", show_header=False)
    for tower, count in costs.parameters.items():
        table.add_row(f"parameters, {tower}", f"{count:,}")
    table.add_row("operations a pair, forward and backward", f"{costs.flops_per_pair / 1e9:,.3f} GFLOP")
    table.add_row("memory of one device", f"{costs.memory_bytes / 2**20:,.0f} MiB")
    seconds = costs.seconds_per_micro_batch * num_micro_batches
    table.add_row(f"a step on {device}", f"{seconds:,.3f} s")
    hours, minutes = divmod(round(seconds * num_steps / 60), 60)
    for kind, num_bytes in sent.items():
        table.add_row(f"sent in a step by {kind}", f"{num_bytes / 2**20:,.1f} MiB")
    table.add_row(f"{num_steps:,} steps, reading and evaluation left out", f"{hours} h {minutes:02d} min")
    Console().print(table)
