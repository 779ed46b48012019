"""Pre-train a model: python -m mmpretrain.train experiment=quickstart [overrides]."""

if __name__ == "__main__":
    # By its own name, under which the processes of a sweep's launcher find the job; __main__ is another module there.
    from mmpretrain.training import stop_signal

    stop_signal.train()
    raise SystemExit

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from mmpretrain import build, distributed, errors
from mmpretrain.config import command_line, instantiate, resolve
from mmpretrain.config.schema import TrainConfig
from mmpretrain.data.stream import Stream
from mmpretrain.data.tokenizer import Tokenizer
from mmpretrain.errors import TrainingError, enough_space
from mmpretrain.evals.base import Context, Evaluation, chosen_sets
from mmpretrain.evals.embeddings import CheckStop, go_on
from mmpretrain.schedules import Duration, Now, Schedule, Value
from mmpretrain.training import dry_run, parallel, run_dir
from mmpretrain.training.freeze import Freeze
from mmpretrain.training.init_from import init_from
from mmpretrain.training.parallel import Parallel
from mmpretrain.training.precision import autocast
from mmpretrain.training.setup import clock_of, count_micro_batches, example_batch, micro_batches, weights_at
from mmpretrain.training.task import Task
from mmpretrain.training.trainer import Trainer, TrainerOptions
from mmpretrain.training.workers import own_cores

log = logging.getLogger(__name__)


def main() -> None:
    """The command."""
    command_line.entry(_hydra_main)


@hydra.main(version_base="1.3", config_path="pkg://mmpretrain.conf", config_name="train")
def _hydra_main(cfg: DictConfig) -> None:
    with command_line.job():
        try:
            train(resolve.resolve(cfg))
        except TrainingError as error:
            log.error("error: %s", error)
            command_line.end_job(1)
        except RuntimeError as error:
            if not distributed.is_lost_peer(error):
                raise
            absent = ", ".join(map(str, distributed.absent_ranks())) or "unknown"
            log.error("error: before training began, rank %s was lost (%s)", absent, distributed.reason_of(error))
            command_line.end_job(1)
        finally:
            distributed.shut_down()


def train(cfg: TrainConfig) -> Mapping[str, float | None]:
    """Carry out a configuration: build the parts, resume or begin, train, and return the scores.

    Raises: usage.UsageError before anything is computed; TrainingError if the run cannot go on.
    """
    with errors.usage_errors(), enough_space(Path(str(cfg.run.dir))):
        device = build.device_of(cfg.trainer.device)
        distributed.setup(device, cfg.parallel.timeout_seconds)
        schedule: Schedule = instantiate.instantiate(cfg.schedule, cfg.run.seed, "schedule")
        folder = Path(str(cfg.run.dir))
        options = _options(cfg)
        task, weights = build.build_task(cfg)
        streams = build.build_streams(cfg, task)
        tokenizer = build.build_tokenizer(cfg.data.tokenizer, task)
        sets = build.build_eval_sets(cfg.data.val, cfg.data.root, task.model, cfg.data.max_image_bytes)
        evaluators, every = build.build_evaluators(cfg.eval, cfg.trainer.eval_every)

        def evaluation_context(task: Task, check_stop: CheckStop = go_on) -> Context:
            return Context(
                model=task.model,
                tokenizer=tokenizer,
                sets=sets,
                logit_scale=task.logit_scale,
                batch_size=cfg.data.val_batch_size,
                workers=own_cores() if cfg.data.workers == "auto" else cfg.data.workers,
                timeout_seconds=cfg.data.timeout_seconds,
                check_stop=check_stop,
                autocast=autocast(device, options.precision),
            )

        for name, evaluator in evaluators.items():
            chosen_sets(name, evaluator, evaluation_context(task))
        if cfg.trainer.dry_run:
            return _dry_run(cfg, task.to(device), streams, tokenizer, weights, options)
        # Not closed before the run's end: closing it would free the directory.
        lock = run_dir.open_run(cfg, folder, schedule)
        clock = clock_of(streams, options.duration)
        fingerprint = {f"data.train.{name}": stream.fingerprints for name, stream in streams.items()}
        total_steps = clock.total_samples // clock.batch_size
        if (finished := run_dir.finished(folder, total_steps, fingerprint, options.keep_last)) is not None:
            log.info("%s is finished; for another run change run.name or an override", folder)
            run_dir.conclude(finished, folder, rewrite=False)
            return finished

        trainer = Trainer(
            task=task.to(device),
            streams=streams,
            tokenizer=tokenizer,
            make_optimizer=_make_optimizer(cfg),
            schedule=schedule,
            weights=weights,
            evaluation=Evaluation(evaluators, every, clock, evaluation_context),
            options=options,
            fingerprint=fingerprint,
            folder=folder,
            device=device,
            hparams=resolve.hparams(cfg),
            initialize=None if cfg.init_from is None else lambda task: init_from(task, str(cfg.init_from)),
        )
        if distributed.is_main():
            # Only now: what is refused above leaves no configuration behind that the corrected one would differ from.
            run_dir.write_configuration(cfg, folder)
    with enough_space(folder):
        with torch.autograd.set_detect_anomaly(cfg.trainer.detect_anomaly):
            results = trainer.run()
        run_dir.conclude(results, folder, rewrite=True)
    if lock is not None:
        lock.close()
    return results


