"""Training loop."""

import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from mmpretrain import distributed, files, optim
from mmpretrain.batch import Batch
from mmpretrain.checkpoints import store
from mmpretrain.config import identity
from mmpretrain.config.schema import SpikeAction
from mmpretrain.data.loader import LoaderError, build_loader, received
from mmpretrain.data.order import step_range
from mmpretrain.errors import TrainingError
from mmpretrain.reporting.profiling import profiled
from mmpretrain.reporting.progress import ProgressBar
from mmpretrain.reporting.records import finite, is_better, write_intervals
from mmpretrain.reporting.writers import RunWriter
from mmpretrain.schedules import Duration, Schedule, TrainingProgress
from mmpretrain.scores import Score
from mmpretrain.training import parallel, resume
from mmpretrain.training.bad_steps import BadSteps
from mmpretrain.training.diagnose import diagnose, show_examples, unchanged_buffers
from mmpretrain.training.ema import average_of
from mmpretrain.training.gradient_watch import GradientWatch
from mmpretrain.training.init_from import init_from
from mmpretrain.training.precision import LossScale, autocast
from mmpretrain.training.quarantine import Quarantine
from mmpretrain.training.resume import TrainState
from mmpretrain.training.saver import Saver
from mmpretrain.training.setup import Setup, fingerprint_of
from mmpretrain.training.spikes import LossSpikes, spikes_in
from mmpretrain.training.step import StepLosses, forward_backward
from mmpretrain.training.step_metrics import Window, train_values
from mmpretrain.training.stop_signal import PREEMPTED_EXIT_CODE, Stopped, StopSignal
from mmpretrain.training.task import Task
from mmpretrain.training.transfer import Transfer
from mmpretrain.training.workers import measured_workers

log = logging.getLogger(__name__)

# Seconds after a signal until another thread ends a hanging process: with a state that can be saved, without one, and while a
# checkpoint is written.
_STOP_SECONDS, _STOP_UNSAVED_SECONDS, _STOP_WRITING_SECONDS = 10.0, 30.0, 120.0


class Evaluation(Protocol):
    """Protocol of a run's evaluations (see `mmpretrain.evals.base`)."""

    @property
    def without_data(self) -> Sequence[str]:
        """Names of the evaluators that find no data set, and give no score."""
        ...

    @property
    def has_run_all(self) -> bool:
        """True once every evaluator has run in this process."""
        ...

    def check_best(self, best: str, has_average: bool) -> None:
        """Check the metric of `checkpoint.best`. Raises: ValueError if no evaluation can give it."""
        ...

    def is_due(self, samples: int) -> bool:
        """Return True if an evaluator is due after the step that ends at `samples` samples."""
        ...

    def run(
        self, task: Task, samples: int, writer: RunWriter | None, check_stop: Callable[[], None]
    ) -> dict[str, Score]:
        """Run the evaluators that are due, and return their scores."""
        ...


