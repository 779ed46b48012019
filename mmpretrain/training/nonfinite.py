"""Steps with a non-finite gradient: log their samples and limit the number of such steps in a row."""

import logging
from collections.abc import Mapping

from mmpretrain import distributed
from mmpretrain.data.order import step_range
from mmpretrain.data.stream import Stream
from mmpretrain.errors import TrainingError
from mmpretrain.schedules import Clock

log = logging.getLogger(__name__)


def check_bad_step(
    flags: Mapping[str, float], step: int, streams: Mapping[str, Stream], clock: Clock, limit: int
) -> None:
    """Say which samples a skipped step saw, and end a run that has too many of them in a row.

    Args:
        flags: `skipped` and `bad_steps` (in a row, this one included) of the step.
        step: its number, from 1.
        streams: what it read.
        clock: the run's.
        limit: the first number of steps in a row that ends the run.

    Raises: TrainingError at the limit.
    """
    if not flags.get("skipped"):
        return
    if distributed.is_main():
        for name, stream in streams.items():
            positions = step_range(stream.batch_size, step - 1, clock)
            keys = ", ".join(stream.sample_key(position) for position in positions)
            log.warning("step %d skipped, its gradient is not finite; samples of %s: %s", step, name, keys)
    if flags["bad_steps"] >= limit:
        raise TrainingError(
            f"{int(flags['bad_steps'])} steps in a row had a gradient that is not finite, the limit is "
            f"trainer.max_bad_steps = {limit}; lower optimizer.lr, clip the gradient, or look at the samples named above"
        )
