"""A run's directory, locked by one run and written by rank 0.

`open_run` locks the directory and fetches the run from its copy, `write_configuration` writes config.yaml, `write_facts`
writes run.json, `finished` returns the scores of a finished run, and `conclude` writes the report. A run is finished once its
last step is evaluated. `mmpretrain.checkpoints.store` writes checkpoints, and `mmpretrain.reporting.writers` writes metrics.
"""

import fcntl
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from mmpretrain import distributed, errors, files, optim
from mmpretrain.checkpoints import store
from mmpretrain.checkpoints.load import class_names
from mmpretrain.checkpoints.untrusted import HUGGINGFACE_FOLDER, TOKENIZER_FOLDER, huggingface_nodes
from mmpretrain.config import config_yaml, identity
from mmpretrain.config.schema import TrainConfig
from mmpretrain.data.classes import first_other
from mmpretrain.data.source import Fingerprint
from mmpretrain.data.stream import Stream
from mmpretrain.data.tokenizer import tokenizer_files
from mmpretrain.models.huggingface import CONFIG_FILE
from mmpretrain.objectives.base import hooks_of
from mmpretrain.reporting import report
from mmpretrain.reporting.progress import print_results
from mmpretrain.reporting.records import read_intervals, read_results
from mmpretrain.schedules import Clock, Duration, Schedule, TrainingProgress, first_difference, scheduled_values
from mmpretrain.training import resume
from mmpretrain.training.run_copy import RunCopy
from mmpretrain.training.setup import Setup, clock_of, fingerprint_of

log = logging.getLogger(__name__)


def open_run(
    cfg: TrainConfig, folder: Path, schedule: Schedule, clock: Clock, streams: Mapping[str, Stream]
) -> tuple[TextIO | None, AbstractContextManager[Callable[[], None]]]:
    """Create and lock the run's directory on rank 0, fetch the run if the copy of `run.sync_to` is ahead, and start logging.
    A collective.

    Args:
        cfg: the configuration.
        folder: the run's directory.
        schedule: schedule of the learning rate.
        clock: clock of the run.
        streams: streams that the objectives read.

    Returns: the lock file on rank 0, which holds the lock until it is closed, None on other ranks; and the context in which
        rank 0 keeps the copy up to date (see `RunCopy.kept_up`).
    Raises: UsageError on all ranks if the directory cannot be written, another process uses it, or it or the copy was made
        with another configuration; ValueError if `run.sync_to` is not the place of a run's copy; Unreachable.
    """
    place = cfg.run.sync_to
    run_copy = None if place is None else RunCopy(folder, place, cfg.data.storage_seconds, cfg.checkpoint.keep_last)
    lock, refusal = None, None
    if distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_links(folder)
            lock = (folder / ".lock").open("a")
            # A POSIX lock is not inherited by forked workers, which outlive a kill by seconds; one of flock would be.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            refusal = _check_configuration(cfg, folder, schedule, clock, streams)
        except ValueError as error:
            refusal = str(error)
        except BlockingIOError:
            refusal = f"{folder} is in use by another process; wait for it, or choose another run.name"
        except OSError as error:
            refusal = f"run.dir is {str(folder)!r}, which cannot be written ({error.strerror}); choose another folder"
    refusal = distributed.broadcast_object(refusal)
    if refusal is not None:
        raise errors.UsageError(refusal)
    if run_copy is None:
        log_to(folder)
        return lock, nullcontext(lambda: None)

    def restore() -> tuple[str | None, list[str]]:
        if (text := run_copy.configuration()) is not None:
            saved, now = config_yaml.from_yaml(text, f"{place}/config.yaml"), config_yaml.to_plain(cfg)
            if changed := identity.differences(saved, now, ("trainer.duration",), config_yaml.to_values(cfg)):
                raise ValueError(
                    f"run.sync_to: {place} is the copy of another run ({'; '.join(changed)}); name another place"
                )
        restored, warnings = run_copy.restore()
        if restored and (refusal := _check_configuration(cfg, folder, schedule, clock, streams)) is not None:
            raise ValueError(refusal)
        return restored, warnings

    restored, warnings = distributed.from_main(restore)
    log_to(folder)  # train.log is one of the files that are fetched
    if distributed.is_main():
        for warning in warnings:
            log.warning("run.sync_to: checkpoint passed over: %s; going on from the one before", warning)
        if restored:
            log.info("%s was fetched from %s: %s", folder, place, restored)
    return lock, run_copy.kept_up() if distributed.is_main() else nullcontext(lambda: None)


