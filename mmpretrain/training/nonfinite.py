"""Steps with a non-finite gradient: log their samples and limit the number of such steps in a row."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.data.order import step_range
from mmpretrain.data.stream import Stream
from mmpretrain.errors import TrainingError
from mmpretrain.schedules import Clock

log = logging.getLogger(__name__)


class BadSteps:
    """Counts the steps in a row whose gradient is not finite.

    Args:
        in_a_row: number of such steps in a row so far.
        limit: the number that ends the run.
        streams: streams that the steps read.
        clock: the run's.
        device: the training device.
    """

    def __init__(
        self, in_a_row: float, limit: int, streams: Mapping[str, Stream], clock: Clock, device: torch.device
    ) -> None:
        self.in_a_row = torch.tensor(in_a_row, device=device)
        """Float32 scalar on the device."""
        self._limit, self._streams, self._clock = limit, streams, clock

    def update(self, skipped: Tensor) -> None:
        """Update the count after a step; `skipped` is a float32 scalar of 0 or 1."""
        self.in_a_row = (self.in_a_row + 1) * skipped

    def check(self, flags: Mapping[str, float], step: int) -> None:
        """Log the samples of a skipped step.

        Args:
            flags: `skipped` and `bad_steps` (in a row, this one included) of the step; empty if they are not known.
            step: its number, from 1.

        Raises: TrainingError at the limit.
        """
        if not flags.get("skipped"):
            return
        if distributed.is_main():
            for name, stream in self._streams.items():
                positions = step_range(stream.batch_size, step - 1, self._clock)
                keys = ", ".join(stream.sample_key(position) for position in positions)
                log.warning("step %d skipped, its gradient is not finite; samples of %s: %s", step, name, keys)
        if flags["bad_steps"] >= self._limit:
            raise TrainingError(
                f"{int(flags['bad_steps'])} steps in a row had a gradient that is not finite, the limit is "
                f"trainer.max_bad_steps = {self._limit}; lower optimizer.lr, clip the gradient, or look at the samples "
                "named above"
            )
