"""Pre-train a model: python -m mmpretrain.train experiment=quickstart [overrides]."""

if __name__ == "__main__":
    # Run the job from the module's own name: the processes of a sweep's launcher import it, and __main__ differs there.
    from mmpretrain.training import stop_signal

    stop_signal.train()
    raise SystemExit

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from mmpretrain import build, build_evaluation, distributed, errors
from mmpretrain.config import command_line, instantiate, resolve
from mmpretrain.config.schema import TrainConfig
from mmpretrain.errors import TrainingError, enough_space
from mmpretrain.reporting.writers import check_writers
from mmpretrain.schedules import Duration, Schedule
from mmpretrain.training import run_dir
from mmpretrain.training.dry_run import dry_run
from mmpretrain.training.setup import Setup, clock_of
from mmpretrain.training.trainer import Trainer

log = logging.getLogger(__name__)


@command_line.command("train", resolve.resolve)
def main(cfg: TrainConfig) -> None:
    """Run the command."""
    try:
        train(cfg)
    except TrainingError as error:
        message = str(error)
    except RuntimeError as error:
        if not distributed.is_lost_peer(error):
            raise
        absent = ", ".join(map(str, distributed.absent_ranks())) or "unknown"
        message = f"before training began, rank {absent} was lost ({distributed.reason_of(error)})"
    else:
        return
    log.error("error: %s", message)
    raise command_line.JobFailed(message)


def train(cfg: TrainConfig) -> Mapping[str, float | None]:
    """Run a training configuration: build the parts, start or resume the run, train, and return the results.

    A finished run only returns its results, and a dry run returns its estimated costs.

    Raises: UsageError for a usage error, before training; TrainingError if the run cannot continue.
    """
    with errors.usage_errors(), enough_space(Path(str(cfg.run.dir))):
        check_writers(cfg.writer)
        device = build.device_of(cfg.trainer.device, "trainer.device")
        distributed.setup(device, cfg.parallel.timeout_seconds)
        distributed.restart_watchdog()
        schedule: Schedule = instantiate.instantiate(cfg.schedule, cfg.run.seed, "schedule")
        folder = Path(str(cfg.run.dir))
        task, weights = build.build_task(cfg)
        streams = build.build_streams(cfg, task)
        tokenizer = build.build_tokenizer(cfg.data.tokenizer, task)
        clock = clock_of(streams, Duration.parse(cfg.trainer.duration, "trainer.duration"))
        evaluation = build_evaluation.build_evaluation(cfg, task, tokenizer, clock, device)
        task = task.to(device)
        if cfg.trainer.dry_run:
            return dry_run(Setup(cfg, clock, task, weights, streams, tokenizer))
        # Keep the file open until the end of the run: closing it would release the lock.
        lock, run_copy = run_dir.open_run(cfg, folder, schedule, clock, streams)
        if (scores := run_dir.finished(folder, clock, streams, cfg.checkpoint.keep_last)) is not None:
            log.info("%s is finished; for another run change run.name or an override", folder)
            with run_copy:  # which an earlier process may have left incomplete
                run_dir.conclude(scores, folder, rewrite=False)
            return scores
        distributed.restart_watchdog()
        trainer = Trainer(Setup(cfg, clock, task, weights, streams, tokenizer), schedule, evaluation)
        if distributed.is_main():
            # Written last: after a usage error above, the corrected configuration must not conflict with a saved one.
            run_dir.write_configuration(cfg, folder)
            run_dir.write_facts(trainer.setup, folder)
    with enough_space(folder), run_copy as complete_copy:
        with torch.autograd.set_detect_anomaly(cfg.trainer.detect_anomaly):
            results = trainer.run(complete_copy)
        run_dir.conclude(results, folder, rewrite=True)
    if lock is not None:
        lock.close()
    return results