def _check_links(folder: Path) -> None:
    """Raises: UsageError if the directory contains a symbolic link: in one made by others it could redirect writes."""
    for path in folder.iterdir():
        if path.is_symlink():
            raise errors.UsageError(
                f"{path} is a symbolic link, through which the run would write elsewhere; expected a file or a folder: "
                f"remove it, or link {folder} as a whole"
            )


def _check_configuration(
    cfg: TrainConfig, folder: Path, schedule: Schedule, clock: Clock, streams: Mapping[str, Stream]
) -> str | None:
    """Return an error message if the directory was made with a configuration that differs where it must not, else None.

    Raises: ValueError if the directory's configuration or its checkpoints cannot be read.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return None
    saved, now, values = config_yaml.read(path), config_yaml.to_plain(cfg), config_yaml.to_values(cfg)
    changed = identity.differences(saved, now, values=values)
    kept = identity.differences(saved, now, ("trainer.duration",), values)
    if not changed:
        return None
    reason = ""
    if not kept:
        before = clock_of(streams, Duration.parse(saved["trainer"]["duration"], "trainer.duration"))
        difference = _first_difference(cfg, folder, schedule, before, clock)
        if difference is None:
            return None
        reason = ": " + difference
    return (
        f"{folder} was made with another configuration ({'; '.join(kept or changed)}{reason}); "
        "expected the same to go on: undo the change, or start a new run with run.name=..."
    )


def _first_difference(cfg: TrainConfig, folder: Path, schedule: Schedule, before: Clock, now: Clock) -> str | None:
    """Describe a step of the newest checkpoint that would have been another with the run's new length, or return None."""
    path = store.find_latest(folder / "checkpoints")
    num_steps = 0 if path is None else resume.read_state(path).step
    scheduled: dict[str, Callable[[TrainingProgress], object]] = {
        value.name: value for value in scheduled_values(config_yaml.to_values(cfg)) if not value.is_constant
    }
    scheduled["schedule"] = lambda progress: schedule(progress.samples, progress.clock)
    for part, until in (cfg.trainer.freeze or {}).items():
        if until is not None:
            scheduled[f"trainer.freeze.{part}"] = partial(_is_over, Duration.parse(until, f"trainer.freeze.{part}"))
    for name, value in scheduled.items():
        if (step := first_difference(value, num_steps, before, now)) is not None:
            return f"{name} would have had another value in step {step} of the {num_steps} that {path} has taken"
    return None


def _is_over(duration: Duration, progress: TrainingProgress) -> bool:
    return progress.samples >= progress.clock.samples(duration)


class LogFile(logging.FileHandler):
    """Handler of train.log. A failure to write ends the run instead of printing a traceback for each message."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raises: OSError that names the file, except for a message of level ERROR, which is the one that ends the run."""
        error = sys.exc_info()[1]
        logging.getLogger().removeHandler(self)
        with suppress(OSError):
            self.close()
        if isinstance(error, OSError) and record.levelno < logging.ERROR:
            raise OSError(error.errno, error.strerror, self.baseFilename) from error


