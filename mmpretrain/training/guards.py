"""What ends a run before its last step: too many refused samples, gradients that are not finite, a full disk."""

import json
import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from mmpretrain import distributed, files
from mmpretrain.batch import Refused
from mmpretrain.data.order import step_range
from mmpretrain.data.stream import Stream
from mmpretrain.errors import NO_SPACE
from mmpretrain.reporting.metrics import read_refused
from mmpretrain.schedules import Clock

log = logging.getLogger(__name__)

_MIN_SAMPLES_FOR_BAD_FRACTION = 1000


class TrainingError(RuntimeError):
    """The run cannot go on; the message is one line with the value, the expectation and the fix."""


class Quarantine:
    """quarantine.jsonl: every refused sample once, by shard and key; and how many draws were refused.

    Args:
        path: the file, which process 0 writes.
        max_fraction: the part of all draws that may be refused.
        num_refused: how many were before this process began.
    """

    def __init__(self, path: Path, max_fraction: float, num_refused: int) -> None:
        self.num_refused = num_refused
        self._path = path
        self._max_fraction = max_fraction
        self._waiting: list[Refused] = []
        self._seen: set[tuple[str, str]] = set()
        if distributed.is_main() and path.exists():
            known = read_refused(path)
            # Written anew, so that what follows does not continue a line that a kill cut short.
            files.write_text(path, "".join(json.dumps(record) + "\n" for record in known))
            self._seen = {(record["shard"], record["key"]) for record in known}

    def add(self, refused: Iterable[Refused]) -> None:
        """Keep what this rank's batches refused until the next flush."""
        self._waiting += refused

    def write_waiting(self) -> None:
        """Write down what this rank's batches refused, before an error ends the run. Not a collective."""
        for refusal in self._waiting if distributed.is_main() else ():
            self._write(refusal)

    def flush(self, samples: int) -> None:
        """Write down and count what all ranks refused. A collective.

        Args:
            samples: samples seen so far.

        Raises: TrainingError if more than `max_fraction` of them were refused.
        """
        refused = [refusal for part in distributed.gather_objects(self._waiting) for refusal in part]
        self._waiting = []
        self.num_refused += len(refused)
        if distributed.is_main():
            for refusal in refused:
                self._write(refusal)
        if self.num_refused > self._max_fraction * max(samples, _MIN_SAMPLES_FOR_BAD_FRACTION):
            raise TrainingError(
                f"{self.num_refused} of {samples} samples were refused, more than data.max_bad_fraction = "
                f"{self._max_fraction}; see {self._path}, mend the data or raise the limit"
            )

    def _write(self, refusal: Refused) -> None:
        if (refusal.shard, refusal.key) in self._seen:
            return
        self._seen.add((refusal.shard, refusal.key))
        log.warning("refused sample %s of %s: %s", refusal.key, refusal.shard, refusal.reason)
        with files.naming(self._path), self._path.open("ab", buffering=0) as file:
            files.write_all(file, json.dumps(asdict(refusal)) + "\n")


@contextmanager
def enough_space(folder: Path) -> Iterator[None]:
    """Inside the block a file that cannot be written for want of space ends the run in one line.

    Raises: TrainingError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free / 2**20
        raise TrainingError(
            f"{error.filename or folder} cannot be written ({error.strerror}; {free:,.0f} MiB are free there); the last "
            "checkpoint still stands: make space, and the same command goes on"
        ) from error


class LogFile(logging.FileHandler):
    """train.log; where it cannot be written the run ends, instead of a traceback for each message."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raises: OSError that names the file, but for a message of the level ERROR: it is what ends the run."""
        error = sys.exc_info()[1]
        logging.getLogger().removeHandler(self)
        with suppress(OSError):
            self.close()
        if isinstance(error, OSError) and record.levelno < logging.ERROR:
            raise OSError(error.errno, error.strerror, self.baseFilename) from error


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
