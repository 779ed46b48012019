"""Pre-train a model: python -m mmpretrain.train experiment=quickstart [overrides]."""

if __name__ == "__main__":
    # Run the job from the module's own name: the processes of a sweep's launcher import it, and __main__ differs there.
    from mmpretrain.training import stop_signal

    stop_signal.train()
    raise SystemExit

import logging
from collections.abc import Mapping
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from mmpretrain import build, distributed, errors
from mmpretrain.config import command_line, instantiate, resolve
from mmpretrain.config.schema import TrainConfig
from mmpretrain.errors import TrainingError, enough_space
from mmpretrain.evals.base import Context, Evaluation, check_best, chosen_sets
from mmpretrain.evals.embeddings import CheckStop, go_on
from mmpretrain.schedules import Duration, Schedule
from mmpretrain.training import run_dir
from mmpretrain.training.dry_run import dry_run
from mmpretrain.training.precision import autocast
from mmpretrain.training.setup import Setup, clock_of
from mmpretrain.training.task import Task
from mmpretrain.training.trainer import Trainer
from mmpretrain.training.workers import own_cores

log = logging.getLogger(__name__)


def main() -> None:
    """Run the command."""
    command_line.entry("train", _hydra_main)


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
    """Run a training configuration: build the parts, start or resume the run, train, and return the results.

    A finished run only returns its results, and a dry run returns its estimated costs.

    Raises: UsageError for a usage error, before training; TrainingError if the run cannot continue.
    """
    with errors.usage_errors(), enough_space(Path(str(cfg.run.dir))):
        device = build.device_of(cfg.trainer.device)
        distributed.setup(device, cfg.parallel.timeout_seconds)
        schedule: Schedule = instantiate.instantiate(cfg.schedule, cfg.run.seed, "schedule")
        folder = Path(str(cfg.run.dir))
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
                autocast=autocast(device, cfg.trainer.precision),
            )

        context = evaluation_context(task)
        evaluated = {each for name, evaluator in evaluators.items() for each in chosen_sets(name, evaluator, context)}
        check_best(cfg.checkpoint.best, evaluated)
        clock = clock_of(streams, Duration.parse(cfg.trainer.duration, "trainer.duration"))
        task = task.to(device)
        if cfg.trainer.dry_run:
            return dry_run(Setup(cfg, clock, task, weights, streams, tokenizer))
        # Keep the file open until the end of the run: closing it would release the lock.
        lock = run_dir.open_run(cfg, folder, schedule)
        if (scores := run_dir.finished(folder, clock, streams, cfg.checkpoint.keep_last)) is not None:
            log.info("%s is finished; for another run change run.name or an override", folder)
            run_dir.conclude(scores, folder, rewrite=False)
            return scores
        evaluation = Evaluation(evaluators, every, clock, evaluation_context)
        trainer = Trainer(Setup(cfg, clock, task, weights, streams, tokenizer), schedule, evaluation)
        if distributed.is_main():
            # Written last: after a usage error above, the corrected configuration must not conflict with a saved one.
            run_dir.write_configuration(cfg, folder)
    with enough_space(folder):
        with torch.autograd.set_detect_anomaly(cfg.trainer.detect_anomaly):
            results = trainer.run()
        run_dir.conclude(results, folder, rewrite=True)
    if lock is not None:
        lock.close()
    return results