def write_configuration(cfg: TrainConfig, folder: Path) -> None:
    """Write config.yaml, and copy the files of a local tokenizer and each config.json of Hugging Face into the directory.

    Raises: ValueError if the directory already has a copy of another one.
    """
    files.write_text(folder / "config.yaml", config_yaml.to_yaml(config_yaml.to_plain(cfg)))
    if (path := cfg.data.tokenizer.get("path")) is not None:
        _keep(
            f"data.tokenizer.path={path} is not the tokenizer", tokenizer_files(Path(path)), folder / TOKENIZER_FOLDER
        )
    for name, node in huggingface_nodes(cfg.model).items():
        config = {CONFIG_FILE: Path(node["path"], CONFIG_FILE)}
        _keep(f"model.{name}.path={node['path']} is not the model", config, folder / HUGGINGFACE_FOLDER / name)


def _keep(refusal: str, sources: Mapping[str, Path], kept: Path) -> None:
    """Copy files into the folder `kept`. Raises: ValueError that begins with `refusal` if it has others of the same names."""
    for name, file in sources.items():
        if (kept / name).exists() and (kept / name).read_bytes() != file.read_bytes():
            raise ValueError(f"{refusal} that the run was made with, which is {kept}")
        kept.mkdir(parents=True, exist_ok=True)
        files.write_bytes(kept / name, file.read_bytes())


def write_facts(setup: Setup, folder: Path) -> None:
    """Write run.json: sizes of model and data and names of classes, and the hardware that the run was last started on.

    Raises: ValueError if the run began with other classes.
    """
    parameters: Counter[str] = Counter()
    for name, parameter in setup.task.named_parameters():
        parameters[optim.tower_of(name)] += parameter.numel()
    data = {
        name: {
            "samples": stream.order.num_samples,
            "files": sum(len(each.paths) for each in stream.fingerprints.values() if isinstance(each, Fingerprint)),
        }
        for name, stream in setup.streams.items()
    }
    names = {name: hooks_of(objective).class_names for name, objective in setup.task.objectives.items()}
    classes = {name: list(of_objective) for name, of_objective in names.items() if of_objective is not None}
    for name, before in class_names(folder).items():
        if (now := classes.get(name, [])) != before:
            number, old, new = first_other(before, now)
            raise ValueError(
                f"{folder} was made with {len(before)} classes of objective.{name} with {old} as number {number}, but now "
                f"there are {len(now)} with {new}; expected the same list of classes to go on, or a new run with run.name=..."
            )
    is_gpu = setup.device.type == "cuda"
    facts = {
        "parameters": parameters,
        "data": data,
        "classes": classes,
        "device": torch.cuda.get_device_name(setup.device) if is_gpu else str(setup.device),
        "processes": distributed.world_size(),
    }
    files.write_text(folder / "run.json", json.dumps(facts, indent=2) + "\n")


def log_to(folder: Path) -> None:
    """Log to the console and, on rank 0, to train.log. Other ranks log warnings and errors only."""
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
    """Escape control characters of a message, since names of samples and shards come from the data."""
    record.msg, record.args = "\n".join(map(errors.printable, record.getMessage().splitlines())), None
    return True


def finished(
    folder: Path, clock: Clock, streams: Mapping[str, Stream], keep_last: int
) -> dict[str, float | None] | None:
    """Return the scores of a finished run on every rank, or None. Surplus checkpoints of a finished run are deleted.

    Raises: ValueError if the run was trained on other data.
    """

    def look() -> dict[str, float | None] | None:
        if not (folder / "results.json").exists():
            return None
        path = store.find_latest(folder / "checkpoints", set_aside=True)
        if path is None or not resume.read_state(path).is_evaluated(clock.total_samples // clock.batch_size):
            return None
        resume.check_fingerprint(path, fingerprint_of(streams))
        store.prune(folder / "checkpoints", keep_last)
        return read_results(folder / "results.json")

    return distributed.from_main(look)


def conclude(results: Mapping[str, float | None], folder: Path, rewrite: bool) -> None:
    """Write the report if it is missing or `rewrite` is True, then print the results. Only rank 0 does so."""
    if distributed.is_main():
        if rewrite or not (folder / report.FILE).exists():
            report.write(folder)
        print_results(results, folder, read_intervals(folder))
