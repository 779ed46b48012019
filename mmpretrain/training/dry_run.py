"""What a run would cost, without training: parameters, operations, memory and time."""

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
from mmpretrain.config.schema import Precision, Strategy
from mmpretrain.reporting.profiling import synchronize
from mmpretrain.schedules import TrainingProgress
from mmpretrain.training import parallel
from mmpretrain.training.precision import autocast
from mmpretrain.training.setup import Setup
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task

_TIMED_STEPS = 2


@dataclass(frozen=True)
class Estimate:
    """The costs of a run."""

    parameters: Mapping[str, int]
    """Trained parameters by tower; `frozen` those that are not."""
    flops_per_pair: float
    """Forward and backward, as executed: padding that is not computed is not counted."""
    memory_bytes: int
    """On one device at its fullest: weights, gradients, the optimiser's state, and what is saved for the backward pass."""
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
    """Measure one micro-batch: forward and backward, the second and third of them timed; no weight changes.

    With several micro-batches two are measured, and half of it counts: coupled objectives then take two passes.

    Args:
        task: the model and its objectives, on the device.
        micro_batch: on the device, of the size that the run has.
        weights: the objectives' weights.
        make_optimizer: whose state is counted.
        precision: of the passes.
        num_pairs: samples of the micro-batch that count as pairs.
        num_micro_batches: how many a step takes on one device.
        has_average: whether a moving average of the weights is kept.
        num_shards: over how many devices weights, gradients, averages and the optimiser's state are spread.
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
    return Estimate(
        parameters=counts,
        flops_per_pair=counter.get_total_flops() / len(repeated) / num_pairs,
        memory_bytes=(weights_bytes + gradient_bytes + state_bytes) // num_shards + saved.num_bytes,
        seconds_per_micro_batch=min(seconds),
    )


class _Saved:
    """Counts the bytes that autograd keeps for the backward pass, each storage once, weights left out."""

    def __init__(self, task: Task) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in task.state_dict().values()}
        self._kept: list[Tensor] = []  # so that no storage is freed and its address counted for another
        self.num_bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor


def _optimizer_bytes(task: Task, make_optimizer: Callable[[Task], torch.optim.Optimizer]) -> int:
    """The bytes of the optimiser's state after a step, taken on one small parameter and scaled."""
    probe = torch.nn.Parameter(torch.zeros(64, 64))
    probe.grad = torch.zeros_like(probe)
    twin = optim.twin(make_optimizer(task), [probe])
    twin.step()
    state = sum(value.nbytes for value in twin.state[probe].values() if isinstance(value, Tensor))
    return state * sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad) // probe.numel()


def dry_run(setup: Setup) -> Mapping[str, float]:
    """Say what a run would cost, and leave nothing behind."""
    cfg, task, weights = setup.cfg, setup.task, setup.weights(0)
    setup.freeze.apply(TrainingProgress(0, setup.clock), weights)
    batch = next(setup.micro_batches()).to(setup.device)
    precision = cfg.trainer.precision
    # Whole and not compiled, so that operations can be counted; what is kept and what is computed again is the run's.
    parallel.prepare(task, setup.device, precision, replace(cfg.parallel, strategy=Strategy.ddp, compile=False))
    costs = estimate(
        task, batch, weights, lambda task: setup.optimizer(), precision, len(next(iter(batch.streams.values()))),
        setup.num_micro_batches, has_average=cfg.trainer.ema_decay is not None,
        num_shards=distributed.world_size() if cfg.parallel.strategy == Strategy.fsdp else 1,
    )  # fmt: skip
    show(costs, setup.num_steps, setup.num_micro_batches, str(setup.device))
    return {"flops_per_pair": costs.flops_per_pair, "memory_bytes": costs.memory_bytes}


def show(costs: Estimate, num_steps: int, num_micro_batches: int, device: str) -> None:
    """The table on the console."""
    table = Table(title="dry run: nothing was trained", title_justify="left", show_header=False)
    for tower, count in costs.parameters.items():
        table.add_row(f"parameters, {tower}", f"{count:,}")
    table.add_row("operations a pair, forward and backward", f"{costs.flops_per_pair / 1e9:,.3f} GFLOP")
    table.add_row("memory of one device", f"{costs.memory_bytes / 2**20:,.0f} MiB")
    seconds = costs.seconds_per_micro_batch * num_micro_batches
    table.add_row(f"a step on {device}", f"{seconds:,.3f} s")
    hours, minutes = divmod(round(seconds * num_steps / 60), 60)
    table.add_row(f"{num_steps:,} steps, reading and evaluation left out", f"{hours} h {minutes:02d} min")
    Console().print(table)
