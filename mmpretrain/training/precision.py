"""Arithmetic of the forward and backward passes: bf16, fp16 with loss scaling, or fp32."""

import torch
from torch import Tensor

from mmpretrain.config.schema import Precision

_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
_GROWTH, _BACKOFF, _GROWTH_INTERVAL = 2.0, 0.5, 2000  # the defaults of torch.amp.GradScaler
_INITIAL_SCALE = 2.0**16


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast context of the model's passes. Parameters and losses stay float32."""
    return torch.autocast(device.type, _DTYPES.get(precision, torch.bfloat16), enabled=precision in _DTYPES)


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018), which prevents small gradients from becoming zero.

    The loss is multiplied by `scale` and the gradients are divided by it. A step with a non-finite gradient is skipped
    and halves the scale; 2,000 finite steps in a row double it. In other precisions the scale stays 1. The state is kept
    on the device.

    Args:
        precision: arithmetic of the passes.
        device: device of the state.
        scale: scale of a resumed run; None for the initial scale.
        good_steps: number of finite steps in a row of a resumed run.
    """

    def __init__(self, precision: Precision, device: torch.device, scale: float | None, good_steps: int) -> None:
        self.enabled = precision == Precision.fp16
        initial = _INITIAL_SCALE if scale is None else scale
        self._scale = torch.tensor(initial if self.enabled else 1.0, device=device)
        self._good_steps = torch.tensor(good_steps, dtype=torch.int32, device=device)

    @property
    def scale(self) -> Tensor | None:
        """Factor of the loss, a scalar on the device; None if the loss is not scaled."""
        return self._scale if self.enabled else None

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if self.enabled:
            torch._foreach_mul_(gradients, self._scale.reciprocal())

    def update(self, norm: Tensor) -> None:
        """Update the scale after a step whose gradient, divided by the scale, has this 2-norm, a scalar."""
        if self.enabled:
            skipped = (~torch.isfinite(norm)).float()
            torch._amp_update_scale_(self._scale, self._good_steps, skipped, _GROWTH, _BACKOFF, _GROWTH_INTERVAL)

    def state(self) -> tuple[float | None, int]:
        """Return (scale, finite steps in a row) for a checkpoint. Synchronises with the device."""
        return (float(self._scale), int(self._good_steps)) if self.enabled else (None, 0)
