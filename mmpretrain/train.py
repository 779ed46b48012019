"""Pre-train a model: python -m mmpretrain.train experiment=quickstart [overrides]."""

if __name__ == "__main__":
    # By its own name, under which the processes of a sweep's launcher find the job; __main__ is another module there.
    from mmpretrain.training import stop_signal

    stop_signal.train()
    raise SystemExit

import fcntl
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import hydra
import torch
from omegaconf import DictConfig

from mmpretrain import build, distributed, errors, files
from mmpretrain.checkpoints import store
from mmpretrain.checkpoints.untrusted import TOKENIZER_FOLDER
from mmpretrain.config import command_line, instantiate, resolve
from mmpretrain.config.schema import TrainConfig
from mmpretrain.data.stream import Stream
from mmpretrain.data.tokenizer import Tokenizer, tokenizer_files
from mmpretrain.evals.base import Context, Evaluation, chosen_sets
from mmpretrain.evals.embeddings import CheckStop, go_on
from mmpretrain.reporting import report
from mmpretrain.reporting.metrics import print_results, read_results
from mmpretrain.schedules import Duration, Now, Schedule, Value, scheduled_values
from mmpretrain.training import dry_run, parallel, resume
from mmpretrain.training.freeze import Freeze
from mmpretrain.training.guards import LogFile, TrainingError, enough_space
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
        lock = _open_run(cfg, folder, schedule)
        clock = clock_of(streams, options.duration)
        fingerprint = {f"data.train.{name}": stream.fingerprints for name, stream in streams.items()}
        total_steps = clock.total_samples // clock.batch_size
        if (finished := _finished(folder, total_steps, fingerprint, options.keep_last)) is not None:
            log.info("%s is finished; for another run change run.name or an override", folder)
            _conclude(finished, folder, rewrite=False)
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
            files.write_text(folder / "config.yaml", resolve.to_yaml(resolve.to_plain(cfg)))
            _keep_tokenizer(cfg, folder)
    with enough_space(folder):
        with torch.autograd.set_detect_anomaly(cfg.trainer.detect_anomaly):
            results = trainer.run()
        _conclude(results, folder, rewrite=True)
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


def _keep_tokenizer(cfg: TrainConfig, folder: Path) -> None:
    """A local tokenizer's files into the run's directory. Raises: ValueError if the run was made with another one."""
    if (path := cfg.data.tokenizer.get("path")) is None:
        return
    kept = folder / TOKENIZER_FOLDER
    for name, file in tokenizer_files(Path(path)).items():
        if (kept / name).exists() and (kept / name).read_bytes() != file.read_bytes():
            raise ValueError(
                f"data.tokenizer.path={path} is not the tokenizer that {folder} was made with, which is {kept}"
            )
        kept.mkdir(exist_ok=True)
        files.write_bytes(kept / name, file.read_bytes())


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


def _open_run(cfg: TrainConfig, folder: Path, schedule: Schedule) -> TextIO | None:
    """Claim the run's directory on process 0: another configuration or another process in it is refused everywhere."""
    lock, refusal = None, None
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_links(folder)
            lock = (folder / ".lock").open("a")
            # A POSIX lock: unlike flock's, the loader's forked workers, which outlive a kill by seconds, do not hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except errors.UsageError as error:
            refusal = str(error)
        except BlockingIOError:
            refusal = f"{folder} is in use by another process; wait for it, or choose another run.name"
        except OSError as error:
            refusal = f"run.dir is {str(folder)!r}, which cannot be written ({error.strerror}); choose another folder"
        refusal = refusal or _check_configuration(cfg, folder, schedule)
    refusal = distributed.broadcast_object(refusal)
    if refusal is not None:
        raise errors.UsageError(refusal)
    _log_to(folder)
    return lock


def _check_links(folder: Path) -> None:
    """Raises: UsageError if a part of a run's directory is a link: a run that others made would write elsewhere."""
    for path in folder.iterdir():
        if path.is_symlink():
            raise errors.UsageError(
                f"{path} is a symbolic link, through which the run would write elsewhere; expected a file or a folder: "
                f"remove it, or link {folder} as a whole"
            )


def _check_configuration(cfg: TrainConfig, folder: Path, schedule: Schedule) -> str | None:
    """What a run's directory was made with that may not change, if it differs now."""
    path = folder / "config.yaml"
    if not path.exists():
        return None
    now, values = resolve.to_plain(cfg), resolve.to_values(cfg)
    depends = (
        schedule.depends_on_total()
        or any(value.depends_on_total() for value in scheduled_values(values))
        or any(str(until).endswith("%") for until in (cfg.trainer.freeze or {}).values())
    )
    changed = resolve.differences(resolve.read(path), now, () if depends else ("trainer.duration",), values)
    if not changed:
        return None
    return (
        f"{folder} was made with another configuration ({'; '.join(changed)}); "
        "expected the same to go on: undo the change, or start a new run with run.name=..."
    )


def _log_to(folder: Path) -> None:
    """Messages go to the console and, from process 0, to train.log."""
    logging.captureWarnings(True)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if distributed.is_main():
        handlers.append(LogFile(folder / "train.log"))
    for handler in handlers:
        handler.addFilter(_make_printable)
    level = logging.INFO if distributed.is_main() else logging.WARNING
    logging.basicConfig(
        level=level, handlers=handlers, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )


def _make_printable(record: logging.LogRecord) -> bool:
    """Control characters of a message as escapes: the names of samples and shards are the data's."""
    record.msg, record.args = "\n".join(map(errors.printable, record.getMessage().splitlines())), None
    return True


def _finished(
    folder: Path, num_steps: int, fingerprint: Mapping[str, Any], keep_last: int
) -> dict[str, float | None] | None:
    """The scores of a run whose last step is saved, and which then keeps no more than it should; on every process.

    Raises: ValueError if it was trained on other data.
    """

    def look() -> dict[str, float | None] | None:
        if not (folder / "results.json").exists():
            return None
        path = store.find_latest(folder / "checkpoints", set_aside=True)
        if path is None or not resume.read_state(path).is_evaluated(num_steps):
            return None
        resume.check_fingerprint(path, fingerprint)
        store.prune(folder / "checkpoints", keep_last)
        return read_results(folder / "results.json")

    return distributed.from_main(look)


def _conclude(results: Mapping[str, float | None], folder: Path, rewrite: bool) -> None:
    """Write the run's report, unless it is finished and came to it before, and say the results."""
    if distributed.is_main():
        if rewrite or not (folder / report.FILE).exists():
            report.write(folder)
        print_results(results, folder)
