"""Setup of a run before its first step, shared by training and the dry run: steps, micro-batches and frozen parts."""

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from mmpretrain import distributed, optim
from mmpretrain.batch import Batch
from mmpretrain.config.instantiate import instantiate
from mmpretrain.config.schema import TrainConfig
from mmpretrain.data.loader import MicroBatches, StepSampler
from mmpretrain.data.order import step_positions
from mmpretrain.data.stream import Stream
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.models.layers import layers_above
from mmpretrain.schedules import Clock, Duration, ScheduledValue, TrainingProgress
from mmpretrain.training import probe, randomness_watch
from mmpretrain.training.freeze import Freeze
from mmpretrain.training.task import Task

log = logging.getLogger(__name__)


class Setup:
    """Parts of a run, checked for consistency.

    Args:
        cfg: the configuration.
        clock: clock that converts durations to samples.
        task: the model and its objectives, on the training device.
        weights: weights of the objectives, as functions of the samples seen.
        streams: streams that the objectives read; the first one defines the samples that are counted.
        tokenizer: tokenizer of the streams' texts.

    Raises: ValueError if batch sizes are not divisible as needed, or if no parameter would be trained at some step.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        clock: Clock,
        task: Task,
        weights: Mapping[str, ScheduledValue],
        streams: Mapping[str, Stream],
        tokenizer: Tokenizer,
    ) -> None:
        self.cfg, self.clock, self.task = cfg, clock, task
        self.streams, self.tokenizer = streams, tokenizer
        self.scheduled_weights = weights
        self.device = task.model.device
        self.num_steps = clock.total_samples // clock.batch_size
        self.num_micro_batches = count_micro_batches(clock.batch_size, cfg.trainer.micro_batch_size, task)
        example = example_batch(streams, tokenizer, clock).to(self.device)
        until = {
            part: None if until is None else Duration.parse(until, f"trainer.freeze.{part}")
            for part, until in (cfg.trainer.freeze or {}).items()
        }
        self.freeze = Freeze(task, until, probe.reached_parameters(task, example))
        self.freeze.check_trains(weights, clock)
        trained = [name for name, parameter in task.named_parameters() if parameter.requires_grad]
        if distributed.is_main() and not any(name.startswith("model.") for name in trained):
            log.warning(
                "no parameter of the model is trained, only %s; if that is not meant, change trainer.freeze",
                ", ".join(trained),
            )
        for name in streams:
            self._check_text_length(name)
        randomness_watch.settle_randomness(task, example, self.num_micro_batches)

    def _check_text_length(self, stream: str) -> None:
        """Raises: ValueError for texts that would be longer than the tokenizer makes them."""
        text_length, key = self.cfg.data.train[stream].text_length, f"data.train.{stream}.text_length"
        longest = self.tokenizer.context_length
        if text_length is not None and max(ScheduledValue(text_length, key).values) > longest:
            raise ValueError(
                f"{key} is {text_length}, but the tokenizer cuts texts to {longest} tokens; expected at most that: lower it, "
                "or raise data.tokenizer.context_length and model.text.context_length"
            )

    def weights(self, samples: int) -> dict[str, float]:
        """Return the objectives' weights for the step that starts at `samples`."""
        progress = TrainingProgress(samples, self.clock)
        return {name: weight(progress) for name, weight in self.scheduled_weights.items()}

    def optimizer(self) -> torch.optim.Optimizer:
        """Build a new optimiser of the task's current parameters."""
        make = instantiate(self.cfg.optimizer, self.cfg.run.seed, "optimizer")
        takes_layers = "layers" in inspect.signature(make).parameters
        layers = {"layers": partial(layers_above, self.task.model)} if takes_layers else {}
        optimizer: torch.optim.Optimizer = make(self.task.named_parameters(), **layers)
        if isinstance(optimizer, optim.AveragingOptimizer):
            optimizer.train()
        return optimizer

    def micro_batches(self, first_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's micro-batches from `first_step` on, read in this process when requested."""
        place = distributed.rank(), distributed.world_size(), self.num_micro_batches
        reader = MicroBatches(self.streams, self.tokenizer, self.clock)
        return map(reader.__getitem__, StepSampler(self.streams, self.clock, first_step, sys.maxsize, *place, {}))


def fingerprint_of(streams: Mapping[str, Stream]) -> dict[str, Any]:
    """Return the fingerprints of the training data by stream. A checkpoint with other fingerprints is refused."""
    return {f"data.train.{name}": stream.fingerprints for name, stream in streams.items()}


def clock_of(streams: Mapping[str, Stream], duration: Duration) -> Clock:
    """Return the run's clock. The run's length is `duration` rounded up to whole steps."""
    first = next(iter(streams.values()))
    batch_size, epoch_samples = int(first.batch_size.values[0]), first.order.num_samples
    num_steps = -(-round(Clock(batch_size, epoch_samples).samples(duration)) // batch_size)
    return Clock(batch_size, epoch_samples, num_steps * batch_size)


def count_micro_batches(batch_size: int, micro_batch_size: int | None, task: Task) -> int:
    """Return the number of micro-batches in a rank's part of a batch.

    Raises: ValueError if the sizes are not divisible, or if the image encoder has BatchNorm and would see micro-batches.
    """
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
    if size < share and task.model.has_batch_norm:
        raise ValueError(
            f"trainer.micro_batch_size is {micro_batch_size}, but model.image has BatchNorm, whose mathematics depends on "
            "it; leave it null or choose an encoder without BatchNorm"
        )
    return share // size


def example_batch(streams: Mapping[str, Stream], tokenizer: Tokenizer, clock: Clock) -> Batch:
    """Return a batch of two samples of each stream, the same on every rank."""
    item = {name: step_positions(stream.order, range(2), 0, 1, 1)[0] for name, stream in streams.items()}
    return MicroBatches(streams, tokenizer, clock)[0, item, {}]
