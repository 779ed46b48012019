"""Moving average of the weights, which often evaluates better than the last weights (Polyak and Juditsky 1992)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmpretrain import distributed


class EMA:
    """Exponential moving average: average = decay * average + (1 - decay) * weights after every step that is not skipped.

    Args:
        module: module whose parameters and buffers are averaged. Integer buffers are copied instead.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, skipped: Tensor, decay: float) -> None:
        """Update the average after a step, without synchronising with the device.

        Args:
            skipped: 1 if the step was skipped, else 0; float32 scalar.
            decay: weight of the old average, between 0 and 1.
        """
        weight = (1 - decay) * (1 - skipped)
        for name, tensor in self._module.state_dict().items():
            average = self.tensors[name]
            if average.is_floating_point():
                average.lerp_(tensor, weight.to(average.dtype))
            else:
                average.copy_(tensor)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the averaged weights of a checkpoint."""
        for name, average in self.tensors.items():
            average.copy_(distributed.spread_like(tensors[name], average))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the module's weights by the average inside the block."""
        own = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}
        self._module.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self._module.load_state_dict(own)
