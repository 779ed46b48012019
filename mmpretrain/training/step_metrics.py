"""What a logged step tells of training: losses, gradient norms, speed and memory."""

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

_LARGEST_EXPONENT = 700.0  # of a float64


class Window:
    """What was trained since the last logged step, and how long it took."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._samples = 0
        self._data_wait = 0.0

    @property
    def seconds(self) -> float:
        """Time in training, in seconds."""
        return time.perf_counter() - self._start

    def add(self, samples: int) -> None:
        """After a step."""
        self._samples += samples

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside the block is training that waits for data."""
        began = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block is not training."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def values(self, device: torch.device) -> dict[str, float]:
        """Samples per second, the part of the time that waited for data, and memory."""
        seconds = self.seconds
        values = {"system/samples_per_second": self._samples / seconds, "system/data_wait": self._data_wait / seconds}
        if device.type == "cuda":
            values["system/gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        values["system/host_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return values


def train_values(
    losses: StepLosses, weights: Mapping[str, float], norms: Mapping[str, Tensor], task: Task
) -> dict[str, float]:
    """A step's losses and further means, the objectives' own scalars, and gradient norms by tower. A collective."""
    means = {name: {key: float(mean) for key, mean in each.items()} for name, each in losses.reduced().items()}
    values = {"train/loss": sum(weights[name] * each["loss"] for name, each in means.items())}
    values |= {f"train/{name}_{key}": mean for name, each in means.items() for key, mean in each.items()}
    values |= {
        f"train/{name}_perplexity": math.exp(min(each["loss"], _LARGEST_EXPONENT))
        for name, each in means.items()
        if hooks_of(task.objectives[name]).perplexity
    }
    for name, shared in losses.shared.items():
        # The rest are a head's weights.
        values |= {f"train/{name}_{key}": float(value) for key, value in shared.items() if value.numel() == 1}
    values["train/grad_norm"] = float(norms["all"])
    return values | {f"train/grad_norm_{tower}": float(norm) for tower, norm in norms.items() if tower != "all"}


def is_better(metric: str, score: float, best: float | None) -> bool:
    """Whether a score goes before the best so far; losses and perplexities fall, and what is no number never does."""
    sign = -1 if metric.endswith(("loss", "perplexity")) else 1
    return math.isfinite(score) and (best is None or sign * score > sign * best)