class Trainer:
    """Trainer of one run. `__init__` resumes from the newest checkpoint, and `run` trains to the end.

    Args:
        setup: parts of the run; `setup.cfg.run.dir` is its directory.
        schedule: factor of the learning rate.
        evaluation: evaluations of the run with their intervals.

    Raises: ValueError if the newest checkpoint was made on other data or has another model.
    """

    def __init__(self, setup: Setup, schedule: Schedule, evaluation: Evaluation) -> None:
        started = time.perf_counter()
        self.setup, self.schedule, self.evaluation = setup, schedule, evaluation
        self.cfg, self.task, self.clock, self.device = cfg, task, clock, device = (
            setup.cfg, setup.task, setup.clock, setup.device,
        )  # fmt: skip
        self.folder, self.precision = Path(str(cfg.run.dir)), cfg.trainer.precision
        self.batch_size, self.num_steps = clock.batch_size, setup.num_steps
        self.log_every = Duration.parse(cfg.trainer.log_every, "trainer.log_every")
        self.checkpoint_every = Duration.parse(cfg.checkpoint.every, "checkpoint.every", wall_time=True)
        self.diagnose_every = (
            None
            if cfg.trainer.diagnose_every is None
            else Duration.parse(cfg.trainer.diagnose_every, "trainer.diagnose_every")
        )
        self.fingerprint = fingerprint_of(setup.streams)
        if setup.freeze.unreached:
            log.info("frozen, since no objective reaches them: %s", ", ".join(setup.freeze.unreached))
        if evaluation.without_data and distributed.is_main():
            log.warning(
                "eval: no set of data.val has what these need, which give no score: %s", evaluation.without_data
            )
        saved = resume.find_checkpoint(self.folder, self.num_steps, self.fingerprint)
        if distributed.is_main():
            store.prune(self.folder / "checkpoints", cfg.checkpoint.keep_last)
        if saved is None:
            if cfg.init_from is not None:
                init_from(task, cfg.init_from)
            task.after_init()
        self.gather_full = parallel.prepare(task, device, self.precision, cfg.parallel)
        if saved is not None:
            resume.load_task(saved, task)
        self.transfer = Transfer(device)
        self.rolls_back = cfg.trainer.spike.action == SpikeAction.rollback
        self.num_workers: int | None = None if cfg.data.workers == "auto" else cfg.data.workers
        self.writer: RunWriter | None = None
        self._begin(saved, started)
        if cfg.checkpoint.best is not None:
            evaluation.check_best(cfg.checkpoint.best, self.average is not None)

    def _begin(self, saved: Path | None, started: float, **changes: Any) -> None:
        """Set the training state to that of a checkpoint whose weights are loaded, or of a new run, and read from there on.

        Args:
            saved: the checkpoint; None for a new run.
            started: `time.perf_counter()` at the start of this process's part of the run.
            changes: values of the state that replace those of the checkpoint.
        """
        setup, cfg, task, clock, device = self.setup, self.cfg, self.task, self.clock, self.device
        self.optimizer = setup.optimizer()
        parallel.check_optimizer(self.optimizer)
        self.average = average_of(task, self.optimizer, cfg.trainer.ema_decay)
        loaded = TrainState() if saved is None else resume.load(saved, self.optimizer, self.average)
        if not self.rolls_back:  # other checkpoints will be due by the time that rollbacks are switched on again
            loaded.due_step = loaded.num_rollbacks = 0
        self.state = state = replace(loaded, **changes)
        spike, names = cfg.trainer.spike, list(task.objectives)
        self.spikes = (
            None
            if spike.action == SpikeAction.none
            else LossSpikes(names, state.losses, state.spike, spike.window, spike.threshold, device)
        )
        self.bad_steps = BadSteps(
            state.bad_steps, cfg.trainer.max_bad_steps, setup.streams, state.passed_over, clock, device
        )
        self.loss_scale = LossScale(self.precision, device, state.loss_scale, state.good_steps)
        setup.freeze.apply(TrainingProgress(state.samples, clock), setup.weights(state.samples))
        self.wrapped = parallel.wrap(task, device)
        if self.num_workers is None:
            self.num_workers = self._measured_workers()
        self.loader = build_loader(
            setup.streams, setup.tokenizer, clock, state.step, self.num_steps, distributed.rank(),
            distributed.world_size(), setup.num_micro_batches, self.num_workers, device.type == "cuda",
            state.passed_over,
        )  # fmt: skip
        self.flags = distributed.LateFlags()
        if state.spike and self.spikes is not None:
            self.flags.post(self.spikes.flags())  # the step's checkpoint was written before they were read
        self.results = state.summary()
        self.quarantine = Quarantine(self.folder / "quarantine.jsonl", cfg.data.max_bad_fraction, state.num_refused)
        self.saver = Saver(
            cfg, self.fingerprint, state, task, self.optimizer, self.average, self.loss_scale, self.bad_steps,
            self.spikes, self.quarantine, started,
        )  # fmt: skip
        self._mark_due(not state.spike)
        distributed.from_main(self._open_writer)

    def _open_writer(self) -> None:
        """Open the metrics for writing where the run starts or resumes. Raises: ValueError (see `RunWriter`)."""
        step, samples = self.state.step, self.state.samples
        if self.state.pending is not None:
            # The last step's evaluation was interrupted. It is repeated and logs the step's values, so drop that record.
            step, samples = step - 1, samples - self.batch_size
        self.writer = RunWriter(self.folder, step, samples, self.cfg.writer)
        self.writer.settings(identity.hparams(self.cfg))

    def run(self, complete_copy: Callable[[], None]) -> dict[str, float]:
        """Train to the end.

        Args:
            complete_copy: function called after a signal, once the run is saved and while further signals are ignored. If the
                process hangs, it is called in another thread.

        Returns: the last value of every score, and the numbers of steps, samples, seconds and pairs per second.
        Raises: TrainingError if the run cannot continue; SystemExit(85) after a signal, with a checkpoint. If the process
            hangs at a signal, another thread ends it with code 85 without unwinding the stack.
        """
        self.complete_copy = complete_copy
        with StopSignal(self._answer_signal) as stop:
            self.stop = stop
            try:
                if self.state.pending is not None:
                    self._evaluate()
                elif self.state.is_evaluated(self.num_steps):
                    self._write_results()  # the run is finished but results.json is missing
                while not self._loop():
                    self._roll_back()
            except Stopped:
                self.saver.finish()
                self._end(f"stopped by a signal at step {self.state.step}; {self.saver.rescue()}")
            except LoaderError as error:
                rescued = self.saver.rescue()
                if stop.received:
                    self._end(f"stopped by a signal at step {self.state.step}; {rescued}")
                where = f"step {self.state.step + 1}" if self.state.pending is None else "evaluation"
                raise TrainingError(f"{where}: {error}; {rescued}") from error
            except RuntimeError as error:
                if not distributed.is_lost_peer(error):
                    raise
                self._end_alone(error)
            finally:
                distributed.stop_watchdog()
        self._close()
        return self.results

    def _loop(self) -> bool:
        """Take steps to the end. Returns: False if the last step's loss is a spike for which the run has to roll back."""
        setup, state, options, device = self.setup, self.state, self.cfg.trainer, self.device
        self.window = Window()
        self.gradient_watch = GradientWatch()
        distributed.stop_watchdog()  # forgets how long the start took, which is no step
        with (
            closing(received(self.loader, self.cfg.data.timeout_seconds)) as batches,
            ProgressBar(self.num_steps, state.step, distributed.is_main()) as bar,
            profiled(self.folder / "profile", options.profile_steps if distributed.is_main() else 0) as profile_step,
        ):
            while state.step < self.num_steps:
                distributed.restart_watchdog()
                with self.window.waiting():
                    micro_batches = self._next(batches)
                refused = [refusal for batch in micro_batches for refusal in batch.refused]
                if state.step == 0 and self.writer is not None:
                    self.writer.pairs(micro_batches[0], self.setup.tokenizer)
                progress = TrainingProgress(state.samples, self.clock)
                weights = setup.weights(state.samples)
                micro_batches = [self.task.counted(batch, weights) for batch in micro_batches]
                if setup.freeze.apply(progress, weights):
                    self.wrapped = parallel.wrap(self.task, device)

                passes = autocast(device, self.precision)
                scale = self.loss_scale.scale
                diagnosis: dict[str, float] = {}
                if self._is_diagnosis_due():
                    diagnosis = self._diagnose(micro_batches, weights, passes, scale)
                lr_factor = self.schedule(state.samples, self.clock)
                optim.set_lr(self.optimizer, lr_factor)
                losses = self._forward_backward(micro_batches, weights, passes, scale)
                self.loss_scale.unscale(optim.gradients(self.optimizer))
                norms = optim.grad_norms(self.optimizer)
                if self.spikes is not None:
                    self.spikes.measure(losses)

                # Everything that waits for other processes comes before the update, which then cannot be interrupted halfway.
                before, after = state.samples, state.samples + self.batch_size
                is_last = state.step + 1 == self.num_steps
                known = self.flags.read()
                self.stop.share(known.get("stop", 0))
                self.bad_steps.check(known, state.step, self._is_rollback_due(known))
                if self._is_rollback_due(known):
                    return False
                self.quarantine.add(refused)
                self.window.add(self.batch_size)
                if options.clip_grad_norm is None and distributed.is_main():
                    self.gradient_watch.add(state.step + 1, norms["all"])
                values = diagnosis
                if self.clock.is_due(self.log_every, before, after) or is_last:
                    values |= self._measure(losses, weights, norms, lr_factor, bar)

                with self.saver.step():
                    is_spike = None if self.spikes is None else self.spikes.update()
                    skipped = optim.guarded_step(self.optimizer, norms["all"], options.clip_grad_norm, is_spike)
                    self.task.after_step(progress, skipped)
                    self.loss_scale.update(norms["all"])
                    if self.average is not None:
                        self.average.update(progress, skipped)
                    self.bad_steps.update(skipped)
                    state.step, state.samples = state.step + 1, after
                    is_evaluated = is_last or self.evaluation.is_due(after)
                    if is_evaluated:
                        state.pending = values
                    else:
                        self._log(values)
                self._post_flags(skipped)
                bar.advance(state.step)
                profile_step()
                with self.window.paused():
                    is_due = self._is_checkpoint_due()
                    if is_last or (known.get("stop") and not is_evaluated) or (is_due and self.rolls_back):
                        last = self.flags.read()
                        self.bad_steps.check(last, state.step, self._is_rollback_due(last))
                        if self._is_rollback_due(last):
                            return False
                        self._mark_due(not spikes_in(last))
                    if is_due or known.get("save") or known.get("stop"):
                        # Save before the evaluation, which may fail or be killed.
                        self.saver.save()
                    if is_evaluated:
                        self._evaluate()
                if known.get("stop") and not is_last:
                    self.saver.finish()
                    self._end(f"stopped by a signal at step {state.step}; the same command goes on from there")
        return True

    def _is_diagnosis_due(self) -> bool:
        """Return True if the next step is the first one, or the first at or after a multiple of `trainer.diagnose_every`."""
        every, begins = self.diagnose_every, self.state.samples
        return every is not None and self.clock.is_due(every, begins - self.batch_size, begins)

    def _diagnose(
        self, micro_batches: list[Batch], weights: Mapping[str, float], passes: torch.autocast, scale: Tensor | None
    ) -> dict[str, float]:
        """Measure each objective's share of the step, and log pictures of its examples. A collective."""
        with self.window.paused():
            micro_batches = [self.transfer(batch) for batch in micro_batches]
            values = diagnose(self.task, micro_batches, weights, passes, scale)
            task = self.gather_full()
            if self.writer is not None:
                for name, examples in show_examples(
                    task, micro_batches[0], weights, passes, self.setup.tokenizer.decode
                ):
                    self.writer.examples(f"objectives/{name}", self.state.samples, examples)
        return values

    def _forward_backward(
        self, micro_batches: list[Batch], weights: Mapping[str, float], passes: torch.autocast, scale: Tensor | None
    ) -> StepLosses:
        """Compute the step's gradients. Raises: TrainingError if `trainer.detect_anomaly` found NaN in a gradient."""
        try:
            return forward_backward(self.wrapped, self.task, micro_batches, weights, passes, scale, self.transfer.start)
        except RuntimeError as error:
            if not (torch.is_anomaly_enabled() and "returned nan values" in str(error)):
                raise
            raise TrainingError(
                f"step {self.state.step + 1}: {str(error).splitlines()[0]} the forward operation is traced above"
            ) from error

    def _measured_workers(self) -> int:
        """Measure the number of decoding processes without training. A collective."""

        upcoming, weights = self.setup.micro_batches(self.state.step), self.setup.weights(self.state.samples)

        def step(batches: list[Batch]) -> None:
            passes = autocast(self.device, self.precision)
            forward_backward(self.task, self.task, batches, weights, passes, self.loss_scale.scale)
            self.task.zero_grad()

        with unchanged_buffers(self.task):
            return measured_workers(upcoming, step, self.device, min(self.setup.num_micro_batches, 2))

    def _next(self, batches: Iterator[Batch]) -> list[Batch]:
        """Return the micro-batches of a step. Raises: TrainingError if data cannot be read; LoaderError if loading fails."""
        try:
            return [next(batches) for _ in range(self.setup.num_micro_batches)]
        except LoaderError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            self.quarantine.write_waiting()
            # A worker's error contains its traceback; the last line is the message.
            raise TrainingError(f"the data cannot be read: {str(error).strip().splitlines()[-1]}") from error

    def _check_stop(self) -> None:
        """Check for signals between evaluation batches. A collective. Raises: Stopped on all ranks if one got a signal."""
        distributed.restart_watchdog()
        largest = distributed.all_reduce_max(torch.tensor(float(self.stop.shared()), device=self.device)).item()
        self.stop.share(largest)
        if largest > 0:
            raise Stopped

    def _post_flags(self, skipped: Tensor) -> None:
        """Send this step's flags to the other ranks, which read them one step later."""
        every = self.checkpoint_every
        overdue = every.unit == "min" and time.perf_counter() - self.saver.saved_at > 60 * every.value
        self.flags.post(
            {
                "skipped": skipped,
                "bad_steps": self.bad_steps.in_a_row,
                **({} if self.spikes is None else self.spikes.flags()),
                # `full` fills on the device, which avoids a synchronising copy.
                "stop": torch.full((), self.stop.shared(), device=self.device),
                "save": torch.full(
                    (), self.stop.take_save() or (overdue and distributed.is_main()), device=self.device
                ),
            }
        )

    def _is_checkpoint_due(self) -> bool:
        """Return True if the last step has a checkpoint, whenever the run is stopped; see `checkpoint.every`."""
        every, after = self.checkpoint_every, self.state.samples
        is_saved = every.unit != "min" and self.clock.is_due(every, after - self.batch_size, after)
        return is_saved or self.state.step == self.num_steps or self.evaluation.is_due(after)

    def _mark_due(self, is_good: bool) -> None:
        """Note that rollbacks go to the last step's checkpoint if it is due, and the step was no spike."""
        state = self.state
        if self.rolls_back and is_good and 0 < state.step != state.due_step and self._is_checkpoint_due():
            state.due_step, state.num_rollbacks = state.step, 0

    def _is_rollback_due(self, flags: Mapping[str, float]) -> bool:
        """Return True if the flags of the last step tell of a spike, and there is a checkpoint to go back to."""
        return self.rolls_back and bool(spikes_in(flags)) and self.state.due_step > 0

    def _roll_back(self) -> None:
        """Go back to the last checkpoint that was due, and pass over the samples read since then. A collective.

        A damaged checkpoint is passed over for the one before.

        Raises: TrainingError if there is no whole checkpoint, or after `trainer.max_bad_steps` rollbacks to it.
        """
        state, streams = self.state, self.setup.streams
        if state.num_rollbacks == (limit := self.cfg.trainer.max_bad_steps):
            raise TrainingError(
                f"step {state.step}: a loss spike again after {limit} rollbacks to step {state.due_step}, the limit is "
                f"trainer.max_bad_steps = {limit}: lower optimizer.lr, clip the gradient, or raise trainer.spike.threshold"
            )
        self.saver.finish()
        try:
            path = distributed.from_main(lambda: store.go_back(self.saver.folder, state.due_step))
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"step {state.step}: a loss spike, but no rollback: {error}; trainer.spike.action=skip goes on without one"
            ) from error
        step = resume.read_state(path).step
        self.quarantine.flush(state.samples)
        passed_over = {
            name: state.passed_over.get(name, 0)
            + step_range(stream.batch_size, state.step - 1, self.clock).stop
            - step_range(stream.batch_size, step, self.clock).start
            for name, stream in streams.items()
        }
        log.warning(
            "step %d: rolled back to step %d; the samples of the steps since then are passed over",
            state.step, step,
        )  # fmt: skip
        self._close()
        with self.saver.step():
            self.task.zero_grad(set_to_none=True)
            resume.load_task(path, self.task)
            self.setup.freeze.reset()
            self._begin(
                path, time.perf_counter(), passed_over=passed_over, due_step=step, num_rollbacks=state.num_rollbacks + 1,
                wall_seconds=self.saver.wall_seconds,
            )  # fmt: skip

    def _measure(
        self,
        losses: StepLosses,
        weights: Mapping[str, float],
        norms: Mapping[str, Tensor],
        lr_factor: float,
        bar: ProgressBar,
    ) -> dict[str, float]:
        """Return the logged values of the step before its update, and start a new window. A collective."""
        step, samples = self.state.step + 1, self.state.samples + self.batch_size
        self.quarantine.flush(samples)
        # Read values from the device first: the time below then includes all submitted work.
        values = train_values(losses, weights, norms, self.task)
        self.gradient_watch.check()
        scheduled = [name for name, value in self.setup.scheduled_weights.items() if not value.is_constant]
        values |= {f"train/{name}_weight": weights[name] for name in scheduled}
        values["train/lr"] = self.optimizer.defaults["lr"] * lr_factor
        values["system/wall_seconds"] = self.saver.wall_seconds
        values |= self.window.values(self.device)
        self.state.train_seconds += self.window.seconds
        speed = values["system/samples_per_second"]
        seconds_left = (self.clock.total_samples - samples) / speed
        bar.show(step, values["train/loss"], speed, seconds_left)
        self.window = Window()
        return values

    def _log(self, values: Mapping[str, float]) -> None:
        if values and self.writer is not None:
            self.writer.scalars(self.state.step, self.state.samples, values)

    def _evaluate(self) -> None:
        """Evaluate the last step after its checkpoint is written, and log its values and scores. A collective.

        If the evaluation is killed, a resumed run repeats it: the step counts as evaluated once scores.json exists.

        Raises: Stopped if a rank received a signal.
        """
        state, had_run_all = self.state, self.evaluation.has_run_all
        scores = self._scores() if self.evaluation.is_due(state.samples) else {}
        is_best = self._is_best(scores)
        state.results.update(scores)
        if self.evaluation.has_run_all and not had_run_all:
            self._check_best()
        state.best = scores[str(self.cfg.checkpoint.best)] if is_best else state.best
        self._log({**(state.pending or {}), **scores})
        self.saver.finish()
        if state.step == self.num_steps:
            self._write_results()
        if self.writer is not None:
            path = store.path_of(self.saver.folder, state.step)
            if is_best:
                store.mark_best(path, self.cfg.checkpoint.keep_last)
            store.write_scores(path, state.results, state.best)
        state.pending = None

    def _scores(self) -> dict[str, Score]:
        """Return the scores of the evaluators that are due, also for the averaged weights if there are any. A collective."""
        samples = self.state.samples
        scores = self.evaluation.run(self.gather_full(), samples, self.writer, self._check_stop)
        if scores and self.average is not None:
            with self.average.applied():
                averaged = self.evaluation.run(self.gather_full(), samples, None, self._check_stop)
            scores |= {name.replace("/", "-ema/", 1): score for name, score in averaged.items()}
        if scores:
            log.info("step %d  %s", self.state.step, "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            if distributed.is_main():
                write_intervals(self.folder, scores)
        return scores

    def _is_best(self, scores: Mapping[str, float]) -> bool:
        """Return True if the metric `checkpoint.best` improves on all earlier values (see `is_better`)."""
        name = self.cfg.checkpoint.best
        return name is not None and name in scores and is_better(name, scores[name], self.state.best)

    def _check_best(self) -> None:
        """Warn if no evaluator gives the metric `checkpoint.best`; called once all have run."""
        name, known = self.cfg.checkpoint.best, self.state.results
        if name is not None and name not in known and distributed.is_main():
            log.warning("checkpoint.best is %r, which no evaluation gives; they give: %s", name, ", ".join(known))

    def _answer_signal(self, seconds: float) -> None:
        """End the process from another thread if the loop hangs after a signal, waiting for data or for a lost process."""
        if seconds < _STOP_SECONDS or not self.saver.lock.acquire(blocking=False):
            return
        limit = _STOP_WRITING_SECONDS if self.saver.is_writing else _STOP_UNSAVED_SECONDS
        if not self.saver.can_rescue() and seconds < limit:
            self.saver.lock.release()
            return
        code = PREEMPTED_EXIT_CODE
        try:
            log.warning("stopped by a signal at step %d; %s", self.state.step, self.saver.rescue())
            self._close()
            self.complete_copy()
            code = self.stop.exit_code()
        except Exception:  # the process must end after any error
            traceback.print_exc()
        finally:
            for worker in multiprocessing.active_children():  # a stopped worker would outlive this process
                worker.kill()
            os._exit(code)

    def _end(self, message: str) -> NoReturn:
        """Log a message and exit after a signal, with code 85 or the one of a job that is requeued."""
        log.warning(message)
        self._close()
        with self.saver.lock:  # no hang, which `_answer_signal` would end
            self.complete_copy()
        # Last, since the job may be killed as soon as it is requeued.
        sys.exit(self.stop.exit_code())

    def _end_alone(self, error: RuntimeError) -> NoReturn:
        """End after another process was lost: save a checkpoint if possible, and report the lost ranks.

        Raises: TrainingError on the lowest remaining rank; SystemExit on the others, and with code 85 after a signal.
        """
        step = self.state.step + 1
        absent = distributed.absent_ranks()
        rescued = self.saver.rescue()
        if self.stop.received:
            self._end(f"stopped by a signal at step {self.state.step}; {rescued}")
        if any(rank not in absent for rank in range(distributed.rank())):  # a lower rank reports
            sys.exit(1)
        named = ", ".join(map(str, absent))
        lost = (
            f"rank {named} is lost: killed, stopped, or hanging (see its stderr)" if absent else "a collective failed"
        )
        reason = distributed.reason_of(error)
        limit = f"parallel.timeout_seconds = {self.cfg.parallel.timeout_seconds:g}"
        raise TrainingError(f"step {step}: {lost} ({reason}; {limit}); {rescued}") from error

    def _write_results(self) -> None:
        """Write results.json. The last step's scores.json, which marks the run as finished, must be written after it."""
        self.state.wall_seconds = self.saver.wall_seconds
        self.results = self.state.summary()
        if distributed.is_main():
            files.write_text(self.folder / "results.json", json.dumps(finite(self.results), indent=2) + "\n")
        if self.writer is not None:
            self.writer.hparams(identity.hparams(self.cfg), ["train/loss", *self.state.results])

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
