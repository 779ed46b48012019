"""Scores that `python -m mmpretrain.evaluate` measured after training, in a file for each checkpoint of a run.

evaluations/step_00001000.json        scores of the weights as trained, by name
            step_00001000-ema.json    scores of their moving average, named `eval-<data set>-ema/<metric>` as in training
"""

import fcntl
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmpretrain import files
from mmpretrain.data.source import Fingerprint, SampleSource
from mmpretrain.reporting.records import check_numbers, finite, intervals_of
from mmpretrain.scores import Interval, Score

log = logging.getLogger(__name__)

FOLDER = "evaluations"


@dataclass(frozen=True)
class Weights:
    """Weights of a run that scores belong to."""

    checkpoint: str
    """Name of the checkpoint's folder, such as step_00001000."""
    manifest: str
    """SHA-256 of its manifest.json: a rollback may write other weights under the same name."""
    is_average: bool
    """True for the moving average of the weights."""


@dataclass(frozen=True)
class Measured:
    """A score, and what it was measured on and how."""

    value: float | None
    """The score; None if it was not finite."""
    intervals: Mapping[str, Interval]
    """95 % confidence intervals by the unit that is resampled."""
    samples: int
    """Number of samples of the data set, whose name the score's name has."""
    fingerprint: str
    """Fingerprint of the data set; of shards, the hash alone."""
    precision: str


def keep(
    folder: Path,
    weights: Weights,
    scores: Mapping[str, Score],
    sources: Mapping[str, SampleSource],
    precision: str,
) -> None:
    """Write scores to the file of their weights. Earlier ones of other names stay. If it cannot be written, log a warning.

    Args:
        folder: the run's directory.
        weights: the weights that were evaluated.
        scores: scores by `eval-<data set>/<metric>`.
        sources: samples of the data sets, by name.
        precision: precision of the model's passes.
    """
    values, intervals = finite(scores), intervals_of(scores)
    found = {}
    for name, value in values.items():
        source = sources[name.partition("/")[0].removeprefix("eval-")]
        of_all = source.fingerprint
        fingerprint = of_all.hash if isinstance(of_all, Fingerprint) else of_all
        measured = Measured(value, intervals.get(name, {}), source.num_samples, fingerprint, precision)
        found[name.replace("/", "-ema/", 1) if weights.is_average else name] = measured
    try:
        _merge(folder, weights, found)
    except (OSError, ValueError) as error:
        log.warning("the scores are not kept for the model card: %s", error)


def _merge(folder: Path, weights: Weights, found: Mapping[str, Measured]) -> None:
    path = _path(folder, weights)
    if path.parent.is_symlink():  # in a directory made by others it could redirect writes
        raise ValueError(f"{path.parent} is a symbolic link; expected a folder: remove it")
    path.parent.mkdir(exist_ok=True)
    for file in path.parent.iterdir():
        if file.is_symlink() or not file.is_file():
            raise ValueError(
                f"{file} is no regular file; expected scores as mmpretrain.evaluate writes them: remove it"
            )
    with (path.parent / ".lock").open("a") as lock:  # evaluations of several data sets may run side by side
        fcntl.lockf(lock, fcntl.LOCK_EX)
        scores = {name: asdict(score) for name, score in {**read(folder, weights), **found}.items()}
        files.write_text(path, json.dumps({"manifest": weights.manifest, "scores": scores}, indent=2) + "\n")


def read(folder: Path, weights: Weights) -> dict[str, Measured]:
    """Return the scores of the weights that FOLDER/evaluations has, by name; none if they are of other weights.

    Raises: ValueError if the file is not as `keep` writes it.
    """
    path = _path(folder, weights)
    if not path.exists():
        return {}
    content = files.read_json(path)
    if content.get("manifest") != weights.manifest:
        return {}
    scores = content.get("scores")
    if not isinstance(scores, dict):
        raise ValueError(f"{path} has no scores; expected those that mmpretrain.evaluate wrote: remove it")
    return {name: _measured(name, entry, path) for name, entry in scores.items()}


def _path(folder: Path, weights: Weights) -> Path:
    return folder / FOLDER / f"{weights.checkpoint}{'-ema' if weights.is_average else ''}.json"


def _measured(name: str, entry: Any, path: Path) -> Measured:
    kinds = {"value": int | float | None, "intervals": dict, "samples": int, "fingerprint": str, "precision": str}
    is_entry = isinstance(entry, dict) and entry.keys() == kinds.keys()
    is_whole = is_entry and all(isinstance(entry[key], kind) for key, kind in kinds.items())
    if not is_whole or not 0 <= entry["samples"] < 1 << 63:
        raise ValueError(
            f"{path}: {name!r} lacks {', '.join(kinds)} as mmpretrain.evaluate writes them: remove the file"
        )
    check_numbers({name: entry["value"]}, str(path))
    intervals = {}
    for unit, bounds in entry["intervals"].items():
        if not isinstance(bounds, list) or len(bounds) != 2 or None in bounds:
            raise ValueError(f"{path}: the interval of {name!r} is no pair of numbers; remove the file")
        check_numbers(
            {f"{name}: {unit}, {end}": bound for end, bound in zip(("low", "high"), bounds, strict=True)}, str(path)
        )
        intervals[unit] = (float(bounds[0]), float(bounds[1]))
    return Measured(**{**entry, "intervals": intervals})
