"""The arithmetic of the forward and backward passes: bf16, fp16 with loss scaling, or fp32."""

import torch
from torch import Tensor

from mmpretrain.config.schema import Precision

_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
_GROWTH, _BACKOFF, _GROWTH_INTERVAL = 2.0, 0.5, 2000  # torch.amp.GradScaler's
_INITIAL_SCALE = 2.0**16


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of the model's passes; parameters and losses stay float32."""
    return torch.autocast(device.type, _DTYPES.get(precision, torch.bfloat16), enabled=precision in _DTYPES)


class LossScale:
    """fp16's loss scaling (Micikevicius et al. 2018), on the device: without it small gradients become zero.

    The loss is multiplied by `scale` and the gradients divided by it. A step with a gradient that is not finite is
    skipped and halves the scale; 2,000 good ones in a row double it. In other precisions the scale stays one.
    """

    def __init__(self, precision: Precision, device: torch.device, scale: float | None, good_steps: int) -> None:
        self.enabled = precision == Precision.fp16
        initial = _INITIAL_SCALE if scale is None else scale
        self._scale = torch.tensor(initial if self.enabled else 1.0, device=device)
        self._good_steps = torch.tensor(good_steps, dtype=torch.int32, device=device)

    @property
    def scale(self) -> Tensor | None:
        """What the loss is multiplied by, a scalar on the device; None where it is not."""
        return self._scale if self.enabled else None

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if self.enabled:
            torch._foreach_mul_(gradients, self._scale.reciprocal())

    def update(self, skipped: Tensor) -> None:
        """After a step that was `skipped` (a float32 scalar of 0 or 1) or not."""
        if self.enabled:
            torch._amp_update_scale_(self._scale, self._good_steps, skipped, _GROWTH, _BACKOFF, _GROWTH_INTERVAL)

    def state(self) -> tuple[float | None, int]:
        """(scale, good steps in a row), what a checkpoint keeps; synchronises."""
        return (float(self._scale), int(self._good_steps)) if self.enabled else (None, 0)
