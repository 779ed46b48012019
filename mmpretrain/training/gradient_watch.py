"""Warning about unusually large gradient norms in runs without gradient clipping."""

import logging
import math
import statistics
from collections import deque

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_WINDOW, _FEWEST = 500, 30
_FAR = 50.0
"""Threshold in deviations from the median. Heavy tails of training reach about ten; steps that ruin a model, thousands."""


class GradientWatch:
    """Compare each step's gradient norm with those of up to 500 previous steps.

    The deviation is robust: 1.4826 times the median absolute deviation, which equals the standard deviation for a normal
    distribution, and at least a tenth of the median. `check` logs a warning at most once in 500 steps.
    """

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=_WINDOW)
        self._waiting: deque[tuple[int, Tensor]] = deque(maxlen=_WINDOW)
        self._silent_until = 0

    def add(self, step: int, norm: Tensor) -> None:
        """Store a step's norm, a scalar on the training device, without synchronising."""
        self._waiting.append((step, norm.detach()))

    def check(self) -> None:
        """Check the norms added since the last call. Call it at logged steps only, since it synchronises with the device."""
        if not self._waiting:
            return
        steps, norms = zip(*self._waiting)
        self._waiting.clear()
        for step, norm in zip(steps, torch.stack(norms).tolist()):
            if not math.isfinite(norm):
                continue  # the step is skipped, and `BadSteps.check` logs it
            if len(self._usual) >= _FEWEST and step >= self._silent_until:
                middle = statistics.median(self._usual)
                spread = max(1.4826 * statistics.median(abs(usual - middle) for usual in self._usual), 0.1 * middle)
                if middle > 0 and norm > middle + _FAR * spread:
                    log.warning(
                        "step %d had a gradient of norm %.3g, where %.3g is usual (median of %d steps), and nothing clips "
                        "it; if the loss jumps there, set trainer.clip_grad_norm=1.0",
                        step, norm, middle, len(self._usual),
                    )  # fmt: skip
                    self._silent_until = step + _WINDOW
            self._usual.append(norm)
