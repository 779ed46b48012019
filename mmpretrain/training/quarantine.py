"""Refused samples: record them in quarantine.jsonl, count them and limit their number."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mmpretrain import distributed, files
from mmpretrain.batch import Refused
from mmpretrain.errors import TrainingError, printable
from mmpretrain.reporting.records import read_refused

log = logging.getLogger(__name__)

_MIN_SAMPLES_FOR_BAD_FRACTION = 1000


class Quarantine:
    """Write each refused sample once to quarantine.jsonl, by shard and key, and count all refusals.

    Args:
        path: the quarantine.jsonl, written by rank 0.
        max_fraction: largest allowed fraction of refused samples.
        num_refused: number of refusals before the run was resumed.
    """

    def __init__(self, path: Path, max_fraction: float, num_refused: int) -> None:
        self.num_refused = num_refused
        self._path = path
        self._max_fraction = max_fraction
        self._waiting: list[Refused] = []
        self._seen: set[tuple[str, str]] = set()
        if distributed.is_main() and path.exists():
            known = read_refused(path)
            # Rewrite the file, so that new records do not continue a line that a kill cut short.
            files.write_text(path, "".join(json.dumps(record) + "\n" for record in known))
            self._seen = {(record["shard"], record["key"]) for record in known}

    def add(self, refused: Iterable[Refused]) -> None:
        """Store samples that this rank refused until the next flush."""
        self._waiting += refused

    def write_waiting(self) -> None:
        """Write the refusals stored on rank 0 before an error ends the run. Not a collective."""
        for refusal in self._waiting if distributed.is_main() else ():
            self._write(refusal)

    def flush(self, samples: int) -> None:
        """Write and count the refusals of all ranks. A collective.

        Args:
            samples: number of samples seen so far.

        Raises: TrainingError if more than `max_fraction` of them were refused. At least 1,000 samples are assumed, so
            that a few early refusals do not end a run.
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
                f"{self._max_fraction}; see {self._path}, fix the data or raise the limit"
            )

    def _write(self, refusal: Refused) -> None:
        if (refusal.shard, refusal.key) in self._seen:
            return
        self._seen.add((refusal.shard, refusal.key))
        log.warning("refused sample %s of %s: %s", printable(refusal.key), printable(refusal.shard), refusal.reason)
        with files.naming(self._path), self._path.open("ab", buffering=0) as file:
            files.write_all(file, json.dumps(asdict(refusal)) + "\n")
