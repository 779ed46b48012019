"""Metrics of a logged step: losses, gradient norms, speed and memory."""

import math
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from mmpretrain.objectives.base import hooks_of
from mmpretrain.training.step import StepLosses
from mmpretrain.training.task import Task

_LARGEST_EXPONENT = 700.0  # exp of more overflows a float64


class Window:
    """Number of samples trained and time taken since the last logged step."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._samples = 0
        self._data_wait = 0.0

    @property
    def seconds(self) -> float:
        """Training time in seconds, without pauses."""
        return time.perf_counter() - self._start

    def add(self, samples: int) -> None:
        """Count the samples of a step."""
        self._samples += samples

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside the block as waiting for data, which is part of the training time."""
        began = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out of the training time."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def values(self, device: torch.device) -> dict[str, float]:
        """Return samples per second, the fraction of time spent waiting for data, and peak memory in bytes."""
        seconds = self.seconds
        values = {"system/samples_per_second": self._samples / seconds, "system/data_wait": self._data_wait / seconds}
        if device.type == "cuda":
            values["system/gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        values["system/host_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return values


def train_values(
    losses: StepLosses, weights: Mapping[str, float], norms: Mapping[str, Tensor], task: Task
) -> dict[str, float]:
    """Return a step's losses and further means, the objectives' shared scalars, and gradient norms by tower. A collective."""
    means = {name: {key: float(mean) for key, mean in each.items()} for name, each in losses.reduced().items()}
    values = {"train/loss": sum(weights[name] * each["loss"] for name, each in means.items())}
    values |= {f"train/{name}_{key}": mean for name, each in means.items() for key, mean in each.items()}
    values |= {
        f"train/{name}_perplexity": math.exp(min(each["loss"], _LARGEST_EXPONENT))
        for name, each in means.items()
        if hooks_of(task.objectives[name]).perplexity
    }
    for name, shared in losses.shared.items():
        # Larger tensors are a head's weights.
        values |= {f"train/{name}_{key}": float(value) for key, value in shared.items() if value.numel() == 1}
    values["train/grad_norm"] = float(norms["all"])
    return values | {f"train/grad_norm_{tower}": float(norm) for tower, norm in norms.items() if tower != "all"}
