"""Checkpoints of a run: saved by the loop, or of the last whole step by whoever ends a process that hangs.

The training state changes only inside of `Saver.step()`. While the loop waits for data or for a collective, another thread
may therefore save the state that the last step left.

Sharded state is written in the background (see `BackgroundWriter`).
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpretrain import distributed, optim
from mmpretrain.checkpoints import store
from mmpretrain.checkpoints.background import BackgroundWriter
from mmpretrain.config.schema import TrainConfig
from mmpretrain.errors import TrainingError
from mmpretrain.training import parallel
from mmpretrain.training.bad_steps import BadSteps
from mmpretrain.training.ema import Average
from mmpretrain.training.precision import LossScale
from mmpretrain.training.quarantine import Quarantine
from mmpretrain.training.resume import TrainState
from mmpretrain.training.spikes import LossSpikes
from mmpretrain.training.task import Task


class Saver:
    """Writes the checkpoints of a run. Rank 0 writes the files, or every rank its own if the weights are sharded.

    Args:
        cfg: the configuration.
        fingerprint: describes the training data.
        state: counters and scores.
        task, optimizer, average, loss_scale, bad_steps, spikes, quarantine: the rest of the training state.
        started: `time.perf_counter()` at the start of this process's part of the run.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        fingerprint: Mapping[str, Any],
        state: TrainState,
        task: Task,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
        loss_scale: LossScale,
        bad_steps: BadSteps,
        spikes: LossSpikes | None,
        quarantine: Quarantine,
        started: float,
    ) -> None:
        self.folder, self.keep_last = Path(str(cfg.run.dir)) / "checkpoints", cfg.checkpoint.keep_last
        is_sharded = parallel.is_sharded(cfg.parallel)
        self._background = BackgroundWriter(cfg.parallel.timeout_seconds) if is_sharded else None
        self._fingerprint, self._state, self._task, self._optimizer = fingerprint, state, task, optimizer
        self._average, self._loss_scale, self._bad_steps, self._quarantine = average, loss_scale, bad_steps, quarantine
        self._spikes = spikes
        self._started, self._earlier_seconds = started, state.wall_seconds
        self.saved_at, self._saved_step = time.perf_counter(), state.step
        self.lock = threading.RLock()
        """Held while the state changes or is written."""
        self._mark_whole()

    @property
    def saved_step(self) -> int:
        """Step of the last checkpoint that is complete."""
        return self._saved_step if self._background is None else max(self._saved_step, self._background.saved_step)

    @property
    def is_writing(self) -> bool:
        """True while a checkpoint is written in the background."""
        return self._background is not None and self._background.is_writing

    @property
    def wall_seconds(self) -> float:
        """Seconds that the run has taken, in this process and the ones before."""
        return self._earlier_seconds + time.perf_counter() - self._started

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enclose the change from one whole step to the next: parameters, counters and log."""
        with self.lock:
            self._is_whole = False
            yield
            self._mark_whole()

    def _mark_whole(self) -> None:
        self._is_whole, self._buffer_versions = True, self._versions()
        self._state.num_refused = self._quarantine.num_refused

    def _versions(self) -> list[int]:
        """Versions of the buffers, which BatchNorm changes in the forward pass already."""
        return [buffer._version for buffer in self._task.buffers()]

    def can_rescue(self) -> bool:
        """Return whether this process alone can save a whole step."""
        return self._is_whole and self._buffer_versions == self._versions() and self._background is None

    def save(self) -> None:
        """Write a checkpoint of the last step, unless there is one; if sharded, in the background. A collective.

        Raises: TrainingError on all ranks if this checkpoint, or the one before, cannot be written.
        """
        self._quarantine.flush(self._state.samples)
        self._state.num_refused = self._quarantine.num_refused
        if self._background is None:
            if (failure := distributed.broadcast_object(self._write())) is not None:
                raise TrainingError(failure)
        else:
            self.finish()
            step = self._state.step
            if step > self.saved_step:
                self._background.start(self.folder, step, self._tensors(), self._described(), self.keep_last)
        self.saved_at = time.perf_counter()

    def finish(self) -> None:
        """Wait until the last checkpoint is written. Raises: TrainingError on all ranks if it cannot be."""
        if self._background is not None:
            try:
                self._background.finish()
            except OSError as error:
                raise TrainingError(f"a checkpoint cannot be written ({error}); {self._standing()}") from error

    def _standing(self) -> str:
        return f"the one of step {self.saved_step} still stands" if self.saved_step else "there is none before it"

    def rescue(self) -> str:
        """Save the last whole step without the other ranks if possible. Returns: what the next start resumes from."""
        if self.can_rescue() and distributed.is_main() and (failure := self._write()) is not None:
            return failure
        if not distributed.is_main():
            return "the same command goes on from what process 0 has saved"
        return f"the same command goes on from step {self.saved_step}" if self.saved_step else "nothing is saved yet"

    def _write(self) -> str | None:
        """Write a whole checkpoint unless the step has one. Returns: an error message."""
        with self.lock:
            step, state = self._state.step, self._described()
            if step > self.saved_step and distributed.is_main():
                try:
                    store.save(self.folder, step, self._tensors(), state, self.keep_last)
                except OSError as error:
                    return f"no checkpoint can be written at step {step} ({error}); {self._standing()}"
            self._saved_step = step
            return None

    def _described(self) -> dict[str, Any]:
        """Return the part of a checkpoint that is not tensors."""
        state = self._state
        state.bad_steps = float(self._bad_steps.in_a_row)
        state.loss_scale, state.good_steps = self._loss_scale.state()
        if self._spikes is not None:
            state.losses, state.spike = self._spikes.state()
        state.wall_seconds = self.wall_seconds
        numbers = {"optimizer": optim.optimizer_numbers(self._optimizer), "fingerprint": self._fingerprint}
        return {**asdict(state), **numbers}

    def _tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the tensors of a checkpoint, those of this rank if they are sharded."""
        tensors: dict[str, Mapping[str, Tensor]] = {
            "model": self._task.state_dict(), "optimizer": optim.optimizer_tensors(self._optimizer)
        }  # fmt: skip
        if self._average is not None:
            tensors["ema"] = self._average.tensors
        return tensors
