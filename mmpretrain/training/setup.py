"""How a run is cut: its length in steps, a step's micro-batches, and what each step weighs."""

import sys
from collections.abc import Iterator, Mapping

from mmpretrain import distributed
from mmpretrain.batch import Batch
from mmpretrain.data.loader import MicroBatches, StepSampler
from mmpretrain.data.order import step_positions
from mmpretrain.data.stream import Stream
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.schedules import Clock, Duration, Now, Value
from mmpretrain.training.task import Task


def weights_at(weights: Mapping[str, Value], now: Now) -> dict[str, float]:
    """The objectives' weights for the step that starts at `now`."""
    return {name: weight(now) for name, weight in weights.items()}


def clock_of(streams: Mapping[str, Stream], duration: Duration) -> Clock:
    """What durations are measured against; the run's length is whole steps, rounded up."""
    first = next(iter(streams.values()))
    batch_size, epoch_samples = int(first.batch_size.values[0]), first.order.num_samples
    num_steps = -(-round(Clock(batch_size, epoch_samples).samples(duration)) // batch_size)
    return Clock(batch_size, epoch_samples, num_steps * batch_size)


def count_micro_batches(batch_size: int, micro_batch_size: int | None, task: Task) -> int:
    """How many micro-batches a rank's share of a batch is cut into. Raises: ValueError if it does not divide."""
    world = distributed.world_size()
    if batch_size % world:
        raise ValueError(
            f"trainer.batch_size is {batch_size}; expected a multiple of the {world} processes: "
            f"{batch_size // world * world or world} would do"
        )
    share = batch_size // world
    size = min(micro_batch_size or share, share)
    if share % size:
        raise ValueError(
            f"trainer.micro_batch_size is {micro_batch_size}; expected a divisor of the {share} samples that each of "
            f"{world} processes takes of trainer.batch_size = {batch_size}"
        )
    if size < share and task.model.image.has_batch_norm:
        raise ValueError(
            f"trainer.micro_batch_size is {micro_batch_size}, but model.image has BatchNorm, whose mathematics depends on "
            "it; leave it null or choose an encoder without BatchNorm"
        )
    return share // size


def micro_batches(
    streams: Mapping[str, Stream], tokenizer: Tokenizer, clock: Clock, num_micro_batches: int, first_step: int = 0
) -> Iterator[Batch]:
    """What this rank sees from a step on, read one by one as they are asked for."""
    place = distributed.rank(), distributed.world_size(), num_micro_batches
    reader = MicroBatches(streams, tokenizer, clock)
    return map(reader.__getitem__, StepSampler(streams, clock, first_step, sys.maxsize, *place))


def example_batch(streams: Mapping[str, Stream], tokenizer: Tokenizer, clock: Clock) -> Batch:
    """Two samples of each stream, the same on every rank."""
    item = {name: step_positions(stream.order, range(2), 0, 1, 1)[0] for name, stream in streams.items()}
    return MicroBatches(streams, tokenizer, clock)[0, item]
