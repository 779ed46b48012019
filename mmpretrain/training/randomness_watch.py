"""Detection of layers whose random numbers do not depend on the sample alone, before training begins."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpretrain import distributed
from mmpretrain.batch import Batch, Samples
from mmpretrain.training.diagnose import unchanged_buffers
from mmpretrain.training.randomness import SampleRandomness
from mmpretrain.training.step import forward_backward
from mmpretrain.training.task import Task

log = logging.getLogger(__name__)

_SPLIT = 1e-4  # relative rounding error of a float32 loss when a micro-batch is split
_SPLIT_GRADIENT, _NEGLIGIBLE = 1e-2, 1e-6  # relative to a parameter's gradient norm; to the whole gradient's norm
_ZERO = 1e-6  # absolute rounding error of a float32 loss
_NAMED_LAYERS = 8


class RandomnessWatch(SampleRandomness):
    """Draw by sample, and record which submodules do so and which use a random generator instead."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(strict=False)
        self.by_sample: dict[str, None] = {}
        """Names of the innermost modules that draw by sample; a dictionary keeps their order."""
        self.otherwise: dict[str, None] = {}
        """Names of the innermost modules that advance a generator of PyTorch, Python or NumPy."""
        self._module = module
        self._inside: list[tuple[str, object]] = []
        self._device = next(module.parameters()).device

    def _state(self) -> object:
        """Return the states of the generators of PyTorch, Python and NumPy."""
        torchs = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()
        numpys: Any = np.random.get_state()  # noqa: NPY002, a layer may use this generator
        return torchs.numpy().tobytes(), random.getstate(), numpys[1].tobytes(), numpys[2:]

    def __enter__(self) -> "RandomnessWatch":
        self._hooks = [
            hook
            for name, module in self._module.named_modules()
            if name  # not the root, which seeds the generator itself
            for hook in (
                module.register_forward_pre_hook(lambda *_, name=name: self._begin(name), prepend=True),
                module.register_forward_hook(lambda *_: self._end(), always_call=True),
            )
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def of(self, samples: Samples, *key: object) -> Iterator[None]:
        """Extend `SampleRandomness.of`: draws outside of any module are recorded under the pass's name."""
        with super().of(samples, *key):
            self._begin(".".join(str(part) for part in key if part is not None))
            try:
                yield
            finally:
                self._end()

    def _begin(self, name: str) -> None:
        self._note()
        self._inside.append((name, self._state()))

    def _end(self) -> None:
        self._note()
        self._inside.pop()
        if self._inside:  # draws of the inner module are already recorded
            self._inside[-1] = (self._inside[-1][0], self._state())

    def _note(self) -> None:
        if self._inside and self._inside[-1][1] != self._state():
            self.otherwise[self._inside[-1][0]] = None
            self._inside[-1] = (self._inside[-1][0], self._state())

    def bits(self, shape: Sequence[int], per_draw: int = 1) -> Tensor | None:
        bits = super().bits(shape, per_draw)
        if bits is not None and self._inside:
            self.by_sample[self._inside[-1][0]] = None
        return bits


def settle_randomness(task: Task, example: Batch, num_micro_batches: int) -> None:
    """Detect random layers of the task, and set `task.randomness` so that they draw from the samples' seeds. A collective.

    Random numbers that a layer does not draw by sample depend on the number of processes and micro-batches. A step on a
    small example in training mode detects such layers.

    Args:
        task: task whose `randomness` is set; None if no layer draws random numbers.
        example: two samples of each stream.
        num_micro_batches: number of micro-batches of a step on one process.

    Raises: ValueError if there are several processes or micro-batches, and layers do not draw by sample or a sample's loss
        depends on the others of its micro-batch. On one process with one micro-batch such layers are named in a warning.
    """
    weights = dict.fromkeys(task.objectives, 1.0)
    watch = RandomnessWatch(task)
    task.randomness = lambda: watch
    with unchanged_buffers(task):
        forward_backward(task, task, [example], weights)
        task.zero_grad()
        strangers = list(watch.otherwise)
        if not (watch.by_sample or strangers):
            task.randomness = None
        elif not strangers:
            task.randomness = partial(SampleRandomness, strict=False)
            if _depends_on_neighbours(task, example, weights):
                strangers = _culprits(task, example, weights, list(watch.by_sample))
        is_split = num_micro_batches > 1 or distributed.world_size() > 1
        if task.randomness is None and is_split and _depends_on_neighbours(task, example, weights, by_loss=True):
            raise ValueError(
                "the loss of a sample depends on the others of its micro-batch, by statistics over the batch or the like, so "
                f"that training would depend on the number of processes ({distributed.world_size()}) and micro-batches "
                f"({num_micro_batches}); change the encoder or objective, or use one of each"
            )
    if strangers:
        names = ", ".join(strangers[:_NAMED_LAYERS]) + (" and others" if len(strangers) > _NAMED_LAYERS else "")
        message = f"{names} draw random numbers that depend on the other samples of the micro-batch"
        if is_split:
            raise ValueError(
                f"{message}, so that training would depend on the number of processes ({distributed.world_size()}) and "
                f"micro-batches ({num_micro_batches}); set their probabilities to 0, or use one of each"
            )
        log.warning("%s: training is reproducible, but on one process and with one micro-batch alone", message)
    if task.randomness is not None:
        task.randomness = partial(SampleRandomness, strict=is_split and not strangers)


def _depends_on_neighbours(task: Task, example: Batch, weights: Mapping[str, float], by_loss: bool = False) -> bool:
    """Return True if a step on two samples differs from a step with each sample in its own micro-batch.

    With `by_loss` the losses alone are compared: gradients of a coupled loss of two samples may be rounding errors.
    BatchNorm layers are set to evaluation mode, since they use other samples without drawing random numbers.
    """
    halves = [
        replace(
            example, streams={name: each.rows(torch.tensor([row])) for name, each in example.streams.items()}, counts={}
        )
        for row in range(2)
    ]
    found = []
    norms = [each for each in task.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training]
    for norm in norms:
        norm.eval()
    for batches in ([example], halves):
        losses = forward_backward(task, task, batches, weights).reduced()
        gradients = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
        found.append((losses, gradients))
        task.zero_grad()
    for norm in norms:
        norm.train()
    (losses, gradients), (split_losses, split_gradients) = found
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    # Compare relative to each gradient's norm: layer scale makes some small at first. Skip gradients at rounding level.
    other_losses = any(
        bool((split_losses[name]["loss"] - each["loss"]).abs() > _SPLIT * (each["loss"].abs() + 0.01))
        for name, each in losses.items()
    )
    # Gradients of a loss at its minimum 0, such as that of two samples of one class, are rounding errors.
    is_zero = all(bool(each["loss"].abs() < _ZERO) for each in losses.values())
    if other_losses or by_loss or is_zero:
        return other_losses
    return any(
        bool(gradient.norm() > _NEGLIGIBLE * total)
        and bool((split_gradients[name] - gradient).norm() > _SPLIT_GRADIENT * gradient.norm())
        for name, gradient in gradients.items()
    )


def _culprits(task: Task, example: Batch, weights: Mapping[str, float], names: list[str]) -> list[str]:
    """Return those of the modules `names` whose random numbers depend on the other samples; all if none is found alone."""
    modules = {name: module for name, module in task.named_modules() if name in names}
    for module in modules.values():
        module.eval()
    culprits = []
    if _depends_on_neighbours(task, example, weights):
        culprits.append("parts of the model, which have a generator of their own,")
    for name, module in modules.items() if not culprits else ():
        module.train()
        if _depends_on_neighbours(task, example, weights):
            culprits.append(name)
        module.eval()
    task.train()
    return culprits or names
