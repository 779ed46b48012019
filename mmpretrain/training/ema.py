"""A moving average of the weights, which often evaluates better than the last ones (Polyak and Juditsky 1992)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmpretrain import distributed


class EMA:
    """average = decay * average + (1 - decay) * weights, after every step that was not skipped.

    Args:
        module: whose parameters and buffers are averaged; whole numbers are taken over as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, skipped: Tensor, decay: float) -> None:
        """After a step that was `skipped` (a float32 scalar of 0 or 1) or not; nothing leaves the device.

        `decay` lies between 0 and 1.
        """
        weight = (1 - decay) * (1 - skipped)
        for name, tensor in self._module.state_dict().items():
            average = self.tensors[name]
            if average.is_floating_point():
                average.lerp_(tensor, weight.to(average.dtype))
            else:
                average.copy_(tensor)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint kept."""
        for name, average in self.tensors.items():
            average.copy_(distributed.spread_like(tensors[name], average))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module's weights are the average."""
        own = {name: tensor.detach().clone() for name, tensor in self._module.state_dict().items()}
        self._module.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self._module.load_state_dict(own)
