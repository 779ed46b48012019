"""Files that a run leaves: metrics.jsonl, results.json, intervals.json and quarantine.jsonl."""

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpretrain import files
from mmpretrain.scores import Interval, Score

log = logging.getLogger(__name__)

_INTERVALS = "intervals.json"
_MAX_RECORDS_BYTES = 2 << 30  # about ten million refused samples
_LARGEST = sys.float_info.max


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one per line. An invalid last line is ignored, since a kill may have cut it short.

    Returns: the objects; an empty list if the file does not exist.
    Raises: ValueError if another line is not a JSON object, or if the path is not a regular file or is too large.
    """
    if not path.exists():
        return []
    lines = files.read_bytes(path, _MAX_RECORDS_BYTES).splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = files.parse_json(line, where)
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{where}: not JSON; expected one object a line, remove it") from None
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {type(record).__name__}; expected one object a line, remove it")
        records.append(record)
    return records


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Read a metrics.jsonl. Raises: ValueError for an invalid file (see `read_records`) or value."""
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        where = f"{path}, line {number}"
        check_numbers(record, where)
        for key in ("step", "samples"):
            if not isinstance(record.get(key), int):
                raise ValueError(f"{where}: {key} is {record.get(key)!r}; expected an integer, remove the line")
    return records


def read_results(path: Path) -> dict[str, float | None]:
    """Read a results.json. Raises: ValueError if a value is not a number or null."""
    results = files.read_json(path)
    check_numbers(results, str(path))
    return results


def write_intervals(folder: Path, scores: Mapping[str, Score]) -> None:
    """Write the confidence intervals of scores to FOLDER/intervals.json. Those of other metrics in the file are kept."""
    text = json.dumps({**read_intervals(folder), **intervals_of(scores)}, indent=2)
    files.write_text(folder / _INTERVALS, text + "\n")


def intervals_of(scores: Mapping[str, Score]) -> dict[str, dict[str, Interval]]:
    """Return the confidence intervals of scores, as `read_intervals` does. Those that are not finite are left out."""
    found = {
        name: {unit: bounds for unit, bounds in score.intervals.items() if all(map(math.isfinite, bounds))}
        for name, score in scores.items()
    }
    return {name: units for name, units in found.items() if units}


def read_intervals(folder: Path) -> dict[str, dict[str, Interval]]:
    """Read FOLDER/intervals.json: {metric: {unit that is resampled: (low, high)}}.

    Returns: the intervals; an empty dictionary if there is no file or, with a warning, if it is damaged.
    """
    path = folder / _INTERVALS
    if not path.exists():
        return {}
    try:
        found = files.read_json(path)
        return {
            str(name): {str(unit): (float(low), float(high)) for unit, (low, high) in units.items()}
            for name, units in found.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("%s is not as the run wrote it (%s); its intervals are left out", path, error)
        return {}


def read_refused(path: Path) -> list[dict[str, str]]:
    """Read a quarantine.jsonl. Raises: ValueError if a record lacks its shard, key or reason."""
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        for key in ("shard", "key", "reason"):
            if not isinstance(record.get(key), str):
                raise ValueError(
                    f"{path}, line {number}: {key} is {record.get(key)!r}; expected a text, remove the line"
                )
    return records


def check_numbers(values: Mapping[str, Any], where: str) -> None:
    """Raises: ValueError that begins with `where` if a value is not a finite number or null."""
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
        if not (is_number or value is None):
            shown = str(value)[:40] if isinstance(value, float | str) else type(value).__name__
            raise ValueError(f"{where}: {name!r} is {shown}; expected a number or null, as the run wrote it")


_LOWER_IS_BETTER = (
    "loss", "perplexity", "seconds", "alignment", "caption_rate", "drop", "ece", "ece_scaled", "gap", "nll", "nll_scaled",
    "uniformity",
)  # fmt: skip


def is_lower_better(metric: str) -> bool:
    """Return True for metrics that improve when they fall, by the end of their names, such as `loss` or `seconds`."""
    return metric.endswith(_LOWER_IS_BETTER)


def is_better(metric: str, score: float, best: float | None) -> bool:
    """Return True if `score` improves on `best` (see `is_lower_better`); NaN and infinity never do."""
    sign = -1 if is_lower_better(metric) else 1
    return math.isfinite(score) and (best is None or sign * score > sign * best)


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Replace non-finite values by None, since JSON cannot represent them."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
