"""Configuration, scores and curves of finished runs."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpretrain.config import config_yaml, identity
from mmpretrain.reporting.records import read_metrics, read_results

log = logging.getLogger(__name__)

# Distinguishes the repetitions of one setting.
_SEED = "run.seed"
_CUT = re.compile(r"-[0-9a-f]{8}$")  # see `identity.derived_name`


@dataclass(frozen=True)
class Run:
    """Directory of one run."""

    folder: Path
    settings: Mapping[str, Any]
    """Values of the configuration by full name, without keys that may change at a resume."""
    results: Mapping[str, float | None]
    """Contents of results.json; empty if the run is not finished."""

    @property
    def seed(self) -> int:
        return int(self.settings[_SEED])

    def curve(self, metric: str, axis: str) -> list[tuple[float, float]]:
        """Return (axis, value) of each logged step that has the metric; axis is `samples` or `wall_seconds`."""
        key = "samples" if axis == "samples" else "system/wall_seconds"
        points: list[tuple[float, float]] = []
        last: float | None = None
        for record in read_metrics(self.folder / "metrics.jsonl"):
            last = record.get(key, last)
            if (value := record.get(metric)) is not None and last is not None:
                points.append((float(last), float(value)))
        return points


def read_run(folder: Path) -> Run:
    """Read the directory of a run. Raises: ValueError if it has no config.yaml."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run, since it has no config.yaml; expected directories such as runs/<experiment>/<name>"
        )
    results = folder / "results.json"
    settings = identity.identity(config_yaml.read(path))
    if not isinstance(settings.get(_SEED), int | None):
        raise ValueError(f"{path}: {_SEED} is {settings[_SEED]!r}; expected a number")
    return Run(folder=folder, settings=settings, results=read_results(results) if results.exists() else {})


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in these folders, at any depth. Raises: ValueError if there is none."""
    found = [
        read_run(path.parent) for folder in folders for path in sorted(folder.rglob("config.yaml")) if folder.is_dir()
    ]
    if not found:
        raise ValueError(f"no run in {', '.join(map(str, folders))}; expected directories with a config.yaml")
    return found


def repetitions(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that differ only in their seed, by the name of their directories without the seed.

    Long names of directories are cut and end in a hash. Such a group is named by the settings that differ between groups.

    Of several runs with the same seed only the last finished one counts, since the others are not independent draws.
    """
    groups: dict[str, dict[Any, Run]] = {}
    for run in sorted(runs, key=lambda run: bool(run.results)):
        settings = {key: value for key, value in run.settings.items() if key != _SEED}
        group = groups.setdefault(repr(sorted(settings.items())), {})
        if (seed := run.settings.get(_SEED)) in group:
            log.warning("%s and %s have the same seed; only the latter counts", group[seed].folder, run.folder)
        group[seed] = run
    named: dict[str, list[Run]] = {}
    first = [next(iter(of_seed.values())).settings for of_seed in groups.values()]
    keys = sorted({key for settings in first for key in settings if key != _SEED})
    differing = [key for key in keys if len({repr(settings.get(key)) for settings in first}) > 1]
    for of_seed in groups.values():
        alike = [*of_seed.values()]
        name = re.sub(rf",?{re.escape(_SEED)}=\d+", "", alike[0].folder.name).strip(",") or "default"
        if _CUT.search(name) and differing:
            name = ",".join(f"{key}={alike[0].settings.get(key)}" for key in differing)
        if name in named:
            name = f"{alike[0].folder.parent.name}/{name}"
        while name in named:
            name += "'"
        named[name] = alike
    return named
