"""Average of the weights, which often evaluates better than the last weights: a moving one, or the optimiser's own.

It is saved with the checkpoints as `ema.safetensors`, and evaluated as `eval-<data set>-ema`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmpretrain.errors import UsageError
from mmpretrain.optim import AveragingOptimizer
from mmpretrain.schedules import Scheduled, ScheduledValue, TrainingProgress

LoadTensors = Callable[[Callable[[str], Tensor | None]], Mapping[str, Tensor]]


class Average(ABC):
    """Average of a module's weights.

    Args:
        module: module whose parameters and buffers are averaged.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Averaged parameters and buffers, by name."""

    @abstractmethod
    def update(self, progress: TrainingProgress, skipped: Tensor) -> None:
        """Update the average after a step, without synchronising with the device.

        Args:
            progress: progress before the step.
            skipped: 1 if the step was skipped, else 0; float32 scalar.
        """

    @abstractmethod
    def load(self, load_tensors: LoadTensors) -> None:
        """Load the averaged weights of a checkpoint.

        Args:
            load_tensors: function that returns them by name, sharded like the tensors that its argument returns by name.
        """

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the module's weights by the average inside the block."""
        own = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}
        self._module.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self._module.load_state_dict(own)


class EMA(Average):
    """Exponential moving average (Polyak and Juditsky 1992), updated after every step that is not skipped:

        average = decay * average + (1 - decay) * weights

    Args:
        module: module whose parameters and buffers are averaged. Integer buffers are copied instead.
        decay: weight of the old average, between 0 and 1, as a function of the progress.
    """

    def __init__(self, module: nn.Module, decay: ScheduledValue) -> None:
        super().__init__(module)
        self._decay = decay
        self._tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Averaged parameters and buffers, by name."""
        return self._tensors

    @torch.no_grad()
    def update(self, progress: TrainingProgress, skipped: Tensor) -> None:
        """Update the average after a step (see `Average.update`)."""
        weight = (1 - self._decay(progress)) * (1 - skipped)
        for name, tensor in self._module.state_dict().items():
            average = self._tensors[name]
            if average.is_floating_point():
                average.lerp_(tensor, weight.to(average.dtype))
            else:
                average.copy_(tensor)

    def load(self, load_tensors: LoadTensors) -> None:
        """Load the averaged weights of a checkpoint (see `Average.load`)."""
        tensors = load_tensors(self._tensors.get)
        for name, average in self._tensors.items():
            average.copy_(tensors[name])


class OptimizerAverage(Average):
    """Average that the optimiser keeps itself, such as that of schedule-free optimisers (Defazio et al. 2024).

    It is computed on request, on copies of the parameters. Parameters and the optimiser's state thus stay bit for bit,
    which `eval()` and `train()` alone, the inverse of each other up to rounding, do not achieve.

    Args:
        module: module whose parameters the optimiser trains.
        optimizer: the optimiser.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(module)
        assert isinstance(optimizer, AveragingOptimizer)
        self._averaging = optimizer
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    @property
    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Averaged parameters, and a copy of the buffers, by name."""
        own = [parameter.data for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()
        try:
            self._averaging.eval()
            averaged = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}
            self._averaging.train()
        finally:
            for parameter, data in zip(self._parameters, own, strict=True):
                parameter.data = data
        return averaged

    def update(self, progress: TrainingProgress, skipped: Tensor) -> None:
        """Do nothing: the optimiser's step updates the average."""

    def load(self, load_tensors: LoadTensors) -> None:
        """Do nothing: the average follows from the weights and the optimiser's state."""


def average_of(module: nn.Module, optimizer: torch.optim.Optimizer, decay: Scheduled | None) -> Average | None:
    """Return the average of a run: a moving one if there is a decay, or the optimiser's own if it has one, or None.

    Args:
        module: module whose weights are averaged.
        optimizer: its optimiser.
        decay: `trainer.ema_decay`.

    Raises: UsageError if there would be both.
    """
    has_own = isinstance(optimizer, AveragingOptimizer)
    if decay is None:
        return OptimizerAverage(module, optimizer) if has_own else None
    if has_own:
        raise UsageError(
            f"trainer.ema_decay is {decay}, but {type(optimizer).__name__} averages the weights itself; expected null: "
            "trainer.ema_decay=null"
        )
    return EMA(module, ScheduledValue(decay, "trainer.ema_decay"))
