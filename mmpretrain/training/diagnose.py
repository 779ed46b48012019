"""Diagnostics of mixed objectives: time shares, gradient norms on the shared encoders, and cosines between gradients."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mmpretrain import distributed
from mmpretrain.batch import Batch
from mmpretrain.objectives.base import Decode, Example, hooks_of
from mmpretrain.reporting.profiling import synchronize
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Encodings, Task

_ENCODERS = ("image", "text")


def diagnose(
    task: Task,
    micro_batches: Sequence[Batch],
    weights: Mapping[str, float],
    autocast: torch.autocast,
    scale: Tensor | None,
) -> dict[str, float]:
    """Measure one step objective by objective, without changing weights or buffers. A collective.

    Args:
        task: unwrapped model with its objectives; its gradients are cleared.
        micro_batches: this rank's part of the step's batch.
        weights: weight w_k of each objective; those of weight 0 are left out.
        autocast: autocast context of the passes.
        scale: loss scale of fp16, or None.

    Returns: values by name, for objectives k and l:
        `objectives/<k>_loss`: loss of k.
        `objectives/<k>_time_share`: part of the forward and backward time that the step would save without k.
        `objectives/<k>_grad_norm_<encoder>`: |g_k|, where g_k is the gradient of w_k loss_k over all ranks with respect
            to the encoder's parameters. Left out if it is 0.
        `objectives/<k>_<l>_cosine_<encoder>`: <g_k, g_l> / (|g_k| |g_l|); negative if the gradients conflict. Left out
            if one of the gradients is 0.
    """
    active = [name for name in task.objectives if weights[name]]

    def measure(names: Sequence[str]) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        """Return (seconds, losses, gradients by encoder) of a step with only these objectives."""
        some = {name: weights[name] if name in names else 0.0 for name in weights}
        synchronize(task.model.device)
        started = time.perf_counter()
        losses = forward_backward(task, task, micro_batches, some, autocast, scale)
        synchronize(task.model.device)
        seconds = time.perf_counter() - started
        gradients = {encoder: _gradient(task, encoder, scale) for encoder in _ENCODERS} if len(names) == 1 else {}
        task.zero_grad()
        return seconds, {name: float(means["loss"]) for name, means in losses.reduced().items()}, gradients

    with unchanged_buffers(task):
        # The first pass warms up and is the slowest: taking the minimum leaves it out.
        whole = min(measure(active)[0] for _ in range(2))
        alone = {name: measure([name]) for name in active}
        rest = {name: [other for other in active if other != name] for name in active}
        # Without another objective there is nothing to measure; a single other one has been measured already.
        without = {name: sum(alone[other][0] for other in rest[name]) for name in active if len(rest[name]) < 2}
        without |= {name: measure(rest[name])[0] for name in active if len(rest[name]) > 1}
    values = {f"objectives/{name}_loss": alone[name][1][name] for name in active}
    values |= {f"objectives/{name}_time_share": (whole - without[name]) / whole for name in active}
    for encoder in _ENCODERS:
        gradients = {name: alone[name][2][encoder] for name in active}
        norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
        values |= {f"objectives/{name}_grad_norm_{encoder}": norm for name, norm in norms.items() if norm}
        for first, second in combinations([name for name in active if norms[name]], 2):
            cosine = float(gradients[first] @ gradients[second]) / (norms[first] * norms[second])
            values[f"objectives/{first}_{second}_cosine_{encoder}"] = cosine
    return values


@torch.no_grad()
def show_examples(
    task: Task, batch: Batch, weights: Mapping[str, float], autocast: torch.autocast, decode: Decode, count: int = 6
) -> Iterator[tuple[str, list[Example]]]:
    """Yield the name and examples of each objective with an `examples` hook, for up to `count` samples of a micro-batch."""
    streams = {
        # Rows are in shard order, so take them evenly from the whole micro-batch.
        name: samples.rows(torch.linspace(0, len(samples) - 1, min(count, len(samples))).long())
        for name, samples in batch.streams.items()
    }
    task.eval()
    for name, objective in task.objectives.items():
        if weights[name] and (examples := hooks_of(objective).examples) is not None:
            with autocast:
                yield name, examples(Encodings(task.model, replace(batch, streams=streams)), decode)
    task.train()


def _gradient(task: Task, encoder: str, scale: Tensor | None) -> Tensor:
    """Return the whole batch's gradient of one encoder as a vector, float32 or wider; zero where no gradient arrives."""
    parameters = [p for name, p in task.named_parameters() if name.startswith(f"model.{encoder}.")]
    parts = [distributed.full(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    total = torch.cat(parts) if parts else torch.zeros(1, device=task.model.device)
    if not isinstance(task, FSDPModule):
        # Without DDP, average the gradients over ranks here: `forward_backward` scales the loss for that.
        total = distributed.all_reduce_sum(total) / distributed.world_size()
    return total if scale is None else total / scale


@contextmanager
def unchanged_buffers(task: Task) -> Iterator[None]:
    """Restore the buffers after the block, such as BatchNorm's running means, which forward passes update."""
    kept = [(buffer, buffer.clone()) for buffer in task.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)
