"""Refused samples: written to quarantine.jsonl, counted, and a limit to their number."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mmpretrain import distributed, files
from mmpretrain.batch import Refused
from mmpretrain.errors import TrainingError
from mmpretrain.reporting.metrics import read_refused

log = logging.getLogger(__name__)

_MIN_SAMPLES_FOR_BAD_FRACTION = 1000


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