def _dry_run(
    cfg: TrainConfig,
    task: Task,
    streams: Mapping[str, Stream],
    tokenizer: Tokenizer,
    weights: Mapping[str, Value],
    options: TrainerOptions,
) -> Mapping[str, float]:
    """Say what the run would cost, and leave nothing behind."""
    clock = clock_of(streams, options.duration)
    example = example_batch(streams, tokenizer, clock).to(task.model.device)
    first_weights = weights_at(weights, Now(0, clock))
    freeze = Freeze(task, options.freeze, parallel.reached_parameters(task, example))
    freeze.check_trains(weights, clock)
    freeze.apply(Now(0, clock), first_weights)
    num_micro_batches = count_micro_batches(cfg.trainer.batch_size, options.micro_batch_size, task)
    parallel.settle_randomness(task, example, num_micro_batches)
    batch = next(micro_batches(streams, tokenizer, clock, num_micro_batches)).to(task.model.device)
    # Whole and not compiled, so that operations can be counted; what is kept and what is computed again is the run's.
    measured = Parallel("ddp", options.parallel.activation_checkpointing)
    parallel.prepare(task, task.model.device, options.precision, measured)
    costs = dry_run.estimate(
        task, batch, first_weights, _make_optimizer(cfg), options.precision, len(next(iter(batch.streams.values()))),
        num_micro_batches, has_average=options.ema_decay is not None,
        num_shards=distributed.world_size() if options.parallel.strategy == "fsdp" else 1,
    )  # fmt: skip
    dry_run.show(costs, clock.total_samples // clock.batch_size, num_micro_batches, str(task.model.device))
    return {"flops_per_pair": costs.flops_per_pair, "memory_bytes": costs.memory_bytes}


def _make_optimizer(cfg: TrainConfig) -> Callable[[Task], torch.optim.Optimizer]:
    """The optimiser of a task whose frozen parameters are known."""
    return lambda task: instantiate.instantiate(cfg.optimizer, cfg.run.seed, "optimizer")(task.named_parameters())


def _options(cfg: TrainConfig) -> TrainerOptions:
    duration = Duration.parse(cfg.trainer.duration, "trainer.duration")
    if duration.unit == "%":
        raise ValueError(
            f"trainer.duration is {cfg.trainer.duration!r}, a part of itself; expected epochs, samples or steps"
        )
    if not duration.value > 0:
        raise ValueError(f"trainer.duration is {cfg.trainer.duration!r}; expected a length above 0, such as 20epochs")
    return TrainerOptions(
        duration=duration,
        micro_batch_size=cfg.trainer.micro_batch_size,
        precision=cfg.trainer.precision.value,
        clip_grad_norm=cfg.trainer.clip_grad_norm,
        ema_decay=None if cfg.trainer.ema_decay is None else Value(cfg.trainer.ema_decay, "trainer.ema_decay"),
        freeze={
            part: None if until is None else Duration.parse(until, f"trainer.freeze.{part}")
            for part, until in (cfg.trainer.freeze or {}).items()
        },
        log_every=Duration.parse(cfg.trainer.log_every, "trainer.log_every"),
        diagnose_every=None
        if cfg.trainer.diagnose_every is None
        else Duration.parse(cfg.trainer.diagnose_every, "trainer.diagnose_every"),
        checkpoint_every=Duration.parse(cfg.checkpoint.every, "checkpoint.every", wall_time=True),
        keep_last=cfg.checkpoint.keep_last,
        best=cfg.checkpoint.best,
        max_bad_steps=cfg.trainer.max_bad_steps,
        max_bad_fraction=cfg.data.max_bad_fraction,
        profile_steps=cfg.trainer.profile_steps,
        workers=None if cfg.data.workers == "auto" else cfg.data.workers,
        data_timeout_seconds=cfg.data.timeout_seconds,
        parallel=Parallel(
            cfg.parallel.strategy.value,
            cfg.parallel.activation_checkpointing.value,
            cfg.parallel.compile,
            cfg.parallel.timeout_seconds,
        ),
    )
