"""Steps that are skipped, for a gradient that is not finite or a loss spike: name their samples, and limit their number."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from mmpretrain import distributed
from mmpretrain.data.order import step_range
from mmpretrain.data.stream import Stream
from mmpretrain.errors import TrainingError, printable
from mmpretrain.schedules import Clock
from mmpretrain.training.spikes import spikes_in

log = logging.getLogger(__name__)


class BadSteps:
    """Counts the steps in a row that are skipped.

    Args:
        in_a_row: number of such steps in a row so far.
        limit: the number that ends the run.
        streams: streams that the steps read.
        passed_over: number of each stream's positions that were passed over.
        clock: the run's.
        device: the training device.
    """

    def __init__(
        self,
        in_a_row: float,
        limit: int,
        streams: Mapping[str, Stream],
        passed_over: Mapping[str, int],
        clock: Clock,
        device: torch.device,
    ) -> None:
        self.in_a_row = torch.tensor(in_a_row, device=device)
        """Float32 scalar on the device."""
        self._limit, self._streams, self._passed_over, self._clock = limit, streams, passed_over, clock

    def update(self, skipped: Tensor) -> None:
        """Update the count after a step; `skipped` is a float32 scalar of 0 or 1."""
        self.in_a_row = (self.in_a_row + 1) * skipped

    def check(self, flags: Mapping[str, float], step: int, is_taken_back: bool) -> None:
        """Log the samples of a skipped step.

        Args:
            flags: `skipped`, `bad_steps` (in a row, this one included) and spikes of the step; empty if they are not known.
            step: its number, from 1.
            is_taken_back: whether the run rolls back, which has a limit of its own.

        Raises: TrainingError at the limit.
        """
        if not flags.get("skipped"):
            return
        spikes = [
            f"its {name} loss lies {score:.3g} robust standard deviations above the last ones"
            for name, score in spikes_in(flags).items()
        ]
        reason = " and ".join(spikes) or "its gradient is not finite"
        if distributed.is_main():
            for name, stream in self._streams.items():
                positions = step_range(stream.batch_size, step - 1, self._clock, self._passed_over.get(name, 0))
                keys = ", ".join(printable(stream.sample_key(position)) for position in positions)
                log.warning("step %d skipped, %s; samples of %s: %s", step, reason, name, keys)
        if flags["bad_steps"] >= self._limit and not is_taken_back:
            raise TrainingError(
                f"{int(flags['bad_steps'])} steps in a row were skipped, the last one since {reason}; the limit is "
                f"trainer.max_bad_steps = {self._limit}: lower optimizer.lr, clip the gradient, or look at the samples "
                "named above"
            )
