"""A warning of a gradient far beyond what is usual, where nothing clips it."""

import logging
import math
import statistics
from collections import deque

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_WINDOW, _FEWEST = 500, 30
_FAR = 50.0
"""Deviations from the median. Heavy tails of training reach some ten; a step that ruins a model stands at thousands."""


class GradientWatch:
    """Compares each step's gradient norm with those of up to 500 steps before it.

    The deviation is robust: 1.4826 times the median distance from the median, as a normal distribution has it, and at
    least a tenth of the median. What is found is said at the next `check`, and then not again for 500 steps.
    """

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=_WINDOW)
        self._waiting: deque[tuple[int, Tensor]] = deque(maxlen=_WINDOW)
        self._silent_until = 0

    def add(self, step: int, norm: Tensor) -> None:
        """Keep a step's norm, a scalar on the training device, which is not waited for."""
        self._waiting.append((step, norm.detach()))

    def check(self) -> None:
        """Look at what was added since; at logged steps, since it waits for the device."""
        if not self._waiting:
            return
        steps, norms = zip(*self._waiting)
        self._waiting.clear()
        for step, norm in zip(steps, torch.stack(norms).tolist()):
            if not math.isfinite(norm):
                continue  # such a step is skipped, and said
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
